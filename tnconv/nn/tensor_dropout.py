"""Tensor dropout: exact layers whose weight gradient is a sample, from a part of the input.

The weight gradient ``dw[d, c, k] = Σ_{n,o,i} x[n, c, i] Π[k, o, i] v[n, d, o]`` sums over, or is
made for, every position of the indices of x. With few positions of an index drawn at random, and
what they give scaled up, it is right on average (Bernoulli-CRS, Adelman et al. 2021; of any index
of a convolution, Dangel 2023), and only these slices of x are stored for the backward pass.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tnconv.nn import memory
from tnconv.nn.conversion import Kind, patched, register_originals, swapped_with_warning
from tnconv.nn.draws import Draws, Sampling, checked
from tnconv.nn.memory import saving_layers
from tnconv.nn.memory.functions import Bilinear, autocast_dtype, cast
from tnconv.nn.memory.linear import Linear
from tnconv.nn.memory.saving_convolution import Convolution
from tnconv.nn.memory.saving_layers import padded
from tnconv.nn.sampled_gradients import Layer, Sampled, Slices

Index = Literal["batch", "in_channels", "planes", "rows", "columns"]
Keep = float | Mapping[str, float]
SPATIAL = ("planes", "rows", "columns")
DEFAULT: Mapping[str, float] = {"in_channels": 0.5}


class TensorDropout(nn.Module):
    """What the layers share: which slices of an input are kept.

    ``keep`` is the probability for slices of each index; ``sampling`` is "bernoulli", or "fixed"
    for ``max(1, ⌊keep · size⌋)`` slices, drawn without replacement.
    """

    keep: Mapping[str, float] = DEFAULT
    draws = Draws("bernoulli", None)
    own_state = ("keep", "draws")

    def __init__(
        self,
        *args: Any,
        keep: Keep = 0.5,
        sampling: Sampling = "bernoulli",
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.keep = checked(keep, self._indices)
        self.draws = Draws(sampling, generator)

    @property
    def _indices(self) -> tuple[str, ...]:
        """The names of the input's indices."""
        raise NotImplementedError

    @property
    def samples(self) -> bool:
        """Whether the weight's gradient is that of a sample now, if it learns."""
        return self.training and len(self.keep) > 0  # torch 2.11 traces no bool(dict)

    def _exact(self, weight: Tensor) -> bool:
        return not (self.samples and weight.requires_grad and torch.is_grad_enabled())

    def _sampled(
        self,
        layer: Layer,
        slices: Slices,
        x: Tensor,  # (n, g·c, *i), what is sampled
        image: Tensor,  # what the layer reads
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """The layer's output; its weight gradient is that of a sample."""
        shares = {self._indices.index(name): p for name, p in self.keep.items()}
        positions, scale = self.draws.positions(shares, slices.sizes, x)
        operation = Sampled(layer, slices, scale, tuple(positions))
        operands = (image, weight, bias, slices.of(x, positions), *positions.values())
        y: Tensor = Bilinear.run(operation, *operands)
        return y

    def stores_input(self) -> bool:
        """Whether the whole input is stored: then an activation before need not store it too."""
        return not self.samples and super().stores_input()  # type: ignore[misc]

    def extra_repr(self) -> str:
        parts = ", ".join(f"{name}={p}" for name, p in self.keep.items())
        return f"{super().extra_repr()}, keep=({parts}), sampling={self.draws.sampling!r}"


class _Convolution(TensorDropout, saving_layers._Convolution):
    """A convolution; ``in_channels`` are those of a group, or the groups where they have one."""

    @property
    def _indices(self) -> tuple[str, ...]:
        return ("batch", "in_channels", *SPATIAL[-len(self.kernel_size) :])

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._exact(weight):
            return super()._conv_forward(input, weight, bias)
        if input.ndim == weight.ndim - 1:
            return self._conv_forward(input.unsqueeze(0), weight, bias).squeeze(0)
        dtype, (pads, padding) = autocast_dtype(input), self._pads
        none = (0,) * len(padding)
        layer = Convolution(self.stride, padding, self.dilation, False, none, self.groups, dtype)
        groups = self.groups if weight.shape[1] > 1 else 1
        slices = Slices(input.shape, groups, tuple(pads), self.padding_mode)
        x = cast(input, dtype)
        image = padded(x, pads, self.padding_mode) if any(map(any, pads)) else x
        return self._sampled(layer, slices, x, image, weight, bias)


class TensorDropoutConv1d(_Convolution, memory.Conv1d):
    """``torch.nn.Conv1d`` with a sampled weight gradient; see `TensorDropoutConv2d`."""


class TensorDropoutConv2d(_Convolution, memory.Conv2d):
    """``torch.nn.Conv2d`` with a sampled weight gradient; everything else is exact.

    ``keep`` is the part of the input that is stored: of its channels, or for each index named, of
    "batch", "in_channels", "rows" and "columns" (also "planes" in three dimensions), jointly.
    Slices are kept with that probability each, or with ``sampling="fixed"`` in that number, drawn
    without replacement. In-channels are those of a group, or the groups themselves where they have
    one each. In evaluation mode, and where the weight does not learn, nothing is sampled.

    Draws follow ``torch.manual_seed``, or the ``generator``; recomputations under checkpointing
    repeat them. ``torch.compile(fullgraph=True)`` takes fixed samples without a generator.

    >>> layer = TensorDropoutConv2d(4, 8, 3, keep={"rows": 0.5, "columns": 0.5}, sampling="fixed")
    >>> stored = []
    >>> with torch.autograd.graph.saved_tensors_hooks(stored.append, lambda _: None):
    ...     y = layer(torch.rand(2, 4, 10, 10))
    >>> [tuple(t.shape) for t in stored if t.is_floating_point()]
    [(2, 4, 5, 5)]

    Raises:
        ValueError: a probability outside of (0, 1], or an index that the input does not have.
    """


class TensorDropoutConv3d(_Convolution, memory.Conv3d):
    """``torch.nn.Conv3d`` with a sampled weight gradient; see `TensorDropoutConv2d`."""


class TensorDropoutLinear(TensorDropout, memory.Linear):
    """``torch.nn.Linear`` with a sampled weight gradient; see `TensorDropoutConv2d`.

    Its input's indices are "batch", the first dimension, and "in_channels", the features.
    """

    @property
    def _indices(self) -> tuple[str, ...]:
        return "batch", "in_channels"

    def forward(self, input: Tensor) -> Tensor:
        if self._exact(self.weight):
            return super().forward(input)
        if input.ndim == 1:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        layer, x = Linear(dtype := autocast_dtype(input)), cast(input, dtype)
        rows = x.flatten(1, -2) if x.ndim > 2 else x[:, None]
        rows = rows.movedim(-1, 1)  # (n, c, o): where convolutions have their channels
        return self._sampled(layer, Slices(rows.shape), rows, x, self.weight, self.bias)


_KINDS: dict[Kind, Kind] = {
    nn.Conv1d: TensorDropoutConv1d,
    nn.Conv2d: TensorDropoutConv2d,
    nn.Conv3d: TensorDropoutConv3d,
    nn.Linear: TensorDropoutLinear,
    memory.Conv1d: TensorDropoutConv1d,
    memory.Conv2d: TensorDropoutConv2d,
    memory.Conv3d: TensorDropoutConv3d,
    memory.Linear: TensorDropoutLinear,
}
register_originals({ours: kind for kind, ours in _KINDS.items() if kind.__module__[:5] == "torch"})


def tensor_dropout(
    model: nn.Module,
    keep: Keep = 0.5,
    sampling: Sampling = "bernoulli",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """A new model whose convolutional and linear layers have sampled weight gradients.

    It shares all but the modules with the given one, which stays as it is, like
    `tnconv.nn.convert`'s. ``keep`` is as in `TensorDropoutConv2d`; layers whose input has none of
    the named indices are exact.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    >>> print(tensor_dropout(model, {"rows": 0.25})[0])
    TensorDropoutConv2d(1, 4, kernel_size=(3, 3), stride=(1, 1), keep=(rows=0.25), \
sampling='bernoulli')

    Args:
        model: the network.
        keep: the part of inputs that is stored: one number, or by the names of indices.
        sampling: "bernoulli" or "fixed".
        generator: where slices are drawn.

    Raises:
        ValueError: a probability outside of (0, 1], or an index that no layer's input has.
    """
    every = checked(keep, ("batch", "in_channels", *SPATIAL))
    new = swapped_with_warning(model, _kind, tuple(_KINDS), tuple(set(_KINDS.values())))
    for module in new.modules():
        if isinstance(module, TensorDropout):
            own = {name: p for name, p in every.items() if name in module._indices}
            module.keep, module.draws = own, Draws(sampling, generator)
    return new


def _kind(module: nn.Module) -> Kind | None:
    return None if patched(module) else _KINDS.get(type(module))
