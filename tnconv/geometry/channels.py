"""Where the channels of linear layers and convolutions are in their weights."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from tnconv.models.layers import layout

Side = Literal["outgoing", "incoming"]


@dataclass(frozen=True)
class Channels:
    """The outgoing or incoming channels of a named layer, in the order of its activations.

    A weight is ``(g·d, c, *k)``, or transposed ``(g·c, d, *k)``: its first dimension has the
    channels of all groups, its second those of one.

    Raises:
        ValueError: a layer that is neither linear nor a convolution.
    """

    model: nn.Module
    layer: str
    side: Side

    @property
    def weight(self) -> nn.Parameter:
        return self.model.get_parameter(f"{self.layer}.weight")

    @property
    def bias(self) -> Tensor | None:
        found: Tensor | None = getattr(self.model.get_submodule(self.layer), "bias", None)
        return found

    @cached_property
    def _layout(self) -> tuple[int, bool]:
        found = layout(self.model.get_submodule(self.layer), "weight")
        if found is None:
            kind = type(self.model.get_submodule(self.layer)).__name__
            raise ValueError(
                f"layer {self.layer!r} is a {kind}; expected a linear layer or a convolution"
            )
        return found

    @property
    def groups(self) -> int:
        return self._layout[0]

    @property
    def dim(self) -> int:
        """The dimension of the weight that they are in."""
        return int((self.side == "outgoing") == self._layout[1])

    @property
    def count(self) -> int:
        """The number of channels, of all groups."""
        return int(self.weight.shape[self.dim]) * (self.groups if self.dim == 1 else 1)

    def along(self, a: Tensor) -> Tensor:
        """One factor per channel, in the shape of the weight."""
        first, second, *kernel = self.weight.shape
        if self.dim == 0:
            each = a.reshape(first, 1).expand(first, second)
        else:
            by_group = a.reshape(self.groups, 1, second)
            each = by_group.expand(self.groups, first // self.groups, second)
        return each.reshape(first, second, *[1] * len(kernel)).expand(self.weight.shape)

    def ordered(self, order: Tensor) -> tuple[int, Tensor]:
        """A dimension of the weight and positions along it, where channel c is ``order[c]`` before.

        Raises:
            ValueError: an order that leaves a group.
        """
        size = self.count // self.groups
        if bool((order // size != torch.arange(self.count) // size).any()):
            raise ValueError(
                f"layer {self.layer!r} has groups of {size} {self.side} channels; expected an "
                "order of each group's own"
            )
        if self.dim == 0 or self.groups == 1:
            return self.dim, order
        first, second, *kernel = self.weight.shape
        own = (order % size).reshape(self.groups, 1, second)
        every = own.expand(self.groups, first // self.groups, second).reshape(first, second)
        return 1, every.reshape(first, second, *[1] * len(kernel))
