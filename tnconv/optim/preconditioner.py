"""The Kronecker factors of blocks of parameters, over time: averages, inverses, and products."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tnconv.optim.blocks import Block
from tnconv.optim.collection import FactorWatch
from tnconv.optim.damping import exact, factored, spectrum
from tnconv.optim.ekfac import Basis
from tnconv.optim.inverses import wide
from tnconv.optim.workers import Workers

State = dict[str, Any]
Inverse = Literal["cholesky", "eigen", "ekfac"]
INVERSES: Mapping[Inverse, tuple[str, ...]] = {
    "cholesky": ("A_inverse", "B_inverse"),
    "eigen": ("A_vectors", "B_vectors", "eigenvalues"),
    "ekfac": ("A_vectors", "B_vectors", "eigenvalues"),
}
FACTORS = {"A", "B", "moments"}.union(*INVERSES.values())
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
    measured = _measured([block for block, _, _ in blocks], watch, workers)
    for block, state, decay in blocks:
        new = measured.get(block)
        if new is None or not all(_is_finite(new[name]) for name in "AB"):
            continue
        for counter, names in (("updates", "AB"), ("moment_updates", ("moments",))):
            if not all(name in new for name in names):
                continue
            state[counter] = state.get(counter, 0) + 1
            share = (1 - decay) / (1 - decay ** state[counter])
            for name in names:
                old = state.setdefault(name, new[name].to(dtype or new[name].dtype))
                state[name] = old.lerp(new[name].to(old), share)


def _measured(
    blocks: Sequence[Block], watch: FactorWatch, workers: Workers
) -> dict[Block, dict[str, Tensor]]:
    """A, B and moments over all workers, of the blocks of which one saw a sample."""
    found, many = watch.found(), workers.count > 1
    seen = [block for block in blocks if many or block.key in found]
    sums = [found.get(block.key) or _zeros(block, watch) for block in seen]
    device = blocks[0].key.device if blocks else None
    samples = torch.tensor(float(watch.samples), device=device)
    flat = iter(workers.sums([samples, *(value for each in sums for value in each.values())]))
    whole = max(float(next(flat)), 1.0)
    total = whole if watch.averages else float(workers.count)
    result = dict[Block, dict[str, Tensor]]()
    for block, each in zip(seen, sums, strict=True):
        values = {name: next(flat) for name in each}
        count = values.pop("count")
        if not many or count:
            new = {"A": _own(values.pop("input") / count, block, watch)}
            new["B"] = _output(values.pop("grad_output") / total, watch)
            result[block] = new | {name: value / total for name, value in values.items()}
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
    """What a worker adds that did not see a block, in the order of what others do."""
    groups, d, a = block.shape
    moments = {"moments": block.shape} if block.key in watch.bases else {}
    groups = groups if watch.kfac.per_group else 1
    a += watch.kfac.joint and block.weight is not None and block.bias is None
    new = block.key.new_zeros((), dtype=torch.promote_types(block.key.dtype, torch.float32))
    shapes = {"count": (), "input": (groups, a, a), "grad_output": (groups, d, d)} | moments
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
        for name in ("moments", "moment_updates"):  # they belong to the basis before
            state.pop(name, None)


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
    diagonal = state.get("moments", eigenvalues).to(q.dtype)
    return exact(rows.to(q.dtype), q, r, diagonal, damping).to(rows.dtype)


def bases(blocks: Sequence[Block], states: Mapping[Tensor, State]) -> dict[Tensor, Basis]:
    """The eigenbases of all blocks that have one."""
    found = {block.key: states[block.key] for block in blocks}
    return {
        key: (state["A_vectors"], state["B_vectors"])
        for key, state in found.items()
        if "A_vectors" in state
    }


def move(state: State, device: torch.device) -> None:
    """Bring factors to where their parameter is."""
    for name in FACTORS & state.keys():
        state[name] = state[name].to(device)
