"""Metrics that optimizers make of gradients: Adam's square roots, Shampoo's two sides."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tnconv.geometry.diagonal_metrics import Diagonal
from tnconv.geometry.kronecker_metrics import Kronecker
from tnconv.geometry.layer_matrices import Rows
from tnconv.geometry.network_forms import Batches, network_gradient, points_of
from tnconv.geometry.points import Point
from tnconv.models.propagation import LossFunction
from tnconv.quantities import KroneckerFactors


def adam_metric(optimizer: torch.optim.Optimizer, model: nn.Module) -> Diagonal:
    """``√(v / (1 - β₂ᵗ)) + ε``: by whose inverse Adam (or AdamW, AMSGrad) multiplies its mean.

    Extrinsic: the averages are of gradients along these parameters, and their root is no metric
    that changes by itself.

    Raises:
        ValueError: an optimizer that has made no step with one of the parameters.
    """
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    found = {}
    for name, p in model.named_parameters():
        state: Any = optimizer.state.get(p, {})
        if "exp_avg_sq" not in state:
            raise ValueError(
                f"the optimizer has no averages of {name!r}; expected Adam's, after a step"
            )
        beta, step = groups[p]["betas"][1], float(state["step"])
        v = state.get("max_exp_avg_sq", state["exp_avg_sq"])
        found[name] = (v / (1 - beta**step)).sqrt() + groups[p]["eps"]
    return Diagonal(found)


def shampoo_statistics(
    model: nn.Module, loss_fn: LossFunction, batches: Batches, epsilon: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """``L = ε I + Σ_b G Gᵀ`` and ``R = ε I + Σ_b Gᵀ G``, G the gradient of the loss of batch b.

    Of every parameter as a matrix ``(d, a)`` for each group, with a bias as one column.

    Args:
        model: the network.
        loss_fn: the loss.
        batches: pairs of inputs and targets; each makes one gradient.
        epsilon: ε, by which Shampoo starts.
    """
    rows = Rows(points_of(model), model)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in batches:
        for name, g in network_gradient(model, loss_fn, [batch]).parts.items():
            w = rows.of(name, g)
            if name not in found:
                left, right = (torch.eye(size).to(w) for size in w.shape[1:])
                found[name] = epsilon * left[None], epsilon * right[None]
            left, right = found[name]
            found[name] = left + w @ w.mT, right + w.mT @ w
    return found


def shampoo_metric(
    statistics: Mapping[str, tuple[Tensor, Tensor]],
    space: Point,
    model: nn.Module | None = None,
    exponent: float = 0.25,
) -> Kronecker:
    """``L^p ⊗ R^p`` with Shampoo's sums ``L = Σ G Gᵀ`` and ``R = Σ Gᵀ G`` of gradients, p = 1/4.

    Extrinsic. Source: Gupta, Koren & Singer 2018.

    Args:
        statistics: L ``(d, d)`` and R ``(a, a)`` of each parameter as a matrix, positive definite,
            or one of both for each group, see `shampoo_statistics`.
        space: the parameters.
        model: whose layers say how a weight is a matrix.
        exponent: p.

    >>> model, batches = nn.Linear(3, 2), [(torch.rand(8, 3), torch.rand(8, 2))]
    >>> statistics = shampoo_statistics(model, nn.MSELoss(), batches, 1e-4)
    >>> shampoo_metric(statistics, points_of(model), model).size
    8
    """
    factors = {
        name: KroneckerFactors(_power(name, right, exponent), _power(name, left, exponent))
        for name, (left, right) in statistics.items()
    }
    return Kronecker(factors, space, model, intrinsic=False)


def _power(name: str, matrix: Tensor, exponent: float) -> Tensor:
    """``M^p`` of a matrix, or of one for each group: always with that dimension."""
    values, vectors = torch.linalg.eigh(matrix if matrix.dim() == 3 else matrix[None])
    if not bool((values > 0).all()):
        raise ValueError(f"a factor of {name!r} is not positive definite; expected a damping")
    found: Tensor = (vectors * values.unsqueeze(-2) ** exponent) @ vectors.mT
    return found
