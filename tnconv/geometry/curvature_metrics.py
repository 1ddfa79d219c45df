"""Metrics of a network's function: Gauss-Newton and Fisher matrices, whole, diagonal, in factors.

They are intrinsic: made anew from ``L ∘ φ⁻¹`` at ``φ(θ)`` they are ``J⁻ᵀ G J⁻¹``, the whole matrix
for every φ, its diagonal for diagonal φ, Kronecker factors where channels are rescaled or mixed.
A damping is a metric, too, never a number: ``1e-3 * Euclidean(points_of(model))`` is the identity
of the parameters as they are, and is carried along where they are rewritten.
"""

from typing import Any

import torch
from torch import nn

from tnconv.diagrams.kronecker import Flavour
from tnconv.geometry.damped_metrics import Estimate, Implicit, expect_metric
from tnconv.geometry.diagonal_metrics import Diagonal
from tnconv.geometry.eigenbasis_metrics import KroneckerEigen, eigenbases
from tnconv.geometry.gram_metrics import LowRank, factors
from tnconv.geometry.kronecker_metrics import Kronecker
from tnconv.geometry.metric import Metric
from tnconv.geometry.network_forms import Batches, form_of, observed, points_of, shared_batches
from tnconv.models.propagation import LossFunction
from tnconv.operators.curvature_operators import GGNOperator
from tnconv.operators.fisher import FisherOperator
from tnconv.operators.low_rank import JacobianRows, low_rank_ggn
from tnconv.optim.ekfac import moments
from tnconv.quantities import KFAC, GGNDiagonal, KroneckerFactors
from tnconv.quantities.kronecker_factors import Fisher
from tnconv.quantities.second_order import Fisher as Columns
from tnconv.quantities.second_order import columns


def ggn_metric(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    damping: Metric,
    *,
    estimate: Estimate | None = None,
) -> Implicit:
    """The Gauss-Newton matrix plus a damping, by products.

    Args:
        model: the network.
        loss_fn: the loss.
        batches: pairs of inputs and targets, taken as one batch.
        damping: a metric with a root.
        estimate: how the log-determinant is found; by default exactly, for few parameters.
    """
    return Implicit(form_of(GGNOperator(model, loss_fn, batches)), damping, estimate=estimate)


def fisher_metric(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    damping: Metric,
    *,
    estimate: Estimate | None = None,
    **options: Any,
) -> Implicit:
    """The Fisher matrix plus a damping, by products.

    Args:
        model: the network.
        loss_fn: the loss.
        batches: pairs of inputs and targets, taken as one batch.
        damping: a metric with a root.
        estimate: how the log-determinant is found; by default exactly, for few parameters.
        options: ``fisher``, ``samples`` and others of `tnconv.FisherOperator`.
    """
    operator = FisherOperator(model, loss_fn, batches, **options)
    return Implicit(form_of(operator), damping, estimate=estimate)


def low_rank_metric(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    damping: Metric,
    **options: Any,
) -> LowRank:
    """The Gauss-Newton matrix plus a damping, exactly, by its factors and their Gram matrix.

    For k columns of the loss's Hessian's root over all samples, 2 k times the parameters are held:
    with one class score each, as many columns as samples times classes.

    Args:
        model: any model that `tnconv.compute` takes; its layers must keep samples apart.
        loss_fn: a loss whose Hessian's root is known.
        batches: pairs of inputs and targets, taken as one batch.
        damping: a metric with a root.
        options: ``fisher``, ``samples`` and others of `tnconv.low_rank_ggn`.

    >>> from tnconv.geometry import Euclidean
    >>> model, batch = nn.Linear(3, 2), (torch.rand(8, 3), torch.randint(2, (8,)))
    >>> damping = 0.1 * Euclidean(points_of(model))
    >>> low_rank_metric(model, nn.CrossEntropyLoss(), [batch], damping).logdet().shape
    torch.Size([])
    """
    expect_metric("damping", damping)
    rows = [
        share**0.5
        * factors(low_rank_ggn(model, loss_fn, inputs, targets, **options), damping.space)
        for inputs, targets, share in shared_batches(model, loss_fn, batches)
    ]
    return LowRank(torch.cat(rows), damping)


