"""Parameters as matrices of their layers, and metrics that take each parameter by itself."""

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tnconv.geometry.metric import Metric
from tnconv.geometry.points import Covector, Point, Vector, split
from tnconv.models.layers import layout
from tnconv.optim.blocks import Block


class Rows:
    """Parameters as matrices ``W[g, d, a]``: groups, outgoing channels, incoming ones and taps.

    Args:
        space: the parameters.
        model: whose layers say how a weight is a matrix; by default rows are its first dimension.
        groups: of parameters with one dimension, by name; one by default.
    """

    def __init__(
        self,
        space: Point,
        model: nn.Module | None = None,
        groups: Mapping[str, int] | None = None,
    ) -> None:
        self.blocks: dict[str, Block] = {}
        self.groups = groups or {}
        for name, part in space.items():
            if part.dim() < 2:
                continue
            parameter = nn.Parameter(torch.empty_like(part, device="meta"))
            found = None
            if model is not None:
                owner, _, key = name.rpartition(".")
                found = layout(model.get_submodule(owner), key)
            self.blocks[name] = Block(name, parameter, None, found or (1, False))

    def of(self, name: str, part: Tensor) -> Tensor:
        block = self.blocks.get(name)
        if block is None:
            return part.reshape(self.groups.get(name, 1), -1, 1)
        return block.rows({block.key: part})

    def back(self, name: str, rows: Tensor) -> Tensor:
        block = self.blocks.get(name)
        return rows.flatten() if block is None else next(iter(block.tensors(rows).values()))


class Blockwise(Metric):
    """What metrics share that take every parameter by itself, as a matrix."""

    rows: Rows
    batched = True

    def product(self, v: Vector) -> Covector:
        return Covector(self._each(v.parts, self._times))

    def inverse_product(self, u: Covector) -> Vector:
        return Vector(self._each(u.parts, self._solved))

    def root(self, coordinates: Tensor) -> Vector:
        return Vector(self._each(split(coordinates, self.space), self._rooted))

    def root_transposed(self, u: Covector) -> Tensor:
        found = self._each({name: u.parts[name] for name in self.space}, self._unrooted)
        return torch.cat([part.reshape(-1) for part in found.values()])

    def _each(self, parts: Point, function: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
        return {
            name: self.rows.back(name, function(name, self.rows.of(name, part)))
            for name, part in parts.items()
        }

    @abstractmethod
    def _times(self, name: str, w: Tensor) -> Tensor:
        """``G W`` of one parameter."""

    @abstractmethod
    def _solved(self, name: str, w: Tensor) -> Tensor:
        """``G⁻¹ W`` of one parameter."""

    @abstractmethod
    def _rooted(self, name: str, w: Tensor) -> Tensor:
        """``R W`` of one parameter."""

    @abstractmethod
    def _unrooted(self, name: str, w: Tensor) -> Tensor:
        """``Rᵀ W`` of one parameter."""
