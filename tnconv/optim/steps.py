"""Steps of parameters: along natural gradients, with momentum, and what they promise."""

from collections.abc import Mapping, MutableMapping, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from tnconv.optim.blocked import from_left, from_right
from tnconv.optim.blocks import Block
from tnconv.optim.inverses import wide
from tnconv.optim.preconditioner import State, preconditioned
from tnconv.optim.running_squares import damped

Group = Mapping[str, Any]
States = MutableMapping[Tensor, State]
REFERENCE_RATE = 0.1
"""The learning rate η₀ whose steps a trust region bounds by κ; others are in proportion."""


def natural_gradients(
    blocks: Sequence[Block], states: States, grads: Mapping[Tensor, Tensor], group: Group
) -> dict[Tensor, Tensor]:
    """``P(G)`` of all parameters in a group that have a gradient, in blocks or by themselves."""
    found = dict[Tensor, Tensor]()
    for block in blocks:
        if any(p in grads for p in block.parameters):
            natural = preconditioned(block.rows(grads), states[block.key], group["damping"])
            found |= {p: v for p, v in block.tensors(natural).items() if p in grads}
    others = [p for p in grads if p not in found]
    each = damped([grads[p] for p in others], [states[p] for p in others], group["damping"])
    return found | dict(zip(others, each, strict=True))


def trust(natural: Mapping[Tensor, Tensor], grads: Mapping[Tensor, Tensor], group: Group) -> Tensor:
    """``ν = min(1, √(κ / (η₀² s)))``, s = Σ ⟨G, P(G)⟩ the squared length of P(G) in its own norm.

    With the learning rate itself in η₀'s place, as in Osawa et al. 2019, every rate would take
    steps of one length as long as the bound is active.
    """
    if group["kl_clip"] == inf or not natural:
        return torch.ones(())
    slopes = _inner([grads[p] for p in natural], [*natural.values()])
    bound: Tensor = (group["kl_clip"] / slopes.clamp(min=0)).sqrt() / REFERENCE_RATE
    return bound.nan_to_num(1.0).clamp(max=1)


def scaled(values: Sequence[Tensor], share: Tensor) -> Sequence[Tensor]:
    """A number times tensors, on their devices."""
    if len({value.device for value in values}) > 1:
        return [share.to(value) * value for value in values]
    return torch._foreach_mul(list(values), share.to(values[0].device)) if values else ()


def descend(
    parameters: Sequence[Tensor], directions: Sequence[Tensor], states: States, group: Group
) -> Sequence[Tensor]:
    """``V <- μ V + direction + γ W``, ``W <- W - η V``, for all W at once; the V are returned."""
    lr, decay, given = group["lr"], group["weight_decay"], list(parameters)
    if not given:
        return ()
    if decay and group["decoupled"]:
        torch._foreach_mul_(given, 1 - lr * decay)
    elif decay:
        directions = torch._foreach_add(torch._foreach_mul(given, decay), list(directions))
    if group["momentum"]:
        for parameter in given:
            if "momentum_buffer" not in states[parameter]:
                new = torch.zeros_like(parameter, dtype=group.get("momentum_dtype"))
                states[parameter]["momentum_buffer"] = new
        buffers = [states[parameter]["momentum_buffer"] for parameter in given]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, list(directions))
        directions = buffers
    torch._foreach_add_(given, list(directions), alpha=-lr)
    return directions


def predicted_change(
    blocks: Sequence[Block],
    states: States,
    grads: Mapping[Tensor, Tensor],
    taken: Mapping[Tensor, Tensor],
    group: Group,
) -> Tensor:
    """``⟨G, Δ⟩ + 1/2 ⟨Δ, B Δ A + λ Δ⟩`` for the step ``Δ = -η V``, ``diag(s)`` in place of B ⊗ A
    elsewhere.
    """
    lr = group["lr"]
    total = sum((-lr * _dot(grads[p], v) for p, v in taken.items()), torch.zeros(()))
    for block in blocks:
        if any(p in taken for p in block.parameters):
            state, step = states[block.key], lr * block.rows(taken)
            a, b = (state[name].to(step.dtype) for name in "AB")
            bent = from_left(b, from_right(step, a))[..., : step.shape[-2], : step.shape[-1]]
            total = total + 0.5 * _dot(step, bent + group["damping"] * step)
    held = {p for block in blocks for p in block.parameters}
    for parameter in taken.keys() - held:
        if (squares := states[parameter].get("squares")) is not None:
            step = lr * taken[parameter]
            total = total + 0.5 * _dot(step, (squares + group["damping"]) * step)
    return torch.as_tensor(total)


def _inner(ones: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """``Σ a b`` over pairs of tensors, in float32 at least."""
    kinds = {(a.dtype, a.device, a.is_sparse) for each in (ones, others) for a in each}
    if len(kinds) == 1 and wide(ones[0]) == ones[0].dtype and not ones[0].is_sparse:
        products = torch._foreach_mul(list(ones), list(others))
        return torch.cat([each.reshape(-1) for each in products]).sum()
    dots = [_dot(a, b) for a, b in zip(ones, others, strict=True)]
    return torch.stack([each.to(dots[0].device, torch.float64) for each in dots]).sum()


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """``Σ a b``, in float32 at least."""
    return (one * other).sum(dtype=wide(one))
