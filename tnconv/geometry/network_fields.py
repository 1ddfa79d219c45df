"""Curvature of a network as a field of metrics: what their Christoffel term is made of.

A product at a point is automatic differentiation alone, and can be differentiated itself.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tnconv.displays import Shown
from tnconv.geometry.damped_metrics import Estimate, Implicit
from tnconv.geometry.fields import MetricField
from tnconv.geometry.network_forms import Batches
from tnconv.geometry.points import Bilinear, Covector, Point, Vector
from tnconv.models.computing import arguments
from tnconv.models.propagation import LossFunction
from tnconv.operators.curvature_operators import GGNOperator


@dataclass(frozen=True, repr=False)
class GaussNewtonField(Shown):
    """``θ -> J(θ)ᵀ ∂²L/∂y² J(θ) + D(θ)``, for `christoffel_term` and covariant Hessians.

    Intrinsic where the damping is: the field of ``L ∘ φ⁻¹`` is this one in other coordinates.

    Args:
        model: the network.
        loss_fn: the loss.
        batches: pairs of inputs and targets, taken as one batch.
        damping: D, a field, such as ``Constant(1e-3 * Euclidean(points_of(model)))``.
        estimate: how log-determinants are found; by default exactly, for few parameters.

    >>> from tnconv.geometry import Constant, Euclidean, hessian, points_of
    >>> model, batch = nn.Linear(3, 2), (torch.rand(8, 3), torch.randint(2, (8,)))
    >>> loss_fn, damping = nn.CrossEntropyLoss(), Constant(0.1 * Euclidean(points_of(model)))
    >>> field = GaussNewtonField(model, loss_fn, [batch], damping)
    >>> hessian(model, loss_fn, [batch], "covariant", field).dense().shape
    torch.Size([8, 8])
    """

    model: nn.Module
    loss_fn: LossFunction
    batches: Batches
    damping: MetricField
    estimate: Estimate | None = None

    def __call__(self, theta: Point) -> Implicit:
        form = Bilinear(lambda v: self._product(theta, v), theta, batched=True)
        return Implicit(form, self.damping(theta), estimate=self.estimate)

    def _product(self, theta: Point, v: Vector) -> Covector:
        operator = GGNOperator(self.model, self.loss_fn, self.batches)
        total: Any = None
        for (inputs, targets), share in zip(operator.batches, operator.shares, strict=True):
            found = share * self._of_batch(theta, v, inputs, targets)
            total = found if total is None else total + found
        return total  # type: ignore[no-any-return]

    def _of_batch(self, theta: Point, v: Vector, inputs: Any, targets: Any) -> Covector:
        args, kwargs = arguments(inputs)

        def output(point: dict[str, Tensor]) -> Tensor:
            return functional_call(self.model, point, args, kwargs)  # type: ignore[no-any-return]

        def slope(y: Tensor) -> Tensor:
            found: Tensor = torch.func.grad(lambda each: self.loss_fn(each, targets))(y)
            return found

        y, pull, *_ = torch.func.vjp(output, dict(theta))
        tangent = torch.func.jvp(output, (dict(theta),), (v.ordered(theta),))[1]
        return Covector(pull(torch.func.jvp(slope, (y,), (tangent,))[1])[0])
