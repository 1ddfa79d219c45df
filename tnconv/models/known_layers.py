"""The layers that are described: torch's, this library's own, and some of other libraries'."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tnconv import diagrams
from tnconv import nn as ours
from tnconv.diagrams import Hyperparameters, layer_networks
from tnconv.models.layers import Networks, Operand, Operation, Shape, register_layer
from tnconv.nn import memory

Described = tuple[Operation, Operand]
Pair = tuple[Operation, dict[str, Operand]]


def linear(x_shape: Shape, weight_shape: Shape) -> Networks:
    """``y[n, o, d] = Σ_c x[n, o, c] w[d, c] + b[d]``."""
    layer = diagrams.linear(x_shape, weight_shape)
    return {"weight": layer, "bias": diagrams.bias(layer.shape, weight_shape[:1], -1)}


def convolution(x_shape: Shape, weight_shape: Shape, h: Hyperparameters) -> Networks:
    """``y[n, gd, o] = Σ_{c,k,i} x[n, gc, i] Π[k, o, i] w[gd, c, k] + b[gd]``, or transposed."""
    layer = layer_networks.convolution(x_shape, weight_shape, h)
    return {"weight": layer, "bias": diagrams.bias(layer.shape, layer.shape[1:2])}


def scale(x_shape: Shape, weight_shape: Shape, dimension: int) -> Networks:
    """``y[n, o, d] = x[n, o, d] w[d] + b[d]``."""
    layer = diagrams.scale(x_shape, weight_shape, dimension)
    return {"weight": layer, "bias": diagrams.bias(x_shape, weight_shape, dimension)}


def lookup(x_shape: Shape, weight_shape: Shape) -> Networks:
    """``y[n, o, d] = Σ_c x[n, o, c] w[c, d]``."""
    return {"weight": diagrams.lookup(x_shape, weight_shape)}


def bilinear(x_shape: Shape, other_shape: Shape, weight_shape: Shape) -> Networks:
    """``y[n, o, d] = Σ_{a,b} x[n, o, a] w[d, a, b] other[n, o, b] + b[d]``."""
    layer = diagrams.bilinear(x_shape, other_shape, weight_shape)
    return {"weight": layer, "bias": diagrams.bias(layer.shape, weight_shape[:1], -1)}


def inputs_first(x_shape: Shape, weight_shape: Shape) -> Networks:
    """``y[n, o, d] = Σ_c x[n, o, c] w[c, d] + b[d]``."""
    layer = diagrams.lookup(x_shape, weight_shape)
    return {"weight": layer, "bias": diagrams.bias(layer.shape, weight_shape[1:], -1)}


def _linear(layer: nn.Linear, x: Tensor, output_shape: Shape) -> Described:
    x = x if x.dim() > 1 else x[None]
    return Operation(linear, (tuple(x.shape), tuple(layer.weight.shape))), x


def _conv(layer: nn.Conv2d, x: Tensor, output_shape: Shape) -> Described:
    """Zeros are no pad, but in Π; every other padding mode is applied to x."""
    x = x if x.dim() == layer.weight.dim() else x[None]
    h, weight = _hyperparameters(layer), tuple(layer.weight.shape)
    if layer.padding_mode == "zeros":
        return Operation(convolution, (tuple(x.shape), weight, h)), x
    pads, mode, shape = layer._reversed_padding_repeated_twice, layer.padding_mode, list(x.shape)
    for at, (left, right) in enumerate(zip(pads[::2], pads[1::2], strict=True), 1):
        shape[-at] += left + right
    operation = Operation(convolution, (tuple(shape), weight, h._replace(padding=0)))
    return operation, lambda: F.pad(x, pads, mode)


def _conv_transpose(layer: nn.ConvTranspose2d, x: Tensor, output_shape: Shape) -> Described:
    """The output tells its padding, which a call can choose by ``output_size``."""
    dims = layer.weight.dim() - 2
    x = x if x.dim() == dims + 2 else x[None]
    each = zip(
        *(x.shape[-dims:], output_shape[-dims:], layer.weight.shape[2:]),
        *(layer.stride, layer.padding, layer.dilation),
        strict=True,
    )
    rest = tuple(o - ((i - 1) * s - 2 * int(p) + d * (k - 1) + 1) for i, o, k, s, p, d in each)
    h = _hyperparameters(layer)._replace(output_padding=rest)
    return Operation(convolution, (tuple(x.shape), tuple(layer.weight.shape), h)), x


def _hyperparameters(layer: nn.Conv2d | nn.ConvTranspose2d) -> Hyperparameters:
    settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return Hyperparameters(*settings, layer.transposed, layer.output_padding)


def _batch_norm(layer: nn.BatchNorm2d, x: Tensor, output_shape: Shape) -> Described:
    """Where it normalises by running statistics, which are constants."""
    own = layer.training or layer.running_mean is None
    running = (None, None) if own else (layer.running_mean, layer.running_var)
    return _scale(x, 1, lambda: F.batch_norm(x, *running, training=own, eps=layer.eps))


def _instance_norm(layer: nn.InstanceNorm2d, x: Tensor, output_shape: Shape) -> Described:
    own = layer.training or layer.running_mean is None
    running = (None, None) if own else (layer.running_mean, layer.running_var)
    x = x if x.dim() == layer._get_no_batch_dim() + 1 else x[None]
    return _scale(x, 1, lambda: F.instance_norm(x, *running, use_input_stats=own, eps=layer.eps))


@register_layer(memory.GroupNorm)
@register_layer(nn.GroupNorm)
def _group_norm(layer: nn.GroupNorm, x: Tensor, output_shape: Shape) -> Described:
    return _scale(x, 1, lambda: F.group_norm(x, layer.num_groups, eps=layer.eps))


def _normalised(layer: Any) -> int:
    return len(layer.normalized_shape)


@register_layer(memory.LayerNorm, dimensions=_normalised)
@register_layer(nn.LayerNorm, dimensions=_normalised)
def _layer_norm(layer: nn.LayerNorm, x: Tensor, output_shape: Shape) -> Described:
    shape = tuple(layer.normalized_shape)
    x = x if x.dim() > len(shape) else x[None]
    return _scale(x, -len(shape), lambda: F.layer_norm(x, shape, eps=layer.eps))


@register_layer(nn.RMSNorm, dimensions=_normalised)
def _rms_norm(layer: nn.RMSNorm, x: Tensor, output_shape: Shape) -> Described:
    shape = tuple(layer.normalized_shape)
    x = x if x.dim() > len(shape) else x[None]
    return _scale(x, -len(shape), lambda: F.rms_norm(x, shape, eps=layer.eps))


@register_layer(nn.Embedding, dimensions=lambda layer: 1)
def _embedding(layer: nn.Embedding, x: Tensor, output_shape: Shape) -> Described | None:
    """One-hot rows; those of ``padding_idx``, whose row is never learned, are zero.

    Gradients that are scaled by words' counts in the batch mix samples: no diagram.
    """
    words = x if x.dim() else x[None]

    def rows() -> Tensor:
        found = F.one_hot(words, layer.num_embeddings).to(layer.weight.dtype)
        if layer.padding_idx is not None:
            found[..., layer.padding_idx] = 0
        return found

    if layer.scale_grad_by_freq:
        return None
    shape = (*words.shape, layer.num_embeddings)
    return Operation(lookup, (shape, tuple(layer.weight.shape))), rows


@register_layer(nn.Bilinear, (1, False), lambda layer: 1)
def _bilinear(layer: nn.Bilinear, x: Tensor, other: Tensor, output_shape: Shape) -> Pair:
    x, other = (each if each.dim() > 1 else each[None] for each in (x, other))
    shapes = tuple(x.shape), tuple(other.shape), tuple(layer.weight.shape)
    return Operation(bilinear, shapes), {"x": x, "other": other}


@register_layer("transformers.pytorch_utils.Conv1D", (1, True), lambda layer: 1)
def _conv1d_of_transformers(layer: Any, x: Tensor, output_shape: Shape) -> Described:
    """A linear layer whose weight has its inputs first."""
    x = x if x.dim() > 1 else x[None]
    return Operation(inputs_first, (tuple(x.shape), tuple(layer.weight.shape))), x


def _scale(x: Tensor, dimension: int, normalised: Operand) -> Described:
    """``weight`` times the normalised input: a weight that is frozen or missing costs nothing."""
    shape = tuple(x.shape[dimension:]) if dimension < 0 else tuple(x.shape[1:2])
    return Operation(scale, (tuple(x.shape), shape, dimension)), normalised


LINEAR = (nn.Linear, memory.Linear, ours.TensorDropoutLinear)
CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, ours.Conv1d, ours.Conv2d, ours.Conv3d, ours.ConvNd),
    *(memory.Conv1d, memory.Conv2d, memory.Conv3d),
    *(ours.TensorDropoutConv1d, ours.TensorDropoutConv2d, ours.TensorDropoutConv3d),
)
TRANSPOSED = (
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(ours.ConvTranspose1d, ours.ConvTranspose2d, ours.ConvTranspose3d, ours.ConvTransposeNd),
    *(memory.ConvTranspose1d, memory.ConvTranspose2d, memory.ConvTranspose3d),
)
BATCH_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(memory.BatchNorm1d, memory.BatchNorm2d, memory.BatchNorm3d),
)
INSTANCE_NORMS = (
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(memory.InstanceNorm1d, memory.InstanceNorm2d, memory.InstanceNorm3d),
)
for kinds, description, layout, dimensions in (
    (LINEAR, _linear, lambda layer: (1, False), lambda layer: 1),
    (CONVOLUTIONS, _conv, lambda layer: (layer.groups, False), None),
    (TRANSPOSED, _conv_transpose, lambda layer: (layer.groups, True), None),
    (BATCH_NORMS, _batch_norm, None, None),
    (INSTANCE_NORMS, _instance_norm, None, None),
):
    for kind in kinds:
        register_layer(kind, layout, dimensions)(description)