def ggn_diagonal_metric(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    damping: Diagonal | None = None,
    *,
    fisher: Columns = "type-2",
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Diagonal:
    """The diagonal of the Gauss-Newton or Fisher matrix, plus a damping.

    Intrinsic for diagonal maps, without damping.

    Args:
        model: the network.
        loss_fn: the loss.
        batches: pairs of inputs and targets, taken as one batch.
        damping: a diagonal metric; needed where a parameter has no influence.
        fisher: "type-2", all columns of the loss's Hessian's root, or "mc", sampled ones.
        samples: how many of them.
        generator: where they are drawn.
    """
    found = observed(model, loss_fn, batches, GGNDiagonal(fisher, samples, generator))
    if damping is not None:
        found = {name: d + damping.entries[name] for name, d in found.items()}
    return Diagonal(found, damping is None or damping.intrinsic)


def kfac_metric(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    damping: Metric | None = None,
    *,
    flavour: Flavour = "expand",
    fisher: Fisher = "type-2",
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Metric:
    """KFAC's Kronecker factors as a metric: intrinsic without damping, for maps of channels.

    Args:
        model: whose learning parameters are all in layers with factors.
        loss_fn: the loss.
        batches: pairs of inputs and targets, taken as one batch.
        damping: what is added: exactly and in factors for `Kronecker` metrics and constants times
            `Euclidean`, by products for others. See `Kronecker.damped` for damped factors.
        flavour: see `tnconv.quantities.KFAC`.
        fisher: likewise.
        samples: likewise.
        generator: likewise.

    >>> from tnconv.geometry import Euclidean
    >>> model, batch = nn.Linear(3, 2), (torch.rand(8, 3), torch.randint(2, (8,)))
    >>> damping = 1e-3 * Euclidean(points_of(model))
    >>> type(kfac_metric(model, nn.CrossEntropyLoss(), [batch], damping)).__name__
    'KroneckerDamped'
    """
    if damping is not None:
        expect_metric("damping", damping)
    quantity = KFAC(flavour, fisher, samples, generator)
    found: dict[str, KroneckerFactors] = observed(model, loss_fn, batches, quantity)
    own = Kronecker(found, points_of(model), model)
    return own if damping is None else own + damping


def ekfac_metric(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    damping: Metric | None = None,
    *,
    flavour: Flavour = "expand",
    fisher: Columns = "type-2",
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Metric:
    """EKFAC: KFAC's eigenbases with the second moments of the gradients in them.

    Of all metrics that are diagonal there, the nearest to the Gauss-Newton or Fisher matrix.
    Source: George et al. 2018.

    Args:
        model: whose learning parameters are all in layers with factors.
        loss_fn: the loss.
        batches: pairs of inputs and targets, taken as one batch; read twice.
        damping: what is added: exactly, for constants times `Euclidean`, by products for others.
        flavour: of the factors.
        fisher: "type-2", all columns of the loss's Hessian's root, or "mc", sampled ones.
        samples: how many of them.
        generator: where they are drawn.
    """
    quantity = KFAC(flavour, fisher, samples, generator)
    kfac = Kronecker(observed(model, loss_fn, batches, quantity), points_of(model), model)
    bases, eigenvalues = eigenbases(kfac)
    scales = {name: torch.zeros_like(s) for name, s in eigenvalues.items()}
    source = columns(fisher, samples, generator)
    for inputs, targets, share in shared_batches(model, loss_fn, batches):
        rows = JacobianRows.of(model, loss_fn, inputs, targets, source)
        for name, s in scales.items():
            if name in rows.terms:
                s += share * moments(rows.terms[name], bases[name], joint=False)
    found = KroneckerEigen(bases, scales, points_of(model), model)
    return found if damping is None else found + damping
