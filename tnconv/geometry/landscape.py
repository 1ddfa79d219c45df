"""A loss, a point and a metric: the same landscape in any coordinates."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tnconv.displays import Shown
from tnconv.geometry.fields import MetricField, christoffel_term, euclidean, is_constant, pushed
from tnconv.geometry.metric import Metric
from tnconv.geometry.network_forms import (
    Batches,
    form_of,
    network_gradient,
    network_loss,
    points_of,
)
from tnconv.geometry.points import Bilinear, Covector, Point, Vector
from tnconv.geometry.reparametrization import Reparametrization
from tnconv.models.propagation import LossFunction
from tnconv.operators.curvature_operators import HessianOperator

Kind = Literal["calculus", "covariant"]
Loss = Callable[[Point], Tensor]


@dataclass(frozen=True, repr=False)
class Landscape(Shown):
    """A loss as a function of parameters by name, a point, and a field of metrics.

    >>> landscape = Landscape(lambda theta: (theta["w"] ** 2).sum(), {"w": torch.ones(2)})
    >>> landscape.natural_gradient().parts["w"]
    tensor([2., 2.])
    """

    loss: Loss
    theta: Point
    field: MetricField = euclidean

    @property
    def metric(self) -> Metric:
        """The metric at the point."""
        return self.field(self.theta)

    @property
    def gradient(self) -> Covector:
        """``∂L/∂θ``."""
        return Covector(torch.func.grad(self.loss)(dict(self.theta)))

    def natural_gradient(self) -> Vector:
        """``G⁻¹ ∂L/∂θ``: the direction of steepest ascent."""
        return self.metric.inverse_product(self.gradient)

    def reparametrized(self, map: Reparametrization) -> "Landscape":
        """``L ∘ φ⁻¹`` at ``φ(θ)``, with the metric carried along.

        Raises:
            ValueError: a point at which the map is not finite.
        """
        psi = map.forward(self.theta)
        if not all(bool(part.isfinite().all()) for part in psi.values()):
            raise ValueError(f"{type(map).__name__} is not finite at the point")
        return Landscape(lambda point: self.loss(map.inverse(point)), psi, pushed(self.field, map))

    def hessian(self, kind: Kind = "covariant") -> Bilinear:
        """``∂_i ∂_j L`` ("calculus"), or ``∂_i ∂_j L - Σ_k Γ^k_ij ∂_k L`` ("covariant").

        Both are one where the gradient vanishes, or where the metric is constant; elsewhere only
        the covariant one is the same object in all coordinates.

        Raises:
            ValueError: an unknown kind.
        """
        _expect_kind(kind)
        slope, pull, *_ = torch.func.vjp(torch.func.grad(self.loss), dict(self.theta))
        if kind == "calculus" or is_constant(self.field):
            return Bilinear(
                lambda v: Covector(pull(v.ordered(self.theta))[0]), self.theta, batched=True
            )
        term = christoffel_term(self.field, self.theta, Covector(slope))
        batched = self.metric.batched
        return Bilinear(
            lambda v: Covector(pull(v.ordered(self.theta))[0]) - term(v), self.theta, batched
        )


def model_landscape(
    model: nn.Module, loss_fn: LossFunction, batches: Batches, field: MetricField = euclidean
) -> Landscape:
    """The landscape of a model's loss over all batches, at its parameters that learn.

    Args:
        model: the network.
        loss_fn: the loss.
        batches: pairs of inputs and targets, taken as one batch.
        field: the metrics.

    >>> batch = torch.rand(8, 3), torch.randint(2, (8,))
    >>> found = model_landscape(nn.Linear(3, 2), nn.CrossEntropyLoss(), [batch])
    >>> found.gradient.parts["weight"].shape
    torch.Size([2, 3])
    """
    return Landscape(network_loss(model, loss_fn, batches), points_of(model), field)


def hessian(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    kind: Kind = "calculus",
    field: MetricField = euclidean,
) -> Bilinear:
    """The Hessian of a network's loss over all batches, by products: `tnconv.HessianOperator`.

    Args:
        model: the network.
        loss_fn: the loss.
        batches: pairs of inputs and targets, taken as one batch.
        kind: "calculus", or "covariant": less the Christoffel term of the field along the gradient,
            which vanishes where the metric is constant. See `Landscape.hessian`.
        field: the metrics, for "covariant".

    >>> batch = torch.rand(8, 3), torch.randint(2, (8,))
    >>> hessian(nn.Linear(3, 2), nn.CrossEntropyLoss(), [batch]).dense().shape
    torch.Size([8, 8])

    Raises:
        ValueError: an unknown kind.
    """
    _expect_kind(kind)
    found = form_of(HessianOperator(model, loss_fn, batches))
    if kind == "calculus" or is_constant(field):
        return found
    slope = network_gradient(model, loss_fn, batches)
    term = christoffel_term(field, points_of(model), slope)
    return Bilinear(lambda v: found(v) - term(v), found.space)


def _expect_kind(kind: str) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}; expected 'calculus' or 'covariant'")
