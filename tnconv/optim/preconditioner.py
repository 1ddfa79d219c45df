"""The Kronecker factors of blocks of parameters, over time: averages, inverses, and products."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tnconv.optim.blocks import Block
from tnconv.optim.collection import FactorWatch
from tnconv.optim.damping import exact, factored, spectrum
from tnconv.optim.inverses import wide
from tnconv.optim.workers import Workers

State = dict[str, Any]
Inverse = Literal["cholesky", "eigen"]
INVERSES: Mapping[Inverse, tuple[str, ...]] = {
    "cholesky": ("A_inverse", "B_inverse"),
    "eigen": ("A_vectors", "B_vectors", "eigenvalues"),
}
FACTORS = {"A", "B"}.union(*INVERSES.values())
"""Entries of a parameter's state with a dtype of their own."""


def update_factors(
    blocks: Sequence[tuple[Block, State, float]],  # with the decay of its running averages
    watch: FactorWatch,
    workers: Workers,
    dtype: torch.dtype | None = None,
) -> None:
    """``A <- A + (1 - β)/(1 - βᵗ) (A_t - A)``: weights βᵗ⁻ʲ for update j, normalised; B likewise.

    Factors that were not seen, or that are not finite, leave a block as it is.
    """
    for (block, state, decay), (a, b) in zip(
        blocks, _measured([block for block, _, _ in blocks], watch, workers), strict=True
    ):
        if a is None or b is None or not (_is_finite(a) and _is_finite(b)):
            continue
        state["updates"] = state.get("updates", 0) + 1
        share = (1 - decay) / (1 - decay ** state["updates"])
        for name, new in (("A", a), ("B", b)):
            old = state.setdefault(name, new.to(dtype or new.dtype)).to(block.key.device)
            state[name] = old.lerp(new.to(old.dtype), share)


def _measured(
    blocks: Sequence[Block], watch: FactorWatch, workers: Workers
) -> list[tuple[Tensor | None, Tensor | None]]:
    """A and B of each block over all workers; nothing where none saw a sample."""
    found, many = watch.found(), workers.count > 1
    samples = torch.tensor(float(watch.samples), dtype=torch.float64)
    flat, at = [samples], dict[Block, int]()
    for block in blocks:
        sums = found.get(block.key) or (_zeros(block, watch) if many else None)
        if sums is not None:
            at[block] = len(flat)
            flat += [sums[name] for name in ("input", "count", "grad_output")]
    flat = workers.sums(flat)
    total = max(float(flat[0]), 1.0) if watch.averages else float(workers.count)
    result: list[tuple[Tensor | None, Tensor | None]] = []
    for block in blocks:
        if block not in at or (many and not flat[at[block] + 1]):
            result.append((None, None))
            continue
        a, count, b = flat[at[block] : at[block] + 3]
        result.append((_own(a / count, block, watch), _output(b / total, watch)))
    return result


def _is_finite(factor: Tensor) -> bool:
    """By its diagonal, which bounds all other entries."""
    return bool(factor.diagonal(dim1=-2, dim2=-1).sum().isfinite())


def _own(a: Tensor, block: Block, watch: FactorWatch) -> Tensor:
    """Without the entry 1 of joint patches where a weight has no bias in its block."""
    extra = watch.kfac.joint and block.weight is not None and block.bias is None
    return a[:, :-1, :-1].contiguous() if extra else a


def _output(b: Tensor, watch: FactorWatch) -> Tensor:
    if watch.kfac.fisher == "forward-only":
        return torch.eye(b.shape[-1], dtype=b.dtype, device=b.device).expand_as(b).contiguous()
    return b


def _zeros(block: Block, watch: FactorWatch) -> dict[str, Tensor]:
    """What a worker adds that did not see a block."""
    groups, d, a = block.shape
    groups = groups if watch.kfac.per_group else 1
    a += watch.kfac.joint and block.weight is not None and block.bias is None
    new = block.key.new_zeros((), dtype=torch.promote_types(block.key.dtype, torch.float32))
    shapes = {"input": (groups, a, a), "count": (), "grad_output": (groups, d, d)}
    return {name: new.new_zeros(shape) for name, shape in shapes.items()}


def update_inverses(
    blocks: Sequence[tuple[Block, State, float]],  # with its damping
    inverse: Inverse,
    workers: Workers,
) -> None:
    """Invert, or diagonalise, the factors; each worker does a share for all."""
    ready = [each for each in blocks if "A" in each[1]]
    costs = [float(sum(state[name].shape[-1] ** 3 for name in "AB")) for _, state, _ in ready]
    flat: list[Tensor] = []
    for (_, state, damping), owner in zip(ready, workers.owners(costs), strict=True):
        a, b = state["A"], state["B"]
        if owner != workers.rank:
            flat += _nothing(a, b, inverse)
        else:
            flat += factored(a, b, damping) if inverse == "cholesky" else spectrum(a, b)
    values = iter(workers.sums(flat))
    for _, state, _ in ready:
        state.update((name, next(values)) for name in INVERSES[inverse])


def _nothing(a: Tensor, b: Tensor, inverse: Inverse) -> list[Tensor]:
    first, second = (torch.zeros_like(factor, dtype=wide(factor)) for factor in (a, b))
    if inverse == "cholesky":
        return [first, second]
    return [first, second, first.new_zeros(len(a), b.shape[-1], a.shape[-1])]


def preconditioned(rows: Tensor, state: State, damping: float) -> Tensor:  # (g, d, a)
    """``P(G) = (B + √λ/π I)⁻¹ G (A + π√λ I)⁻¹``, or ``(B ⊗ A + λ I)⁻¹ G`` in the eigenbasis."""
    if "A_inverse" in state:
        left = state["B_inverse"]
        found: Tensor = left @ rows.to(left.dtype) @ state["A_inverse"]
        return found.to(rows.dtype)
    q, r, eigenvalues = (state[name] for name in INVERSES["eigen"])
    return exact(rows.to(q.dtype), q, r, eigenvalues, damping).to(rows.dtype)


def move(state: State, device: torch.device) -> None:
    """Bring factors to where their parameter is."""
    for name in FACTORS & state.keys():
        state[name] = state[name].to(device)
