"""Metrics as functions of the point, and what their change adds to second derivatives.

``Hess[i, j] = ∂_i ∂_j L - Σ_k Γ^k_ij ∂_k L`` with the Christoffel symbols of the metric's
Levi-Civita connection. With ``n = G⁻¹ ∂L`` held fixed,

    ``Σ_jk Γ^k_ij v_j ∂_k L = ½ [∂_i (vᵀ G n) + (D_v G) n - (D_n G) v]_i``,

three passes of automatic differentiation through ``G v``, and no tensor with three indices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tnconv.geometry.diagonal_metrics import Euclidean
from tnconv.geometry.metric import Metric
from tnconv.geometry.points import Covector, Point, Vector
from tnconv.geometry.reparametrization import Reparametrization

MetricField = Callable[[Point], Metric]
"""From a point to the metric there, differentiable by ``torch.func``."""


@dataclass(frozen=True)
class Constant:
    """One metric at all points: the identity, or a given one."""

    metric: Metric | None = None
    constant: ClassVar[bool] = True

    def __call__(self, theta: Point) -> Metric:
        return Euclidean(theta) if self.metric is None else self.metric


@dataclass(frozen=True)
class PushedField:
    """A field in the coordinates of ``ψ = φ(θ)``: constant if it was, and φ is linear."""

    field: MetricField
    map: Reparametrization

    def __call__(self, psi: Point) -> Metric:
        theta = self.map.inverse(psi)
        return self.field(theta).pushforward(self.map, theta)

    @property
    def constant(self) -> bool:
        return self.map.linear and is_constant(self.field)


euclidean = Constant()
"""The identity everywhere."""


def pushed(field: MetricField, map: Reparametrization) -> MetricField:
    """A field of metrics in the coordinates of ``ψ = φ(θ)``."""
    return PushedField(field, map)


def is_constant(field: MetricField) -> bool:
    """Whether a field says that it has one matrix everywhere: then its connection vanishes."""
    return bool(getattr(field, "constant", False))


def christoffel_term(
    field: MetricField, theta: Point, slope: Covector
) -> Callable[[Vector], Covector]:
    """``v -> Σ_jk Γ^k_ij v_j u_k`` for a covector u, such as the gradient.

    The first of the three passes is shared by all v.
    """
    at = dict(theta)
    n = field(theta).inverse_product(slope)

    def lowered(point: dict[str, Tensor]) -> dict[str, Tensor]:
        return field(point).product(n).ordered(at)

    pull = torch.func.vjp(lowered, at)[1]

    def term(v: Vector) -> Covector:
        def other(point: dict[str, Tensor]) -> dict[str, Tensor]:
            return field(point).product(v).ordered(at)

        (along,) = pull(v.ordered(at))
        first = torch.func.jvp(lowered, (at,), (v.ordered(at),))[1]
        second = torch.func.jvp(other, (at,), (n.ordered(at),))[1]
        return 0.5 * (Covector(along) + Covector(first) - Covector(second))

    return term
