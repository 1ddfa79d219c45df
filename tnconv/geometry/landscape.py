"""A loss, a point and a metric: the same landscape in any coordinates."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tnconv.geometry.curvature_metrics import Batches, points_of
from tnconv.geometry.fields import MetricField, christoffel_term, euclidean, is_constant, pushed
from tnconv.geometry.metric import Metric
from tnconv.geometry.points import Bilinear, Covector, Point, Vector
from tnconv.geometry.reparametrization import Reparametrization
from tnconv.models.computing import arguments
from tnconv.models.propagation import LossFunction
from tnconv.operators.curvature_operators import HessianOperator

Kind = Literal["calculus", "covariant"]
Loss = Callable[[Point], Tensor]


@dataclass(frozen=True)
class Landscape:
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
        if kind not in get_args(Kind):
            raise ValueError(f"kind is {kind!r}; expected 'calculus' or 'covariant'")
        slope, pull, *_ = torch.func.vjp(torch.func.grad(self.loss), dict(self.theta))
        if kind == "calculus" or is_constant(self.field):
            return Bilinear(lambda v: Covector(pull(dict(v.parts))[0]), self.theta)
        term = christoffel_term(self.field, self.theta, Covector(slope))
        return Bilinear(lambda v: Covector(pull(dict(v.parts))[0]) - term(v), self.theta)


def model_landscape(
    model: nn.Module, loss_fn: LossFunction, batches: Batches, field: MetricField = euclidean
) -> Landscape:
    """The landscape of a model's loss over all batches, at its parameters that learn.

    >>> batch = torch.rand(8, 3), torch.randint(2, (8,))
    >>> found = model_landscape(nn.Linear(3, 2), nn.CrossEntropyLoss(), [batch])
    >>> found.gradient.parts["weight"].shape
    torch.Size([2, 3])
    """
    operator = HessianOperator(model, loss_fn, batches)
    pairs: list[Any] = list(zip(operator.batches, operator.shares, strict=True))

    def loss(theta: Point) -> Tensor:
        total: Any = 0
        for (inputs, targets), share in pairs:
            args, kwargs = arguments(inputs)
            total = total + share * loss_fn(
                functional_call(model, dict(theta), args, kwargs), targets
            )
        return total  # type: ignore[no-any-return]

    return Landscape(loss, points_of(model), field)


def model_hessian(model: nn.Module, loss_fn: LossFunction, batches: Batches) -> Bilinear:
    """The calculus Hessian of a network, by `tnconv.HessianOperator`."""
    operator = HessianOperator(model, loss_fn, batches)
    space = points_of(model)
    return Bilinear(lambda v: Covector(operator @ {n: v.parts[n] for n in operator.names}), space)
