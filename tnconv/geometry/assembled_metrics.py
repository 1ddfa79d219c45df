"""Metrics that are matrices, and those of disjoint parameters put together."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from tnconv.geometry.metric import Metric
from tnconv.geometry.points import Covector, Point, Vector, split


class Dense(Metric):
    """A matrix, decomposed once: sums, and small networks.

    Raises:
        ValueError: a matrix that is not positive definite.
    """

    batched = True

    def __init__(self, matrix: Tensor, space: Point, intrinsic: bool = False) -> None:
        self.matrix, self.space, self.intrinsic = matrix, space, intrinsic

    @cached_property
    def _factor(self) -> Tensor:
        found: Tensor
        found, info = torch.linalg.cholesky_ex((self.matrix + self.matrix.mT) / 2)
        if int(info):
            raise ValueError("the metric is not positive definite; expected one, or a damping")
        return found

    def product(self, v: Vector) -> Covector:
        return Covector(split(self.matrix @ v.flat(self.space), self.space))

    def inverse_product(self, u: Covector) -> Vector:
        solved = torch.cholesky_solve(u.flat(self.space)[:, None], self._factor)[:, 0]
        return Vector(split(solved, self.space))

    def root(self, coordinates: Tensor) -> Vector:
        solved = torch.linalg.solve_triangular(self._factor.mT, coordinates[:, None], upper=True)
        return Vector(split(solved[:, 0], self.space))

    def root_transposed(self, u: Covector) -> Tensor:
        given = u.flat(self.space)[:, None]
        found: Tensor = torch.linalg.solve_triangular(self._factor, given, upper=False)[:, 0]
        return found

    def logdet(self) -> Tensor:
        return 2 * self._factor.diagonal().log().sum()

    def dense(self) -> Tensor:
        return self.matrix


class BlockDiagonal(Metric):
    """Metrics of disjoint parameters, together one of all.

    Raises:
        ValueError: parameters that are in several.
    """

    def __init__(self, blocks: Sequence[Metric]) -> None:
        self.blocks, self.intrinsic = blocks, all(block.intrinsic for block in blocks)
        self.batched = all(block.batched for block in blocks)
        names = [name for block in blocks for name in block.space]
        if len(set(names)) < len(names):
            raise ValueError("a parameter is in several blocks; expected disjoint ones")
        self.space = {name: part for block in blocks for name, part in block.space.items()}

    def product(self, v: Vector) -> Covector:
        parts = [block.product(Vector(self._own(block, v.parts))).parts for block in self.blocks]
        return Covector(self._joined(parts, v.parts))

    def inverse_product(self, u: Covector) -> Vector:
        parts = [b.inverse_product(Covector(self._own(b, u.parts))).parts for b in self.blocks]
        return Vector(self._joined(parts, u.parts))

    def root(self, coordinates: Tensor) -> Vector:
        given = torch.split(coordinates, [block.size for block in self.blocks])
        pairs = zip(self.blocks, given, strict=True)
        return Vector(self._joined([block.root(each).parts for block, each in pairs], self.space))

    def root_transposed(self, u: Covector) -> Tensor:
        parts = [b.root_transposed(Covector(self._own(b, u.parts))) for b in self.blocks]
        return torch.cat(parts)

    def logdet(self) -> Tensor:
        return torch.stack([block.logdet() for block in self.blocks]).sum()

    @staticmethod
    def _own(block: Metric, parts: Point) -> Point:
        return {name: parts[name] for name in block.space}

    @staticmethod
    def _joined(parts: Sequence[Point], like: Point) -> dict[str, Tensor]:
        every = {name: part for each in parts for name, part in each.items()}
        return {name: every[name] for name in like}
