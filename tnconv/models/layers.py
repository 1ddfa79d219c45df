"""What a layer computes, as diagrams: one description per type of module, and nothing else.

A description takes a call apart into an `Operation`, the diagrams that are linear in each
parameter, and the operand ``x`` that they read: the module's input, padded, normalised or one-hot.
Quantities are functions of these diagrams and never ask which layer they come from.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tnconv import diagrams
from tnconv import nn as ours
from tnconv.diagrams import Expression, Sum, TensorNetwork

Shape = tuple[int, ...]
Networks = Mapping[str, TensorNetwork]


@dataclass(frozen=True)
class Operation:
    """Diagrams ``{parameter: y}`` by a recipe (a module's function) and its arguments.

    Each is linear in operand ``x`` and in its parameter, an operand of that name, and has leg n,
    the sample. Equal recipes and arguments mean equal diagrams: programs are looked up by them.
    """

    recipe: Callable[..., Networks]
    arguments: tuple[Any, ...]

    @property
    def networks(self) -> Networks:
        """The diagram of each parameter."""
        return _networks(self)


@lru_cache(maxsize=4096)
def _networks(operation: Operation) -> Networks:
    return operation.recipe(*operation.arguments)


Description = Callable[[Any, Tensor, Shape], tuple[Operation, Tensor]]
"""From a module, its input and its output's shape to the operation and its operand ``x``."""

_LAYERS: dict[type[nn.Module], Description] = {}


def register_layer(kind: type[nn.Module]) -> Callable[[Description], Description]:
    """Describe a type of module, for all quantities: a decorator for a `Description`.

    Subclasses count as long as they inherit ``forward``.

    >>> import torch
    >>> class Gain(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = nn.Parameter(torch.ones(3))
    ...     def forward(self, x):
    ...         return x * self.weight
    >>> def gain(x_shape, dimension):
    ...     return {"weight": diagrams.scale(x_shape, x_shape[dimension:], dimension)}
    >>> @register_layer(Gain)
    ... def _(module, x, output_shape):
    ...     return Operation(gain, (tuple(x.shape), -1)), x
    >>> describe(Gain(), torch.rand(8, 5, 3), (8, 5, 3))[0].networks["weight"].shape
    (8, 5, 3)
    """

    def register(description: Description) -> Description:
        _LAYERS[kind] = description
        return description

    return register


def describes(module: nn.Module) -> bool:
    """Whether a module's type is described and its parameters are what its type computes with."""
    return _description(module) is not None


def describe(module: nn.Module, x: Tensor, output_shape: Shape) -> tuple[Operation, Tensor]:
    """The operation of one call of a described module, and its operand ``x``."""
    description = _description(module)
    assert description is not None, type(module)
    return description(module, x, output_shape)


def _description(module: nn.Module) -> Description | None:
    """The nearest described ancestor's, unless a subclass computes something else.

    An embedding whose gradients are scaled by words' counts in the batch mixes samples.
    """
    kind = type(module)
    if getattr(module, "scale_grad_by_freq", False):
        return None
    for ancestor in kind.__mro__:
        if ancestor in _LAYERS:
            names = ("forward", "_conv_forward")
            same = all(getattr(kind, m, None) is getattr(ancestor, m, None) for m in names)
            return _LAYERS[ancestor] if same else None
    return None


def linear(x_shape: Shape, weight_shape: Shape) -> Networks:
    """``y[n, o, d] = Σ_c x[n, o, c] w[d, c] + b[d]``."""
    layer = diagrams.linear(x_shape, weight_shape)
    return {"weight": layer, "bias": diagrams.bias(layer.shape, weight_shape[:1], -1)}


def conv(x_shape: Shape, weight_shape: Shape, *settings: Any) -> Networks:
    """``y[n, gd, o] = Σ_{c,k,i} x[n, gc, i] Π[k, o, i] w[gd, c, k] + b[gd]``."""
    layer = diagrams.conv(x_shape, weight_shape, *settings)
    return {"weight": layer, "bias": diagrams.bias(layer.shape, weight_shape[:1])}


def conv_transpose(x_shape: Shape, weight_shape: Shape, *settings: Any) -> Networks:
    """``y[n, gd, o] = Σ_{c,k,i} x[n, gc, i] Π[k, i, o] w[gc, d, k] + b[gd]``."""
    layer = diagrams.conv_transpose(x_shape, weight_shape, *settings)
    return {"weight": layer, "bias": diagrams.bias(layer.shape, layer.shape[1:2])}


def scale(x_shape: Shape, weight_shape: Shape, dimension: int) -> Networks:
    """``y[n, o, d] = x[n, o, d] w[d] + b[d]``."""
    layer = diagrams.scale(x_shape, weight_shape, dimension)
    return {"weight": layer, "bias": diagrams.bias(x_shape, weight_shape, dimension)}


def lookup(x_shape: Shape, weight_shape: Shape) -> Networks:
    """``y[n, o, d] = Σ_c x[n, o, c] w[c, d]``."""
    return {"weight": diagrams.lookup(x_shape, weight_shape)}


def explicit(vectors: int | None, samples: int, shape: Shape) -> Networks:
    """``y[n, o] = Σ_θ x[o, n, θ] θ``: the layer whose gradients are x, known already.

    For that, v[m, n, o] = δ[m, o], or v[n] = 1 without vectors: `known` puts them in.
    """
    legs = [f"d{at}" for at in range(1, len(shape) + 1)]
    positions = {} if vectors is None else {"o1": vectors}
    sizes = positions | dict(zip(("n", *legs), (samples, *shape), strict=True))
    view = diagrams.View.of
    nodes = (
        diagrams.Tensor("x", view(sizes, *positions, "n", *legs)),
        diagrams.Tensor("parameter", view(sizes, *legs)),
    )
    return {"parameter": TensorNetwork(nodes, view(sizes, "n", *positions), sizes)}


def known(network: Expression, cotangent: str = "grad_output") -> Expression:
    """A diagram over an `explicit` layer, without the cotangent that such a layer has."""

    def without(term: TensorNetwork) -> TensorNetwork:
        nodes: list[diagrams.Node] = []
        for node in term.nodes:
            if not isinstance(node, diagrams.Tensor) or node.name != cotangent:
                nodes.append(node)
            elif len(legs := node.legs) == 3:
                nodes.append(diagrams.delta(legs[0], legs[2]))
        return term.with_(nodes)

    return Sum(tuple(map(without, network.terms)))


def repeated(calls: int, recipe: Callable[..., Networks], *arguments: Any) -> Networks:
    """Several calls of one operation: see `tnconv.diagrams.repeated`."""
    networks = _networks(Operation(recipe, arguments))
    return {name: diagrams.repeated(layer, calls) for name, layer in networks.items()}


@register_layer(nn.Linear)
def _linear(layer: nn.Linear, x: Tensor, output_shape: Shape) -> tuple[Operation, Tensor]:
    x = x if x.dim() > 1 else x[None]
    return Operation(linear, (tuple(x.shape), tuple(layer.weight.shape))), x


@register_layer(nn.Conv1d)
@register_layer(nn.Conv2d)
@register_layer(nn.Conv3d)
@register_layer(ours.Conv1d)
@register_layer(ours.Conv2d)
@register_layer(ours.Conv3d)
@register_layer(ours.ConvNd)
def _conv(layer: nn.Conv2d, x: Tensor, output_shape: Shape) -> tuple[Operation, Tensor]:
    """Zeros are no pad, but in Π; every other padding mode is applied to x."""
    x = x if x.dim() == layer.weight.dim() else x[None]
    padding: Any = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, layer.padding_mode), 0
    settings = (layer.stride, padding, layer.dilation, layer.groups)
    return Operation(conv, (tuple(x.shape), tuple(layer.weight.shape), *settings)), x


