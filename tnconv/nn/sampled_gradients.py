"""Weight gradients from slices of a layer's input."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tnconv.nn.memory.functions import Maybe, Shapes
from tnconv.nn.memory.linear import Linear
from tnconv.nn.memory.saving_convolution import Convolution
from tnconv.nn.memory.saving_layers import padded

Positions = Mapping[int, Tensor]
"""By dimension, those that are kept."""
Layer = Convolution | Linear


@dataclass(frozen=True)
class Slices:
    """Inputs of ``shape`` (n, g·c, *i), of which positions of n, c and i are kept.

    Positions of dimension 1 are those of c, the channels of each of the ``groups``. The layer reads
    the input with ``pads`` in a ``mode`` around it.
    """

    shape: torch.Size
    groups: int = 1
    pads: tuple[tuple[int, int], ...] = ()
    mode: str = "zeros"

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many n, c and i there are to choose from."""
        samples, channels, *image = self.shape
        return samples, channels // self.groups, *image

    def of(self, x: Tensor, positions: Positions) -> Tensor:
        """``x[r]``, for the positions r of every dimension."""
        n, channels, *image = x.shape
        x = x.reshape(n, self.groups, channels // self.groups, *image)
        for dim, kept in positions.items():
            x = x.index_select(dim + (dim > 0), kept)
        return x.flatten(1, 2)

    def image(self, kept: Tensor, positions: Positions) -> Tensor:
        """What the layer reads: zeros but for the kept positions i, of the kept n and c."""
        for dim, r in positions.items():
            if dim > 1:
                shape = [*kept.shape[:dim], self.shape[dim], *kept.shape[dim + 1 :]]
                kept = kept.new_zeros(shape).index_add(dim, r, kept)
        return padded(kept, list(self.pads), self.mode) if any(map(any, self.pads)) else kept


@dataclass(frozen=True, eq=False)
class Sampled:
    """A layer whose weight gradient is ``scale`` times that of the kept slices of its input.

    The slices, and the positions of each of ``dims``, are its constants.
    """

    layer: Layer
    slices: Slices
    scale: float
    dims: tuple[int, ...]
    reads_input: ClassVar[bool] = False

    @property
    def dtype(self) -> torch.dtype | None:
        return self.layer.dtype

    @property
    def channel(self) -> int:
        return self.layer.channel

    def __call__(self, x: Tensor, w: Maybe, b: Maybe = None, *constants: Tensor) -> Tensor:
        return self.layer(x, w, b)

    def push(self, tangent_x: Tensor, w: Maybe, *constants: Tensor) -> Tensor:
        return self.layer.push(tangent_x, w)

    def pull(
        self, v: Tensor, x: Maybe, w: Maybe, shapes: Shapes, kept: Tensor, *positions: Tensor
    ) -> tuple[Maybe, Maybe]:
        dx = dw = None
        if shapes.needs[0]:
            dx, _ = self.layer.pull(v, None, w, replace(shapes, needs=(True, False)))
        if shapes.needs[1]:
            assert shapes.w is not None
            chosen = dict(zip(self.dims, positions, strict=True))
            dw = self.scale * self._weight_gradient(v, kept, shapes.w, chosen)
        return dx, dw

    def _weight_gradient(
        self, v: Tensor, kept: Tensor, shape: torch.Size, positions: Positions
    ) -> Tensor:
        """``Σ_{n,o,i} x[n, c, i] Π[k, o, i] v[n, d, o]`` over kept n and i; zero for other c."""
        if kept.numel() == 0 or v.numel() == 0:
            return v.new_zeros(shape)
        v = v.index_select(0, positions[0]) if 0 in positions else v
        if isinstance(self.layer, Linear):
            x, v = kept.movedim(1, -1).flatten(0, -2), v.flatten(0, -2)
        else:
            x = self.slices.image(kept, positions)
        if 1 not in positions:
            return self._pulled(self.layer, v, x, shape)
        channels = positions[1]
        if isinstance(self.layer, Convolution) and shape[1] == 1 < self.layer.groups:
            return self._of_groups(self.layer, v, x, shape, channels)
        small = torch.Size((shape[0], len(channels), *shape[2:]))
        dw = self._pulled(self.layer, v, x, small)
        return dw.new_zeros(shape).index_add(1, channels, dw)

    def _of_groups(
        self, layer: Convolution, v: Tensor, x: Tensor, shape: torch.Size, groups: Tensor
    ) -> Tensor:
        """Where every group has one channel, some groups by themselves."""
        outputs = shape[0] // layer.groups
        v = v.reshape(len(v), layer.groups, outputs, *v.shape[2:])
        v = v.index_select(1, groups).flatten(1, 2)
        small = torch.Size((v.shape[1], *shape[1:]))
        dw = self._pulled(replace(layer, groups=len(groups)), v, x, small)
        split = dw.reshape(len(groups), outputs, *shape[1:])
        zeros = dw.new_zeros(layer.groups, outputs, *shape[1:])
        return zeros.index_add(0, groups, split).reshape(shape)

    @staticmethod
    def _pulled(layer: Layer, v: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        _, dw = layer.pull(v, x, None, Shapes(x.shape, shape, v.shape, (False, True)))
        assert dw is not None
        return dw
