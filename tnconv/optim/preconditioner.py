"""The Kronecker factors of blocks of parameters, over time: averages, inverses, and products."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tnconv.optim.averages import all_finite, judged, share
from tnconv.optim.blocked import cut, from_left, from_right
from tnconv.optim.blocks import Block
from tnconv.optim.collection import FactorWatch
from tnconv.optim.contributions import Contribution
from tnconv.optim.ekfac import Basis
from tnconv.optim.factored_damping import damped, exact, spectrum
from tnconv.optim.inverses import Damped, inverted, wide
from tnconv.optim.workers import Workers

State = dict[str, Any]
Inverse = Literal["cholesky", "eigen", "ekfac"]
INVERSES: Mapping[Inverse, tuple[str, ...]] = {
    "cholesky": ("A_inverse", "B_inverse"),
    "eigen": ("A_vectors", "B_vectors", "eigenvalues"),
    "ekfac": ("A_vectors", "B_vectors", "eigenvalues"),
}
FACTORS = {"A", "B", "moments", "squares"}.union(*INVERSES.values())
"""Entries of a parameter's state with a dtype of their own."""
COUNTERS = ("updates", "moment_updates", "outliers")
OUTLIER = 1e3
"""Factors with a mean eigenvalue this many times the running one, or 1 / this, are outliers."""


@dataclass(frozen=True)
class Measured:
    """What all workers saw in one step: new factors by block, and what a mean divides by."""

    factors: Mapping[Block, Mapping[str, Tensor]]
    total: float
    found: Mapping[Tensor, Contribution] = field(default_factory=dict)  # of this worker

    def scale(self, watch: FactorWatch, workers: Workers) -> float:
        """What sums over samples are divided by."""
        return divided_by(self.total, watch, workers)


@dataclass(frozen=True)
class Gathered:
    """Sums over all workers by block, with ``count`` what their inputs' are divided by."""

    sums: Mapping[Block, Mapping[str, Tensor]]
    total: float
    found: Mapping[Tensor, Contribution]  # of this worker


def gathered(
    blocks: Sequence[Block],
    watch: FactorWatch,
    workers: Workers,
    zeros: Callable[[Block], Mapping[str, Tensor]],  # what a worker adds that did not see a block
) -> Gathered:
    """What all workers collected, of the blocks of which one saw a sample.

    Raises:
        RuntimeError: passes whose loss was not seen, here or by another worker.
    """
    found, failure = dict[Tensor, Contribution](), None
    try:
        found = dict(watch.found())
    except RuntimeError as reason:
        failure = reason
    if failure is not None and workers.count == 1:
        raise failure
    many = workers.count > 1
    seen = [block for block in blocks if many or block.key in found]
    sums = [found[b.key].sums if b.key in found else zeros(b) for b in seen]
    values_of_all = [value for each in sums for value in each.values()]
    total, flat = 0.0 if failure else watch.total, iter(values_of_all)
    if many:
        device = blocks[0].key.device if blocks else None
        numbers = torch.tensor([total, float(failure is not None)], device=device)
        flat = iter(workers.sums([numbers, *values_of_all]))
        total, failures = next(flat).tolist()
        if failure is not None:
            raise failure
        if failures:
            raise RuntimeError("another worker could not collect factors; its error says why")
    values = {
        block: {name: next(flat) for name in each} for block, each in zip(seen, sums, strict=True)
    }
    kept = {block: each for block, each in values.items() if not many or each["count"]}
    return Gathered(kept, total, found)


def measured(blocks: Sequence[Block], watch: FactorWatch, workers: Workers, most: int) -> Measured:
    """A, B and moments over all workers, of the blocks of which one saw a sample.

    Raises:
        RuntimeError: passes whose loss was not seen, here or by another worker.
    """
    new = gathered(blocks, watch, workers, lambda block: _zeros(block, watch, most))
    total = divided_by(new.total, watch, workers)
    factors = dict[Block, Mapping[str, Tensor]]()
    for block, sums in new.sums.items():
        found = {name: value / total for name, value in sums.items() if name == "moments"}
        factors[block] = {
            "A": cut(sums["input"] / sums["count"], most),
            "B": cut(_output(sums["grad_output"] / total, watch), most),
        } | found
    return Measured(factors, new.total, new.found)


def divided_by(total: float, watch: FactorWatch, workers: Workers) -> float:
    """What sums over samples are divided by."""
    return (total or 1.0) if watch.averages else float(workers.count)


def update_factors(
    blocks: Sequence[tuple[Block, State, float]],  # with the decay of its running averages
    new: Mapping[Block, Mapping[str, Tensor]],
    dtype: torch.dtype | None = None,
) -> list[Block]:
    """``A <- A + (1 - β)/(1 - βᵗ) (A_t - A)``: weights βᵗ⁻ʲ for update j, normalised; B likewise.

    Factors that were not seen leave a block as it is, and so do those that are not finite, or
    outliers (`OUTLIER`): such blocks are returned.
    """
    given = [each for each in blocks if each[0] in new]
    left_out = []
    for (block, state, decay), (counts, again, outliers) in zip(
        given, _judged([(new[block], state) for block, state, _ in given]), strict=True
    ):
        if again:
            forget(state)
        if outliers or "outliers" in state:
            state["outliers"] = outliers
        if counts:
            _average(state, new[block], "AB", "updates", decay, dtype)
        else:
            left_out.append(block)
    return left_out


