"""Random subsets of positions, which recomputations of a checkpointed call repeat."""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import floor, prod
from typing import Literal, get_args

import torch
from torch import Tensor

from tnconv.functional.dynamo import untraced
from tnconv.generators import seed_from

Sampling = Literal["bernoulli", "fixed"]
Positions = dict[int, Tensor]
"""By dimension, those that are kept, ascending."""
PENDING = 64  # calls whose draws are remembered until a backward pass repeats them


@dataclass
class Draws:
    """Subsets drawn by ``sampling``, from torch's default generator or from one's own.

    Each call draws one number, and its subsets follow from that. Checkpointing restores the default
    generator; of draws from another one, those are remembered that a backward pass may repeat.

    Raises:
        ValueError: another ``sampling``.
    """

    sampling: Sampling
    generator: torch.Generator | None = None
    _pending: deque[tuple[torch.Size, float, int]] = field(
        default_factory=lambda: deque(maxlen=PENDING), repr=False
    )

    def __post_init__(self) -> None:
        if self.sampling not in get_args(Sampling):
            words = ", ".join(map(repr, get_args(Sampling)))
            raise ValueError(f"sampling is {self.sampling!r}; expected one of {words}")

    def positions(
        self, shares: Mapping[int, float], sizes: Sequence[int], x: Tensor
    ) -> tuple[Positions, float]:
        """Positions of some dimensions, and what makes a sum over them unbiased.

        ``shares`` are the parts of the dimensions to keep; on x's device.
        """
        if self.sampling == "bernoulli":
            return self._drawn(shares, sizes, x), prod([1 / p for p in shares.values()])
        counts = {
            dim: min(sizes[dim], max(1, floor(_constant(p) * sizes[dim])))
            for dim, p in shares.items()
        }
        scale = prod([sizes[dim] / max(1, count) for dim, count in counts.items()])
        if torch.compiler.is_compiling() and self.generator is None:
            u = {dim: _uniform(x, sizes[dim]) for dim in shares}
            return {dim: u[dim].topk(count).indices for dim, count in counts.items()}, scale
        return self._drawn(counts, sizes, x), scale

    @untraced
    def _drawn(self, kept: Mapping[int, float], sizes: Sequence[int], x: Tensor) -> Positions:
        """By numbers of positions, or by probabilities."""
        generator = torch.Generator("cpu").manual_seed(self._seed(x))
        found: Positions = {}
        for dim, share in kept.items():
            u = torch.rand(sizes[dim], generator=generator, device="cpu")
            chosen = (u < share).nonzero().flatten()
            if self.sampling == "fixed":
                chosen = u.topk(int(share)).indices.sort().values
            found[dim] = chosen.to(x.device)
        return found

    def _seed(self, x: Tensor) -> int:
        if self.generator is None:
            return seed_from(None)
        shape, checksum = x.shape, float(x.detach().double().sum())
        if _recomputes():
            for call in reversed(self._pending):
                if call[:2] == (shape, checksum):
                    self._pending.remove(call)
                    return call[2]
        seed = seed_from(self.generator)
        if _may_be_recomputed():
            self._pending.append((shape, checksum, seed))
        return seed


def _uniform(x: Tensor, count: int) -> Tensor:
    """Random numbers on x's device, which a compiled backward pass finds as they were.

    Partitioners of torch would draw once more in the backward pass what depends on no input, as
    ``torch.rand`` does: the gradient would be put where other slices were.
    """
    return torch.rand_like(x.new_empty(count, dtype=torch.float32))


def _constant(number: float) -> float:
    """The number itself; a constant with a guard where dynamo would trace a symbol.

    What it hashes it takes at its value, and numbers of positions may depend on sizes alone.
    """
    (same,) = {number}
    return same


def _recomputes() -> bool:
    """Whether a backward pass is going on: forward code in one is a recomputation."""
    running: int = torch._C._current_graph_task_id()
    return running != -1


def _may_be_recomputed() -> bool:
    """Whether hooks take what is stored, as those of checkpoints do."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def checked(keep: float | Mapping[str, float], indices: Collection[str]) -> dict[str, float]:
    """The probability for each index; a number is that of the in-channels.

    Raises:
        ValueError: a probability outside of (0, 1], or a name that is no index.
    """
    found = dict(keep) if isinstance(keep, Mapping) else {"in_channels": float(keep)}
    for name, p in found.items():
        if name not in indices:
            raise ValueError(f"keep names {name!r}; expected some of {', '.join(indices)}")
        if not 0 < p <= 1:
            raise ValueError(f"keep is {p} for {name!r}; expected a number in (0, 1]")
    return found
