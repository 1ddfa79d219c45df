"""Sharpness of a network in a metric, and its natural gradient."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tnconv.geometry.curvature_metrics import Batches
from tnconv.geometry.landscape import model_hessian
from tnconv.geometry.metric import Metric
from tnconv.geometry.points import Covector, Vector
from tnconv.geometry.shape_operator import ShapeOperator
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
        measure: "trace" by probes, "max_eig" by Lanczos, or "logdet", densely.
        probes: how many products the trace is the mean over.
        damping: a metric that is added to H, for "logdet".
        generator: where probes are drawn.

    >>> from tnconv.geometry import kfac_metric
    >>> model, batch = nn.Linear(3, 2), (torch.rand(8, 3), torch.randint(2, (8,)))
    >>> metric = kfac_metric(model, nn.CrossEntropyLoss(), [batch], 1e-3)
    >>> sharpness(model, nn.CrossEntropyLoss(), [batch], metric).shape
    torch.Size([])

    Raises:
        ValueError: an unknown measure.
    """
    if measure not in get_args(Measure):
        words = ", ".join(map(repr, get_args(Measure)))
        raise ValueError(f"measure is {measure!r}; expected one of {words}")
    shape = ShapeOperator(model_hessian(model, loss_fn, batches), metric)
    if measure == "trace":
        return shape.trace(probes, generator)
    return (
        shape.max_eigenvalue(generator=generator) if measure == "max_eig" else shape.logdet(damping)
    )


def natural_gradient(model: nn.Module, metric: Metric) -> Vector:
    """``G⁻¹ g`` of the gradients that a model's parameters have.

    >>> from tnconv.geometry import Euclidean
    >>> model = nn.Linear(2, 1)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> natural_gradient(model, 2.0 * Euclidean(dict(model.named_parameters()))).parts["bias"]
    tensor([0.5000])

    Raises:
        ValueError: a parameter of the metric without a gradient.
    """
    named = dict(model.named_parameters())
    missing = [name for name in metric.space if named[name].grad is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} have no gradient; expected loss.backward() before")
    grads = {name: g for name in metric.space if (g := named[name].grad) is not None}
    return metric.inverse_product(Covector(grads))