@register_layer(nn.ConvTranspose1d)
@register_layer(nn.ConvTranspose2d)
@register_layer(nn.ConvTranspose3d)
@register_layer(ours.ConvTranspose1d)
@register_layer(ours.ConvTranspose2d)
@register_layer(ours.ConvTranspose3d)
@register_layer(ours.ConvTransposeNd)
def _conv_transpose(
    layer: nn.ConvTranspose2d, x: Tensor, output_shape: Shape
) -> tuple[Operation, Tensor]:
    """The output tells its padding, which a call can choose by ``output_size``."""
    dims = layer.weight.dim() - 2
    x = x if x.dim() == dims + 2 else x[None]
    each = zip(
        *(x.shape[-dims:], output_shape[-dims:], layer.weight.shape[2:]),
        *(layer.stride, layer.padding, layer.dilation),
        strict=True,
    )
    rest = tuple(o - ((i - 1) * s - 2 * int(p) + d * (k - 1) + 1) for i, o, k, s, p, d in each)
    settings = (layer.stride, layer.padding, rest, layer.groups, layer.dilation)
    return Operation(conv_transpose, (tuple(x.shape), tuple(layer.weight.shape), *settings)), x


@register_layer(nn.BatchNorm1d)
@register_layer(nn.BatchNorm2d)
@register_layer(nn.BatchNorm3d)
@register_layer(nn.SyncBatchNorm)
def _batch_norm(layer: nn.BatchNorm2d, x: Tensor, output_shape: Shape) -> tuple[Operation, Tensor]:
    """Where it normalises by running statistics, which are constants."""
    own = layer.training or layer.running_mean is None
    running = (None, None) if own else (layer.running_mean, layer.running_var)
    return _scale(F.batch_norm(x, *running, training=own, eps=layer.eps))


