"""Metrics: what makes vectors of covectors, at one point of the parameters.

A metric G is positive definite; under ``ψ = φ(θ)`` it becomes ``J⁻ᵀ G J⁻¹``. Some are functions of
the network's function alone, such as the Gauss-Newton matrix: made anew at ``φ(θ)`` they have
changed like that by themselves, and are called *intrinsic*. Others, such as the identity or an
optimizer's running averages, are *extrinsic*: made anew they are another metric, so that they have
to be carried along (`Metric.pushforward`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from math import log

import torch
from torch import Tensor

from tnconv.geometry.points import Bilinear, Covector, Point, Vector, sampled, size_of, split
from tnconv.geometry.reparametrization import Reparametrization


class Metric(ABC):
    """``G`` at a point whose parameters are like ``space``.

    The root R has ``R Rᵀ = G⁻¹``: it takes coordinates that no reparametrization changes, so that
    vectors ``R ε`` of equal draws ε are one vector, in whatever parameters.
    """

    intrinsic: bool = False
    degenerate: bool = False  # whether there are vectors of length zero
    space: Point

    @abstractmethod
    def product(self, v: Vector) -> Covector:
        """``G v``."""

    @abstractmethod
    def inverse_product(self, u: Covector) -> Vector:
        """``G⁻¹ u``: of a gradient, the natural gradient."""

    @abstractmethod
    def root(self, coordinates: Tensor) -> Vector:
        """``R ε`` for flat coordinates ε."""

    @abstractmethod
    def root_transposed(self, u: Covector) -> Tensor:
        """``Rᵀ u``, flat."""

    @abstractmethod
    def logdet(self) -> Tensor:
        """``log det G``."""

    @property
    def size(self) -> int:
        """The number of coordinates."""
        return size_of(self.space)

    def norm(self, v: Vector) -> Tensor:
        """``√(vᵀ G v)``."""
        return (self.product(v) @ v).sqrt()

    def draws(self, count: int, generator: torch.Generator | None = None) -> list[Vector]:
        """Vectors ``R ε`` with covariance G⁻¹: probes whose draws no reparametrization changes."""
        return [self.root(sampled(self.space, generator)) for _ in range(count)]

    def form(self) -> Bilinear:
        """The metric as a bilinear form, to be added to others."""
        return Bilinear(self.product, self.space)

    def dense(self) -> Tensor:
        """The matrix, column by column."""
        return self.form().dense()

    def pushforward(self, map: Reparametrization, theta: Point) -> "Metric":
        """``J⁻ᵀ G J⁻¹`` at ``φ(θ)``, for a metric at θ."""
        return Pushed(self, map, theta)

    def pullback(self, map: Reparametrization, theta: Point) -> "Metric":
        """``Jᵀ G J`` at θ, for a metric at ``φ(θ)``."""
        return Pushed(self, map.inverted(), map.forward(theta))

    def __add__(self, other: "Metric") -> "Metric":
        return Summed([self, other])

    def __mul__(self, factor: float) -> "Metric":
        return Scaled(self, factor)

    __rmul__ = __mul__


class Pushed(Metric):
    """A metric in the coordinates of ``ψ = φ(θ)``; degenerate where φ is no bijection."""

    def __init__(self, base: Metric, map: Reparametrization, theta: Point) -> None:
        self.base, self.map, self.theta = base, map, theta
        self.space = map.forward(theta)
        self.intrinsic = base.intrinsic
        self.degenerate = base.degenerate or not map.bijective

    def product(self, v: Vector) -> Covector:
        before = self.base.product(self.map.inverse_jvp(self.space, v))
        return self.map.inverse_vjp(self.space, before)

    def inverse_product(self, u: Covector) -> Vector:
        return self._up(self.base.inverse_product(self._down(u)))

    def root(self, coordinates: Tensor) -> Vector:
        return self._up(self.base.root(coordinates))

    def root_transposed(self, u: Covector) -> Tensor:
        return self.base.root_transposed(self._down(u))

    def logdet(self) -> Tensor:
        return self.base.logdet() - 2 * self.map.log_abs_det(self.theta)

    @property
    def size(self) -> int:
        return self.base.size

    def draws(self, count: int, generator: torch.Generator | None = None) -> list[Vector]:
        return [self._up(v) for v in self.base.draws(count, generator)]

    def _up(self, v: Vector) -> Vector:
        return self.map.jvp(self.theta, v)

    def _down(self, u: Covector) -> Covector:
        return self.map.vjp(self.theta, u)


class Scaled(Metric):
    """``a G`` for a number a > 0."""

    def __init__(self, base: Metric, factor: float) -> None:
        if not factor > 0:
            raise ValueError(f"the factor of a metric is {factor!r}; expected a positive number")
        self.base, self.factor = base, factor
        self.space, self.intrinsic = base.space, base.intrinsic

    def product(self, v: Vector) -> Covector:
        return self.factor * self.base.product(v)

    def inverse_product(self, u: Covector) -> Vector:
        return (1 / self.factor) * self.base.inverse_product(u)

    def root(self, coordinates: Tensor) -> Vector:
        return float(self.factor**-0.5) * self.base.root(coordinates)

    def root_transposed(self, u: Covector) -> Tensor:
        return float(self.factor**-0.5) * self.base.root_transposed(u)

    def logdet(self) -> Tensor:
        return self.base.logdet() + self.size * log(self.factor)


class Dense(Metric):
    """A matrix, decomposed once: sums, and small networks.

    Raises:
        ValueError: a matrix that is not positive definite.
    """

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
        return Covector(split(self.matrix @ v.flat(), self.space))

    def inverse_product(self, u: Covector) -> Vector:
        solved = torch.cholesky_solve(u.flat()[:, None], self._factor)[:, 0]
        return Vector(split(solved, self.space))

    def root(self, coordinates: Tensor) -> Vector:
        solved = torch.linalg.solve_triangular(self._factor.mT, coordinates[:, None], upper=True)
        return Vector(split(solved[:, 0], self.space))

    def root_transposed(self, u: Covector) -> Tensor:
        given = u.flat()[:, None]
        found: Tensor = torch.linalg.solve_triangular(self._factor, given, upper=False)[:, 0]
        return found

    def logdet(self) -> Tensor:
        return 2 * self._factor.diagonal().log().sum()

    def dense(self) -> Tensor:
        return self.matrix


LARGEST_DENSE = 4096


class Summed(Metric):
    """``Σ_i G_i``: products are sums; what needs an inverse is done densely, in small networks.

    Its root is a Cholesky factor, which depends on the coordinates. Where estimates shall not, the
    sum is to be carried along (`Metric.pushforward`), not its parts added up anew.
    """

    def __init__(self, parts: Sequence[Metric]) -> None:
        self.parts, self.space = parts, parts[0].space
        self.intrinsic = all(part.intrinsic for part in parts)
        shapes = [{name: tuple(p.shape) for name, p in part.space.items()} for part in parts]
        if any(each != shapes[0] for each in shapes):
            raise ValueError("the metrics are over different parameters; expected equal ones")

    def product(self, v: Vector) -> Covector:
        first, *others = (part.product(v) for part in self.parts)
        for each in others:
            first = first + each
        return first

    def inverse_product(self, u: Covector) -> Vector:
        return self._dense.inverse_product(u)

    def root(self, coordinates: Tensor) -> Vector:
        return self._dense.root(coordinates)

    def root_transposed(self, u: Covector) -> Tensor:
        return self._dense.root_transposed(u)

    def logdet(self) -> Tensor:
        return self._dense.logdet()

    @cached_property
    def _dense(self) -> Dense:
        if self.size > LARGEST_DENSE:
            raise NotImplementedError(
                f"the sum of metrics over {self.size} entries has no inverse that is not dense; "
                f"expected at most {LARGEST_DENSE}, or a metric with a damping of its own"
            )
        return Dense(torch.stack([part.dense() for part in self.parts]).sum(0), self.space)


class BlockDiagonal(Metric):
    """Metrics of disjoint parameters, together one of all.

    Raises:
        ValueError: parameters that are in several.
    """

    def __init__(self, blocks: Sequence[Metric]) -> None:
        self.blocks, self.intrinsic = blocks, all(block.intrinsic for block in blocks)
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
