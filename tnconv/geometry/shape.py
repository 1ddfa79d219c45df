"""``E = G⁻¹ H``: curvature as an endomorphism, whose eigenvalues no reparametrization changes.

All of it goes through ``Rᵀ H R`` with ``R Rᵀ = G⁻¹``, a symmetric matrix in coordinates that no
reparametrization changes: equal draws there make every stochastic estimate the same number in all
parameters, not only its mean.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tnconv.displays import matrix_over, shown_tuple
from tnconv.geometry.damped_metrics import Estimate, expect_metric, expect_positive
from tnconv.geometry.metric import LARGEST_DENSE, Metric
from tnconv.geometry.points import Bilinear, Covector, Endomorphism, Vector, sampled, split
from tnconv.operators.krylov import extreme_eigenvalue, lanczos


class Density(NamedTuple):
    """A spectral density: ``Σ_k weights[k] δ(λ - values[k])``, with weights that sum to one."""

    values: Tensor
    weights: Tensor

    def __repr__(self) -> str:
        return shown_tuple(self)

    def smoothed(self, at: Tensor, width: float) -> Tensor:
        """With normal distributions of a width in the place of points, at some values."""
        scaled = (at[:, None] - self.values) / width
        bumps: Tensor = torch.exp(-(scaled**2) / 2) / (width * (2 * torch.pi) ** 0.5)
        return bumps @ self.weights


class ShapeOperator:
    """``G⁻¹ H`` of a bilinear form and a metric at one point.

    >>> from tnconv.geometry import Covector, Diagonal
    >>> form = Bilinear(lambda v: Covector(v.parts), {"w": torch.ones(2)})
    >>> shape = ShapeOperator(form, Diagonal({"w": torch.tensor([1.0, 4.0])}))
    >>> shape.eigenvalues()
    tensor([0.2500, 1.0000])

    Args:
        form: H, such as a Hessian.
        metric: G, with a root.

    Raises:
        TypeError: a number in the place of a metric.
    """

    def __init__(self, form: Bilinear, metric: Metric) -> None:
        expect_metric("metric", metric)
        self.form, self.metric = form, metric

    def __repr__(self) -> str:
        return matrix_over("ShapeOperator", self.metric.space)

    @property
    def endomorphism(self) -> Endomorphism:
        """``v -> G⁻¹ H v``, which `Reparametrization.transport` carries along."""
        return self.metric.raised(self.form)

    def __call__(self, v: Vector) -> Vector:
        """``G⁻¹ H v``."""
        return self.metric.inverse_product(self.form(v))

    def trace(
        self, probes: int | list[Vector] = 10, generator: torch.Generator | None = None
    ) -> Tensor:
        """``E zᵀ H z = tr(G⁻¹ H)`` for z with covariance G⁻¹: the mean over probes.

        Args:
            probes: how many are drawn (`Metric.draws`), or the vectors.
            generator: where they are drawn.
        """
        vectors = self.metric.draws(probes, generator) if isinstance(probes, int) else probes
        if not vectors:
            raise ValueError("there are no probes; expected one or more")
        return torch.stack([self.form(z) @ z for z in vectors]).mean()

    def eigenvalues(self, k: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """All eigenvalues in ascending order (densely), or the k of largest magnitude.

        Of a degenerate metric (carried along a submersion) there are those of its range.
        """
        if k is None and self.metric.degenerate:
            return self._in_range()
        if k is None:
            return _eigenvalues(self._dense())
        start = sampled(self.metric.space, generator)[: self.metric.size]
        count = min(len(start), max(4 * k, k + 30))
        found = lanczos(self.coordinates, start, count).values.to(start)
        return found[found.abs().argsort(descending=True)[:k]].sort().values

    def max_eigenvalue(
        self, tolerance: float = 1e-6, generator: torch.Generator | None = None
    ) -> Tensor:
        """The largest eigenvalue, to a tolerance relative to the largest magnitude."""
        start = sampled(self.metric.space, generator)[: self.metric.size]
        found = extreme_eigenvalue(self.coordinates, start, "largest", tolerance)
        return found.values.to(start)

    def logdet(self, damping: Metric | None = None, estimate: Estimate | None = None) -> Tensor:
        """``log det(G⁻¹ (H + D))`` for a damping metric D.

        Args:
            damping: D.
            estimate: how it is estimated; by default exactly, for few parameters.

        Raises:
            TypeError: a number for D: it would mean the identity of these parameters.
            ValueError: a form that is not positive definite, a degenerate metric, or too many
                parameters.
        """
        form = self.form
        if damping is not None:
            expect_metric("damping", damping)
            form = form + damping.form()
        if self.metric.degenerate:
            raise ValueError(
                "the metric is carried along a map that is no bijection: the whole form has no "
                "determinant; expected eigenvalues(), those of the metric's range"
            )
        shape = ShapeOperator(form, self.metric)
        if estimate is not None:
            return estimate.log_determinant(self.metric, shape.coordinates)
        return expect_positive(_eigenvalues(shape._dense())).log().sum()

    def spectral_density(
        self, steps: int = 50, probes: int = 5, generator: torch.Generator | None = None
    ) -> Density:
        """The density of eigenvalues by stochastic Lanczos quadrature.

        Args:
            steps: of Lanczos.
            probes: how many start vectors it is the mean over.
            generator: where they are drawn.
        """
        values, weights = [], []
        for _ in range(probes):
            start = sampled(self.metric.space, generator)[: self.metric.size]
            found = lanczos(self.coordinates, start, steps)
            values.append(found.values)
            weights.append(found.weights / probes)
        return Density(torch.cat(values), torch.cat(weights))

    def coordinates(self, flat: Tensor) -> Tensor:
        """``Rᵀ H R ε``."""
        return self.metric.root_transposed(self.form(self.metric.root(flat)))

    def _in_range(self) -> Tensor:
        """Eigenvalues of ``H w = λ G w`` for w in the range of G."""
        values, vectors = torch.linalg.eigh(self.metric.dense())
        kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        roots = vectors[:, kept] / values[kept].sqrt()
        found = roots.mT @ self.form.dense() @ roots
        return _eigenvalues((found + found.mT) / 2)

    def _dense(self) -> Tensor:
        """``Rᵀ H R``: the root's transpose on the columns of H, and on the rows of that."""
        if self.metric.size > LARGEST_DENSE:
            raise ValueError(
                f"the matrix has {self.metric.size} rows; expected at most {LARGEST_DENSE}, or k "
                "eigenvalues, spectral_density, or a logdet with estimate=Estimate()"
            )
        half = self._turned(self.form.dense())
        found = self._turned(half.mT)
        return (found + found.mT) / 2

    def _turned(self, columns: Tensor) -> Tensor:
        """``Rᵀ U`` for covectors as columns."""
        space = self.form.space
        turned = (self.metric.root_transposed(Covector(split(u, space))) for u in columns.unbind(1))
        return torch.stack(list(turned), 1)


def _eigenvalues(matrix: Tensor) -> Tensor:
    found: Tensor = torch.linalg.eigvalsh(matrix)
    return found
