"""Tangent kernels in a metric: ``J M⁻¹ Jᵀ``, which no reparametrization changes."""

from typing import Any

import torch
from torch import Tensor, nn

from tnconv.geometry.metric import Metric
from tnconv.geometry.points import Covector
from tnconv.models.computing import Inputs
from tnconv.ntk.seeds import Outputs, Seeds
from tnconv.ntk.sides import Side
from tnconv.operators.low_rank import JacobianRows

AT_A_TIME = 16  # rows that are explicit


def metric_ntk(
    model: nn.Module,
    x1: Inputs,
    metric: Metric,
    x2: Inputs | None = None,
    *,
    outputs: Outputs = "all",
    batch_dim: int = 0,
) -> Tensor:
    """``Θ[n, c, m, d] = Σ_θθ' ∂f[n, c]/∂θ M⁻¹[θ, θ'] ∂f[m, d]/∂θ'``, the kernel of steps in M.

    With the identity it is `tnconv.ntk.empirical_ntk`, which changes where a network is rewritten;
    this does not where the metric is carried along. A few rows at a time are explicit.

    Args:
        model: any model that `tnconv.ntk.empirical_ntk` takes.
        x1: the model's input, or a sequence or mapping of its arguments.
        metric: M at the model's parameters as they are; those that it has count.
        x2: the batch of m and d; ``x1`` by default.
        outputs: as for `tnconv.ntk.empirical_ntk`.
        batch_dim: the dimension of the inputs that samples have.

    >>> from tnconv.geometry import Euclidean, points_of
    >>> model, x = nn.Linear(3, 2), torch.rand(5, 3)
    >>> metric_ntk(model, x, 4.0 * Euclidean(points_of(model))).shape
    torch.Size([5, 2, 5, 2])
    """
    names = tuple(metric.space)
    first, second = (
        Side(model, x, Seeds(outputs), names, batch_dim).rows()
        for x in (x1, x1 if x2 is None else x2)
    )
    count = first.vectors * first.samples
    unit = torch.eye(count, dtype=first.dtype, device=first.device)
    parts = [
        second.projected(_raised(first, some, metric))
        for some in torch.split(unit.reshape(count, first.vectors, first.samples), AT_A_TIME)
    ]
    found = torch.cat(parts).reshape(first.vectors, first.samples, second.vectors, second.samples)
    return found.permute(1, 0, 3, 2)


def _raised(rows: JacobianRows, coefficients: Tensor, metric: Metric) -> dict[str, Any]:
    """``M⁻¹ u`` of combinations u of rows, ``(f, *parameter)`` by name."""
    combined = rows.combined(coefficients)
    each = [
        metric.inverse_product(Covector({name: u[at] for name, u in combined.items()})).parts
        for at in range(len(coefficients))
    ]
    return {name: torch.stack([v[name] for v in each]) for name in combined}
