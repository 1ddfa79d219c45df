"""Running averages that one bad batch does not spoil."""

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

PATIENCE = 5
"""So many outliers in a row are none: averages then start again from the newest."""


def share(decay: float, updates: int) -> float:
    """The newest value's weight after so many updates: weights βᵗ⁻ʲ for update j, normalised.

    >>> share(0.5, 1), share(0.5, 2)
    (1.0, 0.6666666666666666)
    """
    return (1 - decay) / (1 - decay**updates)


def judged(
    new: Tensor,  # (..., k): sizes, at least 0
    old: Tensor,  # (..., k)
    outliers: Tensor,  # (...): how many in a row there were before
    limit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Whether values count, whether averages start again from them, and outliers in a row.

    A value with a size more than ``limit`` times the running one, or less than 1 / ``limit`` of it,
    is an outlier. Values that are not finite never count, and those that are too large only after
    others like them.

    >>> new, before = torch.tensor([[2.0], [5e3]]), torch.tensor([3, 4])
    >>> [each.tolist() for each in judged(new, torch.ones(2, 1), before, limit=1e3)]
    [[True, True], [False, True], [0, 0]]
    """
    finite = new.isfinite().all(-1)
    known = (new > 0) & (old > 0)
    large, small = (known & (new > limit * old)).any(-1), (known & (old > limit * new)).any(-1)
    count = torch.where(large | small, outliers + 1, 0) * finite
    again = count >= PATIENCE
    return finite & (~large | again), again, torch.where(again, 0, count)


def all_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether each has finite entries alone, with one question to an accelerator.

    >>> all_finite([torch.zeros(2), torch.tensor([1.0, inf])])
    [True, False]
    """
    if not tensors:
        return []
    norms = torch._foreach_norm(list(tensors), inf)
    found: list[bool] = torch.stack([n.to(norms[0].device) for n in norms]).isfinite().tolist()
    return found
