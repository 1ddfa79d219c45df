"""Steps of parameters: along natural gradients, with momentum, and what they promise."""

from collections.abc import Mapping, MutableMapping, Sequence
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
    for parameter, grad in grads.items():
        if parameter not in found:
            found[parameter] = damped(grad, states[parameter], group["damping"])
    return found


def trust(natural: Mapping[Tensor, Tensor], grads: Mapping[Tensor, Tensor], group: Group) -> Tensor:
    """``ν = min(1, √(κ / (η₀² s)))``, s = Σ ⟨G, P(G)⟩ the squared length of P(G) in its own norm.

    With the learning rate itself in η₀'s place, as in Osawa et al. 2019, every rate would take
    steps of one length as long as the bound is active.
    """
    slopes = torch.as_tensor(sum(_dot(grads[p], value) for p, value in natural.items()))
    bound: Tensor = (group["kl_clip"] / slopes.clamp(min=0)).sqrt() / REFERENCE_RATE
    return bound.nan_to_num(1.0).clamp(max=1)


def descend(parameter: Tensor, direction: Tensor, states: States, group: Group) -> Tensor:
    """``V <- μ V + direction + γ W``, ``W <- W - η V``; V is returned."""
    lr, decay = group["lr"], group["weight_decay"]
    if decay and group["decoupled"]:
        parameter.mul_(1 - lr * decay)
    elif decay:
        direction = direction.add(parameter, alpha=decay)
    if group["momentum"]:
        state = states[parameter]
        if "momentum_buffer" not in state:
            dtype = group.get("momentum_dtype")
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=dtype)
        buffer: Tensor = state["momentum_buffer"]
        direction = buffer.mul_(group["momentum"]).add_(direction)
    parameter.add_(direction, alpha=-lr)
    return direction


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


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """``Σ a b``, in float32 at least."""
    return (one * other).sum(dtype=wide(one))
