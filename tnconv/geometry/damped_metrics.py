"""Metrics ``C + D``: a curvature C, seen through products, and a metric D that damps it.

Everything goes through ``M = Rᵀ C R`` with D's root, ``R Rᵀ = D⁻¹``: the inverse of the sum is
``R (1 + M)⁻¹ Rᵀ``, its log-determinant ``log det D + log det(1 + M)``, a root of it
``R (1 + M)^-½``. M is in coordinates that no reparametrization changes, as long as D is carried
along: then Krylov spaces, roots and random draws are the same in all parameters, too.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tnconv.geometry.metric import LARGEST_DENSE, Metric
from tnconv.geometry.points import Bilinear, Covector, Vector
from tnconv.operators.krylov import (
    Function,
    conjugate_gradients,
    matrix_function,
    quadrature,
    signs,
)


@dataclass(frozen=True)
class Estimate:
    """How a log-determinant is estimated: stochastic Lanczos quadrature.

    Every probe, a vector of random signs, takes ``steps`` products. The draws come from ``seed``,
    so that two calls, and other parameters, see the same. Source: Ubaru, Chen & Saad 2017.

    Args:
        probes: how many; their mean is the estimate.
        steps: of Lanczos for each.
        seed: of the signs.
    """

    probes: int = 10
    steps: int = 50
    seed: int = 0

    def log_determinant(self, metric: Metric, product: "Function", shift: float = 0.0) -> Tensor:
        """``log det(shift + M)`` in the coordinates of a metric's root, for a product with M.

        Raises:
            ValueError: a matrix that is found to have eigenvalues that are not positive.
        """
        like = next(iter(metric.space.values()))
        generator = torch.Generator(like.device).manual_seed(self.seed)
        starts = (signs(1, metric.size, like, generator)[0] for _ in range(self.probes))

        def logarithm(values: Tensor) -> Tensor:
            return expect_positive(values + shift).log()

        return quadrature(product, starts, logarithm, self.steps).mean()


def expect_positive(values: Tensor) -> Tensor:
    """Eigenvalues in ascending order, if they are positive.

    Raises:
        ValueError: they are not.
    """
    if not bool((values > 0).all()):
        raise ValueError(
            f"the smallest eigenvalue is {float(values.min()):.2e}; expected a positive definite "
            "form: a minimum, a Gauss-Newton matrix, or a larger damping"
        )
    return values


class Damped(Metric):
    """``C + D``, by functions of ``1 + M``, ``M = Rᵀ C R``, that subclasses know how to apply.

    Args:
        form: C, symmetric; with D positive definite.
        damping: D.
        intrinsic: whether C changes as a metric does where it is made anew.

    Raises:
        TypeError: a number for D: it would mean the identity of these parameters.
    """

    def __init__(self, form: Bilinear, damping: Metric, intrinsic: bool = True) -> None:
        expect_metric("damping", damping)
        self.form_alone, self.damping = form, damping
        self.space = {name: damping.space[name] for name in form.space}
        self.intrinsic = intrinsic and damping.intrinsic
        self.degenerate = damping.degenerate
        self.batched = form.batched and damping.batched

    @property
    def size(self) -> int:
        return self.damping.size

    def product(self, v: Vector) -> Covector:
        return self.form_alone(v) + self.damping.product(v)

    def inverse_product(self, u: Covector) -> Vector:
        return self.damping.root(self._applied(torch.reciprocal, self.damping.root_transposed(u)))

    def root(self, coordinates: Tensor) -> Vector:
        return self.damping.root(self._applied(torch.rsqrt, coordinates))

    def root_transposed(self, u: Covector) -> Tensor:
        return self._applied(torch.rsqrt, self.damping.root_transposed(u))

    def logdet(self) -> Tensor:
        return self.damping.logdet() + self.relative_logdet()

    @abstractmethod
    def relative_logdet(self) -> Tensor:
        """``log det(D⁻¹ (C + D)) = log det(1 + M)``: what C adds, a number in all parameters."""

    @abstractmethod
    def _applied(self, function: Function, flat: Tensor) -> Tensor:
        """``f(1 + M) ε``."""

    def _times(self, flat: Tensor) -> Tensor:
        """``M ε``."""
        return self.damping.root_transposed(self.form_alone(self.damping.root(flat)))


def expect_metric(name: str, given: object) -> None:
    """Raise unless an argument is a metric.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(given, Metric):
        raise TypeError(
            f"{name} is a {type(given).__name__}; expected a Metric, such as "
            "1e-3 * Euclidean(theta), which is carried along with the parameters"
        )