@register_layer(nn.InstanceNorm1d)
@register_layer(nn.InstanceNorm2d)
@register_layer(nn.InstanceNorm3d)
def _instance_norm(
    layer: nn.InstanceNorm2d, x: Tensor, output_shape: Shape
) -> tuple[Operation, Tensor]:
    own = layer.training or layer.running_mean is None
    running = (None, None) if own else (layer.running_mean, layer.running_var)
    x = x if x.dim() == layer._get_no_batch_dim() + 1 else x[None]
    return _scale(F.instance_norm(x, *running, use_input_stats=own, eps=layer.eps))


@register_layer(nn.GroupNorm)
def _group_norm(layer: nn.GroupNorm, x: Tensor, output_shape: Shape) -> tuple[Operation, Tensor]:
    return _scale(F.group_norm(x, layer.num_groups, eps=layer.eps))


@register_layer(nn.LayerNorm)
def _layer_norm(layer: nn.LayerNorm, x: Tensor, output_shape: Shape) -> tuple[Operation, Tensor]:
    shape = tuple(layer.normalized_shape)
    x = x if x.dim() > len(shape) else x[None]
    return _scale(F.layer_norm(x, shape, eps=layer.eps), -len(shape))


@register_layer(nn.RMSNorm)
def _rms_norm(layer: nn.RMSNorm, x: Tensor, output_shape: Shape) -> tuple[Operation, Tensor]:
    shape = tuple(layer.normalized_shape)
    x = x if x.dim() > len(shape) else x[None]
    return _scale(F.rms_norm(x, shape, eps=layer.eps), -len(shape))


@register_layer(nn.Embedding)
def _embedding(layer: nn.Embedding, x: Tensor, output_shape: Shape) -> tuple[Operation, Tensor]:
    """One-hot rows; those of ``padding_idx``, whose row is never learned, are zero."""
    rows = F.one_hot(x if x.dim() else x[None], layer.num_embeddings).to(layer.weight.dtype)
    if layer.padding_idx is not None:
        rows[..., layer.padding_idx] = 0
    return Operation(lookup, (tuple(rows.shape), tuple(layer.weight.shape))), rows


def _scale(x: Tensor, dimension: int = 1) -> tuple[Operation, Tensor]:
    """``weight`` times the normalised input: a weight that is frozen or missing costs nothing."""
    shape = tuple(x.shape[dimension:]) if dimension < 0 else tuple(x.shape[1:2])
    return Operation(scale, (tuple(x.shape), shape, dimension)), x
