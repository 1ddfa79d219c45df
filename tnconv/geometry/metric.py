"""Metrics: what makes vectors of covectors, at one point of the parameters.

A metric G is positive definite; under ``ψ = φ(θ)`` it becomes ``J⁻ᵀ G J⁻¹``. Some are functions of
the network's function alone, such as the Gauss-Newton matrix: made anew at ``φ(θ)`` they have
changed like that by themselves, and are called *intrinsic*. Others, such as the identity or an
optimizer's running averages, are *extrinsic*: made anew they are another metric, so that they have
to be carried along (`Metric.pushforward`).
"""

from abc import ABC, abstractmethod
from math import log

import torch
from torch import Tensor

from tnconv.displays import matrix_over
from tnconv.geometry.points import Bilinear, Covector, Endomorphism, Point, Vector, sampled, size_of
from tnconv.geometry.reparametrization import Reparametrization

LARGEST_DENSE = 4096  # rows of matrices that are formed where nothing else is asked for


class Metric(ABC):
    """``G`` at a point whose parameters are like ``space``.

    The root R has ``R Rᵀ = G⁻¹``: it takes coordinates that no reparametrization changes, so that
    vectors ``R ε`` of equal draws ε are one vector, in whatever parameters.
    """

    intrinsic: bool = False
    degenerate: bool = False  # whether there are vectors of length zero
    batched: bool = False  # whether `torch.func.vmap` may run products
    space: Point

    def __repr__(self) -> str:
        return matrix_over(type(self).__name__, self.space)

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
        return Bilinear(self.product, self.space, self.batched)

    def raised(self, form: Bilinear) -> Endomorphism:
        """``G⁻¹ H`` of a bilinear form H."""
        return Endomorphism(lambda v: self.inverse_product(form(v)), self.space)

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
        """``G + G'``: see `Summed`; metrics that know better have sums of their own."""
        from tnconv.geometry.damped_metrics import Summed

        return Summed([self, other])

    def __mul__(self, factor: float) -> "Metric":
        return Scaled(self, factor)

    __rmul__ = __mul__


class Pushed(Metric):
    """A metric in the coordinates of ``ψ = φ(θ)``; degenerate where φ is no bijection."""

    def __init__(self, base: Metric, map: Reparametrization, theta: Point) -> None:
        self.base, self.map, self.theta = base, map, theta
        self.space = map.forward(theta)
        self.intrinsic, self.batched = base.intrinsic, base.batched
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
        self.space, self.intrinsic, self.batched = base.space, base.intrinsic, base.batched

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
