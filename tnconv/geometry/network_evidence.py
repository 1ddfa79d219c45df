"""Laplace's evidence of a network, at its size: by products, by a Gram matrix, or in factors."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tnconv.geometry.curvature_metrics import ggn_metric, kfac_metric, low_rank_metric
from tnconv.geometry.damped_metrics import Damped, Estimate, Implicit
from tnconv.geometry.metric import Metric
from tnconv.geometry.network_forms import Batches, form_of, network_loss, points_of
from tnconv.geometry.points import Point, Vector
from tnconv.losses.reductions import divisor
from tnconv.models.propagation import LossFunction
from tnconv.operators.curvature_operators import HessianOperator

Curvature = Literal["low rank", "ggn", "hessian", "kfac"]


def network_evidence(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    prior: Metric,
    *,
    curvature: Curvature = "low rank",
    mean: Point | None = None,
    estimate: Estimate | None = None,
) -> Tensor:
    """``-N L(θ) - ½ (θ - μ)ᵀ Λ (θ - μ) - ½ log det(1 + N Λ⁻¹ C)``: the logarithm of the evidence.

    Of a likelihood whose negative logarithm is the loss, up to what does not depend on parameters,
    summed over all samples; N is what the mean divides by, one for sums. The prior is normal with
    the precision Λ, so that its own volume cancels in ``log det(Λ + N C) - log det Λ``. With Λ (and
    μ) carried along, the result is one number in all linear parametrisations; a Λ that is again a
    multiple of the identity elsewhere is another prior. Source: MacKay 1992.

    Args:
        model: at a mode of the posterior, or near one.
        loss_fn: the loss.
        batches: pairs of inputs and targets, taken as one batch.
        prior: Λ, a metric with a root at the model's parameters as they are.
        curvature: C: the Gauss-Newton matrix by its Gram matrix ("low rank", exact) or by products
            ("ggn"), the "hessian" by products, or "kfac".
        mean: μ by parameter name; zero by default.
        estimate: how log-determinants by products are found; by default exactly, for few
            parameters.

    >>> from tnconv.geometry import Euclidean
    >>> model, batch = nn.Linear(3, 2), (torch.rand(8, 3), torch.randint(2, (8,)))
    >>> prior = 1.0 * Euclidean(points_of(model))
    >>> network_evidence(model, nn.CrossEntropyLoss(), [batch], prior).shape
    torch.Size([])

    Raises:
        ValueError: an unknown kind of curvature, or a Hessian that is not positive definite with
            the prior.
    """
    if curvature not in get_args(Curvature):
        words = ", ".join(map(repr, get_args(Curvature)))
        raise ValueError(f"curvature is {curvature!r}; expected one of {words}")
    theta = points_of(model)
    operator = HessianOperator(model, loss_fn, batches)
    batches = operator.batches
    count = 1.0
    if operator.reduction == "mean":
        count = sum(divisor(loss_fn, inputs, targets) for inputs, targets in batches)
    posterior = _posterior(model, loss_fn, batches, (1 / count) * prior, curvature, estimate)
    step = Vector({n: p - mean[n] if mean is not None else p for n, p in theta.items()})
    with torch.no_grad():
        likelihood = -count * network_loss(model, loss_fn, batches)(theta)
    return likelihood - prior.norm(step).square() / 2 - posterior.relative_logdet() / 2


def _posterior(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    damping: Metric,
    curvature: Curvature,
    estimate: Estimate | None,
) -> Damped:
    """``C + Λ/N``."""
    if curvature == "low rank":
        return low_rank_metric(model, loss_fn, batches, damping)
    if curvature == "ggn":
        return ggn_metric(model, loss_fn, batches, damping, estimate=estimate)
    if curvature == "hessian":
        form = form_of(HessianOperator(model, loss_fn, batches))
        return Implicit(form, damping, estimate=estimate, intrinsic=False)
    found = kfac_metric(model, loss_fn, batches, damping)
    assert isinstance(found, Damped)
    if isinstance(found, Implicit):
        found.estimate = estimate
    return found