class Implicit(Damped):
    """``C + D`` by products with C alone: conjugate gradients, Lanczos, and Lanczos quadrature.

    Inverse products are conjugate gradients, preconditioned by D. Roots are in the Krylov space
    of their argument, which is held: as many vectors as there are steps.

    Args:
        form: C, such as `form_of` a `tnconv.GGNOperator`.
        damping: D, which must have a root.
        tolerance: of ``(1 + M) x = b``, the residual's norm relative to that of b.
        steps: of conjugate gradients or Lanczos at most.
        estimate: how the determinant is found; by default exactly, for few parameters.
        intrinsic: whether C changes as a metric does where it is made anew.

    >>> from tnconv.geometry import Euclidean
    >>> space = {"w": torch.zeros(3)}
    >>> form = Bilinear(lambda v: Covector({"w": 3.0 * v.parts["w"]}), space)
    >>> metric = Implicit(form, 1.0 * Euclidean(space))
    >>> metric.root(torch.ones(3)).parts["w"]
    tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(
        self,
        form: Bilinear,
        damping: Metric,
        tolerance: float = 1e-10,
        steps: int = 1000,
        estimate: Estimate | None = None,
        intrinsic: bool = True,
    ) -> None:
        super().__init__(form, damping, intrinsic)
        self.tolerance, self.steps, self.estimate = tolerance, steps, estimate

    def inverse_product(self, u: Covector) -> Vector:
        right = self.damping.root_transposed(u)
        how = self._tolerance(right), self.steps
        found, left = conjugate_gradients(lambda x: self._times(x) + x, right, *how)
        self._expect_small(left, right)
        return self.damping.root(found)

    def relative_logdet(self) -> Tensor:
        if self.estimate is not None:
            return self.estimate.log_determinant(self.damping, self._times, 1.0)
        if self.size > LARGEST_DENSE:
            raise ValueError(
                f"the matrix has {self.size} rows; expected at most {LARGEST_DENSE}, or "
                "estimate=Estimate(probes=10)"
            )
        eye = torch.eye(self.size).to(next(iter(self.space.values())))
        matrix = torch.stack([self._times(row) for row in eye], 1)
        return expect_positive(1 + torch.linalg.eigvalsh((matrix + matrix.mT) / 2)).log().sum()

    def _applied(self, function: Function, flat: Tensor) -> Tensor:
        how = self._tolerance(flat), self.steps
        found, left = matrix_function(lambda x: self._times(x) + x, flat, function, *how)
        self._expect_small(left, flat)
        return found

    def _tolerance(self, like: Tensor) -> float:
        """What was asked for, but not below what the dtype can show."""
        return max(self.tolerance, 10 * torch.finfo(like.dtype).eps)

    def _expect_small(self, left: float, like: Tensor) -> None:
        if not left <= 100 * self._tolerance(like):
            raise RuntimeError(
                f"a residual of {left:.1e} is left after at most {self.steps} steps; expected more "
                "steps, a larger damping or tolerance, a positive definite form"
            )


class Summed(Implicit):
    """``Σ_i G_i``, by products: the last part is the one whose root is used.

    It should be carried along with the others (`Metric.pushforward` of each, or of the sum): then
    every estimate is one number in all parameters.

    Args:
        parts: two metrics or more, over equal parameters.
        tolerance: of inverse products: the residual's norm over that of the right-hand side.
        steps: of conjugate gradients or Lanczos at most.
        estimate: how the determinant is found; by default exactly, for few parameters.

    Raises:
        ValueError: parts over different parameters.
    """

    def __init__(
        self,
        parts: Sequence[Metric],
        tolerance: float = 1e-10,
        steps: int = 1000,
        estimate: Estimate | None = None,
    ) -> None:
        for part in parts:
            expect_metric("a part", part)
        shapes = [{name: tuple(p.shape) for name, p in part.space.items()} for part in parts]
        if len(parts) < 2 or any(each != shapes[0] for each in shapes):
            raise ValueError("the metrics are over different parameters; expected equal ones")
        self.parts = tuple(parts)
        form = parts[0].form()
        for part in parts[1:-1]:
            form = form + part.form()
        intrinsic = all(part.intrinsic for part in parts)
        super().__init__(form, parts[-1], tolerance, steps, estimate, intrinsic)