def fresh_moments(
    blocks: Sequence[Block],
    fresh: Collection[Block],  # those with a new eigenbasis
    new: Measured,
    watch: FactorWatch,
    workers: Workers,
    states: Mapping[Tensor, State],
) -> dict[Block, Tensor]:
    """The second moments of this step, in the eigenbasis that each block has now."""
    found = {b: new.factors[b]["moments"] for b in blocks if "moments" in new.factors[b]}
    kept = {block for block in fresh if watch.keep or block.key not in watch.bases}
    late = [block for block in blocks if block in kept]
    sums = []
    for block in late:
        state = states[block.key]
        if block.key in new.found:
            joint = watch.parameters[block.key]
            basis = state["A_vectors"], state["B_vectors"]
            sums.append(new.found[block.key].moments(basis, joint))
        else:
            sums.append(torch.zeros_like(state["eigenvalues"]))
    scale = new.scale(watch, workers)
    each = zip(late, workers.sums(sums), strict=True)
    return found | {block: total / scale for block, total in each}


def update_moments(
    blocks: Sequence[tuple[Block, State, float]],
    new: Mapping[Block, Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """The running averages of second moments in the eigenbasis, likewise."""
    given = [each for each in blocks if each[0] in new]
    for (block, state, decay), finite in zip(
        given, all_finite([new[block] for block, _, _ in given]), strict=True
    ):
        if finite:
            values = {"moments": new[block]}
            _average(state, values, ("moments",), "moment_updates", decay, dtype)


def _average(
    state: State,
    new: Mapping[str, Tensor],
    names: Sequence[str],
    counter: str,
    decay: float,
    dtype: torch.dtype | None,
) -> None:
    if any(name in state and state[name].shape != new[name].shape for name in names):
        forget(state)  # other parameters of the layer learn than before
    state[counter] = state.get(counter, 0) + 1
    weight = share(decay, state[counter])
    for name in names:
        old = state.setdefault(name, new[name].to(dtype or new[name].dtype))
        state[name] = old.lerp(new[name].to(old), weight)


def _judged(
    pairs: Sequence[tuple[Mapping[str, Tensor], State]],
) -> list[tuple[bool, bool, int]]:
    """Whether new factors count, whether averages start again, and outliers in a row."""
    if not pairs:
        return []
    device = pairs[0][0]["A"].device
    each = [
        _mean(source[name]).to(device) if name in source else torch.zeros((), device=device)
        for new, state in pairs
        for source in (new, state)
        for name in "AB"
    ]
    sizes = torch.stack(each).cpu().reshape(-1, 2, 2)
    outliers = torch.tensor([state.get("outliers", 0) for _, state in pairs])
    found = judged(sizes[:, 0], sizes[:, 1], outliers, OUTLIER)
    return list(zip(*(tensor.tolist() for tensor in found), strict=True))


def _mean(factor: Tensor) -> Tensor:
    """Its diagonal bounds all other entries, so that one number shows whether it is finite."""
    return factor.diagonal(dim1=-2, dim2=-1).mean(dtype=torch.float32)


def forget(state: State) -> None:
    """Drop all factors, with what was made of them."""
    for name in (*(FACTORS - {"squares"}), *COUNTERS):
        state.pop(name, None)


def _output(b: Tensor, watch: FactorWatch) -> Tensor:
    if watch.kfac.fisher == "forward-only":
        return torch.eye(b.shape[-1], dtype=b.dtype, device=b.device).expand_as(b).contiguous()
    return b


def _zeros(block: Block, watch: FactorWatch, most: int) -> dict[str, Tensor]:
    """What a worker adds that did not see a block, in the order of what others do."""
    groups, d, a = block.shape
    moments: dict[str, tuple[int, ...]] = {}
    if block.key in watch.bases and not watch.keep:
        q, r = watch.bases[block.key]
        moments = {"moments": (groups, *(f[0].flatten(0, -2).shape[0] for f in (r, q)))}
    groups = groups if watch.kfac.per_group else 1
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
    flat: list[Damped] = []
    for (_, state, damping), owner in zip(ready, workers.owners(costs), strict=True):
        a, b = state["A"], state["B"]
        if owner != workers.rank:
            flat += _nothing(a, b, inverse)
        else:
            flat += damped(a, b, damping) if inverse == "cholesky" else spectrum(a, b)
    values = iter(workers.sums(inverted(flat)))
    for _, state, _ in ready:
        state.update((name, next(values)) for name in INVERSES[inverse])
        for name in ("moments", "moment_updates"):  # they belong to the basis before
            state.pop(name, None)


def _nothing(a: Tensor, b: Tensor, inverse: Inverse) -> list[Tensor]:
    first, second = (torch.zeros_like(factor, dtype=wide(factor)) for factor in (a, b))
    if inverse == "cholesky":
        return [first, second]
    rows, columns = (f[0].flatten(0, -2).shape[0] for f in (b, a))
    return [first, second, first.new_zeros(len(a), rows, columns)]


def preconditioned(rows: Tensor, state: State, damping: float) -> Tensor:  # (g, d, a)
    """``P(G) = (B + √λ/π I)⁻¹ G (A + π√λ I)⁻¹``, or ``(B ⊗ A + λ I)⁻¹ G`` in the eigenbasis."""
    if "A_inverse" in state:
        left, right = state["B_inverse"], state["A_inverse"]
        found = from_left(left, from_right(rows.to(left.dtype), right))
        return found[..., : rows.shape[-2], : rows.shape[-1]].to(rows.dtype)
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
    if "A" in state and state["A"].device == device:
        return
    for name in FACTORS & state.keys():
        state[name] = state[name].to(device)
