"""Parameters without Kronecker factors: their gradients over their own running squares.

With ``s <- β s + (1 - β) D g²`` of a batch's gradient g, s estimates the diagonal of the empirical
Fisher matrix, where D is what a mean divides by (1 for a sum): so ``g / (s + λ)`` is a natural
gradient like that of Kronecker-factored blocks, of the same order, and the same learning rate fits.
Source: Lin et al. 2024, "Can we remove the square root in adaptive gradient methods?".
"""

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from tnconv.optim.averages import judged, share
from tnconv.optim.inverses import wide

OUTLIER = 1e6
"""Squares with a mean this many times the running one, or 1 / this, are outliers."""
NAMES = ("squares", "square_updates", "square_outliers")


def update_squares(
    grads: Mapping[Tensor, Tensor],
    states: MutableMapping[Tensor, dict[str, Any]],
    decay: float,
    divisor: float,
) -> None:
    """``s <- s + (1 - β)/(1 - βᵗ) (D g² - s)`` without outliers; sparse gradients have no s.

    Nothing is read from the device.
    """
    for parameter, grad in grads.items():
        if grad.is_sparse:
            continue
        state, wider = states[parameter], grad.to(wide(grad))
        new = divisor * wider * wider
        if "squares" not in state or state["squares"].shape != new.shape:
            mean = new.mean()
            state["squares"] = torch.where(mean.isfinite(), new, 0)
            state["square_updates"] = 1
            state["square_outliers"] = torch.zeros_like(mean, dtype=torch.int64)
            continue
        state["square_updates"] += 1
        old, means = state["squares"], (new.mean()[None], state["squares"].mean()[None])
        counts, again, outliers = judged(*means, state["square_outliers"], OUTLIER)
        weight = torch.where(again, 1.0, counts * share(decay, state["square_updates"]))
        state["squares"] = old.lerp(torch.where(counts, new, old), weight.to(old))
        state["square_outliers"] = outliers


def damped(grad: Tensor, state: Mapping[str, Any], damping: float) -> Tensor:
    """``g / (s + λ)``, or g itself as long as nothing is known of s."""
    if grad.is_sparse or "squares" not in state:
        return grad
    squares: Tensor = state["squares"]
    return (grad / (squares + damping)).to(grad.dtype)
