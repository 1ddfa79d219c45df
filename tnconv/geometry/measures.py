"""Sharpness of a network in a metric, and its natural gradient."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tnconv.geometry.damped_metrics import Estimate
from tnconv.geometry.fields import MetricField, euclidean
from tnconv.geometry.landscape import Kind, hessian
from tnconv.geometry.metric import Metric
from tnconv.geometry.network_forms import Batches, network_gradient
from tnconv.geometry.points import Covector, Vector
from tnconv.geometry.shape import ShapeOperator
from tnconv.models.propagation import LossFunction

Measure = Literal["trace", "max_eig", "logdet"]


def sharpness(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    metric: Metric,
    measure: Measure = "trace",
    *,
    probes: int = 10,
    damping: Metric | None = None,
    estimate: Estimate | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """How curved the loss is in steps of unit length: of ``G⁻¹ H`` the trace or another measure.

    The metric belongs to the model's parameters as they are: an intrinsic one is made of the model
    (`kfac_metric`, ...), an extrinsic one is carried along where the model is rewritten. With the
    identity this is the usual sharpness, which depends on how a network is written.

    Args:
        model: in evaluation mode, or with layers that do not mind.
        loss_fn: the loss.
        batches: pairs of inputs and targets, taken as one batch.
        metric: G.
        measure: "trace" by probes, "max_eig" by Lanczos, or "logdet".
        probes: how many products the trace is the mean over.
        damping: a metric that is added to H, for "logdet".
        estimate: how "logdet" is estimated; by default exactly, for few parameters.
        generator: where probes are drawn.

    >>> from tnconv.geometry import Euclidean, kfac_metric, points_of
    >>> model, batch = nn.Linear(3, 2), (torch.rand(8, 3), torch.randint(2, (8,)))
    >>> damping = 1e-3 * Euclidean(points_of(model))
    >>> metric = kfac_metric(model, nn.CrossEntropyLoss(), [batch], damping)
    >>> sharpness(model, nn.CrossEntropyLoss(), [batch], metric).shape
    torch.Size([])

    Raises:
        ValueError: an unknown measure.
    """
    if measure not in get_args(Measure):
        words = ", ".join(map(repr, get_args(Measure)))
        raise ValueError(f"measure is {measure!r}; expected one of {words}")
    shape = shape_operator(model, loss_fn, batches, metric)
    if measure == "trace":
        return shape.trace(probes, generator)
    if measure == "max_eig":
        return shape.max_eigenvalue(generator=generator)
    return shape.logdet(damping, estimate)


def shape_operator(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    metric: Metric,
    kind: Kind = "calculus",
    field: MetricField = euclidean,
) -> ShapeOperator:
    """``G⁻¹ H`` of a network: trace, eigenvalues, log-determinant, spectral density.

    Args:
        model: the network.
        loss_fn: the loss.
        batches: pairs of inputs and targets, taken as one batch.
        metric: G at the model's parameters as they are.
        kind: of Hessian, see `hessian`.
        field: the metrics around, for the covariant one.

    >>> from tnconv.geometry import Euclidean, points_of
    >>> model, batch = nn.Linear(3, 2), (torch.rand(8, 3), torch.randint(2, (8,)))
    >>> found = shape_operator(model, nn.CrossEntropyLoss(), [batch], Euclidean(points_of(model)))
    >>> round(found.spectral_density(steps=4, probes=2).weights.sum().item(), 9)
    1.0
    """
    return ShapeOperator(hessian(model, loss_fn, batches, kind, field), metric)


def natural_gradient(
    model: nn.Module,
    metric: Metric,
    loss_fn: LossFunction | None = None,
    batches: Batches | None = None,
) -> Vector:
    """``G⁻¹ g`` of the loss over all batches, or of the gradients that the parameters have.

    Args:
        model: the network.
        metric: G at the model's parameters as they are.
        loss_fn: the loss, together with batches.
        batches: pairs of inputs and targets, taken as one batch.

    >>> from tnconv.geometry import Euclidean
    >>> model = nn.Linear(2, 1)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> natural_gradient(model, 2.0 * Euclidean(dict(model.named_parameters()))).parts["bias"]
    tensor([0.5000])

    Raises:
        ValueError: a parameter of the metric without a gradient, or a loss without batches.
    """
    if (loss_fn is None) != (batches is None):
        raise ValueError("one of loss_fn and batches is missing; expected both, or neither")
    if loss_fn is not None and batches is not None:
        found = network_gradient(model, loss_fn, batches).parts
        return metric.inverse_product(Covector({name: found[name] for name in metric.space}))
    named = dict(model.named_parameters())
    missing = [name for name in metric.space if named[name].grad is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} have no gradient; expected loss.backward() before")
    grads = {name: g for name in metric.space if (g := named[name].grad) is not None}
    return metric.inverse_product(Covector(grads))
