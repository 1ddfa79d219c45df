"""Parameters without Kronecker factors: their gradients over their own running squares.

With ``s <- β s + (1 - β) D g²`` of a batch's gradient g, s estimates the diagonal of the empirical
Fisher matrix, where D is what a mean divides by (1 for a sum): so ``g / (s + λ)`` is a natural
gradient like that of Kronecker-factored blocks, of the same order, and the same learning rate fits.
Source: Lin et al. 2024, "Can we remove the square root in adaptive gradient methods?".
"""

from collections.abc import Mapping, MutableMapping, Sequence
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
    alike: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, dict[str, Any]]]] = {}
    for parameter, grad in grads.items():
        if grad.is_sparse:
            continue
        state = states[parameter]
        if "squares" not in state or state["squares"].shape != grad.shape:
            _start(grad, state, divisor)
        else:
            alike.setdefault((grad.device, wide(grad)), []).append((grad, state))
    for (_, dtype), members in alike.items():
        _update(members, dtype, decay, divisor)


def _start(grad: Tensor, state: dict[str, Any], divisor: float) -> None:
    wider = grad.to(wide(grad))
    new = divisor * wider * wider
    mean = new.mean()
    state["squares"] = torch.where(mean.isfinite(), new, 0)
    state["square_updates"] = 1
    state["square_outliers"] = torch.zeros_like(mean, dtype=torch.int64)


def _update(
    members: Sequence[tuple[Tensor, dict[str, Any]]],
    dtype: torch.dtype,
    decay: float,
    divisor: float,
) -> None:
    """All parameters of a device and a dtype together: outliers are told in a few kernels."""
    grads, states = [grad.to(dtype) for grad, _ in members], [state for _, state in members]
    for state in states:
        state["square_updates"] += 1
    new = torch._foreach_mul(torch._foreach_mul(grads, grads), divisor)
    old = [state["squares"].to(dtype) for state in states]
    shares = [share(decay, state["square_updates"]) for state in states]
    before = torch.stack([state["square_outliers"] for state in states])
    counts, again, outliers = judged(_means(new), _means(old), before, OUTLIER)
    if counts.device.type == "cpu":  # where looking costs nothing
        usual = bool(counts.all()) and not again.any() and not outliers.any() and not before.any()
        if usual and len(set(shares)) == 1:
            for state, squares in zip(states, old, strict=True):
                state["squares"] = squares
            torch._foreach_lerp_(old, list(new), shares[0])
            return
    newest = torch.tensor(shares, dtype=dtype).to(counts.device, non_blocking=True)
    weights = torch.where(again, 1.0, counts * newest)
    each = counts.unbind(), weights.unbind(), outliers.unbind()
    for state, was, now, count, weight, outlier in zip(states, old, new, *each, strict=True):
        state["squares"] = was.lerp(torch.where(count, now, was), weight)
        state["square_outliers"] = outlier


def _means(values: Sequence[Tensor]) -> Tensor:
    """The means of tensors without negative entries, of shape ``(k, 1)``."""
    sums = torch.stack(torch._foreach_norm(list(values), 1))
    counts = torch.tensor([each.numel() for each in values], dtype=sums.dtype)
    return (sums / counts.to(sums.device, non_blocking=True)).unsqueeze(1)


def damped(
    grads: Sequence[Tensor], states: Sequence[Mapping[str, Any]], damping: float
) -> list[Tensor]:
    """``g / (s + λ)``, or g itself as long as nothing is known of s."""
    found = list(grads)
    known = [
        at
        for at, (grad, state) in enumerate(zip(grads, states, strict=True))
        if "squares" in state and not grad.is_sparse
    ]
    if known:
        squares = torch._foreach_add([states[at]["squares"] for at in known], damping)
        natural = torch._foreach_div([grads[at] for at in known], squares)
        for at, value in zip(known, natural, strict=True):
            found[at] = value if value.dtype == grads[at].dtype else value.to(grads[at].dtype)
    return found
