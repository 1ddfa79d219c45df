"""Steps of parameters: along natural gradients, with momentum, and what they promise."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tnconv.optim.blocks import Block
from tnconv.optim.inverses import wide
from tnconv.optim.preconditioner import State, preconditioned

Group = Mapping[str, Any]
States = MutableMapping[Tensor, State]


def natural_gradients(
    blocks: Sequence[Block], states: States, grads: Mapping[Tensor, Tensor], group: Group
) -> dict[Tensor, Tensor]:
    """``ν P(G)`` of all parameters in blocks that have a gradient."""
    pairs = list[tuple[Block, Tensor, Tensor]]()
    for block in blocks:
        if any(p in grads for p in block.parameters):
            rows = block.rows(grads)
            pairs.append((block, rows, preconditioned(rows, states[block.key], group["damping"])))
    slopes = sum(_dot(rows, natural) for _, rows, natural in pairs)
    change = torch.as_tensor(group["lr"] ** 2 * slopes).clamp(min=0)
    trust = (group["kl_clip"] / change).sqrt().clamp(max=1)
    return {
        parameter: value
        for block, _, natural in pairs
        for parameter, value in block.tensors(trust.to(natural) * natural).items()
        if parameter in grads
    }


def descend(parameter: Tensor, direction: Tensor, states: States, group: Group) -> Tensor:
    """``V <- μ V + direction + γ W``, ``W <- W - η V``; V is returned."""
    lr, decay = group["lr"], group["weight_decay"]
    if decay and group["decoupled"]:
        parameter.mul_(1 - lr * decay)
    elif decay:
        direction = direction.add(parameter, alpha=decay)
    if group["momentum"]:
        state = states[parameter]
        buffer = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
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
    """``⟨G, Δ⟩ + 1/2 ⟨Δ, B Δ A + λ Δ⟩`` for the step ``Δ = -η V``, with no curvature elsewhere."""
    lr = group["lr"]
    total = sum((-lr * _dot(grads[p], v) for p, v in taken.items()), torch.zeros(()))
    for block in blocks:
        if any(p in taken for p in block.parameters):
            state, step = states[block.key], lr * block.rows(taken)
            a, b = (state[name].to(step.dtype) for name in "AB")
            bent = b @ step @ a + group["damping"] * step
            total = total + 0.5 * _dot(step, bent)
    return torch.as_tensor(total)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """``Σ a b``, in float32 at least."""
    return (one * other).sum(dtype=wide(one))
