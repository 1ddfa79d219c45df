"""A batch and parts of it, on which sums are scaled to be unbiased for all."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tnconv.losses.reductions import divisor, reduction_of
from tnconv.models.computing import Inputs
from tnconv.models.propagation import LossFunction
from tnconv.operators.low_rank.sending import SentBatch
from tnconv.quantities.base import Vectors


@dataclass(frozen=True)
class Batch:
    """A batch, parts of it, and what makes sums over a part unbiased for all."""

    model: nn.Module
    loss_fn: LossFunction
    inputs: Inputs
    targets: Any
    size: int
    batch_dim: int = 0

    def with_vectors(self, source: Vectors, positions: tuple[int, ...] | None) -> SentBatch:
        """The samples at some positions, with vectors of theirs."""
        return SentBatch(self.model, self.loss_fn, *self.part(positions), source, self.batch_dim)

    def positions(self, name: str, given: Sequence[int] | Tensor | None) -> tuple[int, ...] | None:
        """Positions in the batch, as `positions` checks them."""
        return positions(name, given, self.size)

    def part(self, positions: tuple[int, ...] | None) -> tuple[Inputs, Any]:
        """The inputs and targets at some positions.

        Raises:
            ValueError: targets of another size than the batch.
        """
        if positions is None:
            return self.inputs, self.targets
        for each in tree_leaves(self.targets):
            if isinstance(each, Tensor) and each.dim() and len(each) != self.size:
                raise ValueError(
                    f"targets have shape {tuple(each.shape)}; expected a row for each of "
                    f"{self.size} samples, of which some are chosen"
                )

        def chosen(each: Any, dim: int) -> Any:
            if isinstance(each, Tensor) and each.shape[dim : dim + 1] == (self.size,):
                return each.index_select(dim, torch.tensor(positions, device=each.device))
            return each

        found = tree_map(partial(chosen, dim=self.batch_dim), self.inputs)
        return found, tree_map(partial(chosen, dim=0), self.targets)

    def scale(self, positions: tuple[int, ...] | None) -> float:
        """``N/K · r/r_K`` with the factors of the loss's reduction on all and on K samples."""
        if positions is None:
            return 1.0
        ratio = self.size / len(positions)
        if reduction_of(self.loss_fn) == "mean":
            part = divisor(self.loss_fn, *self.part(positions), self.batch_dim)
            ratio *= part / divisor(self.loss_fn, self.inputs, self.targets, self.batch_dim)
        return ratio


def positions(name: str, given: Sequence[int] | Tensor | None, size: int) -> tuple[int, ...] | None:
    """Positions in a batch, checked; None for all.

    Raises:
        ValueError: none at all, one outside the batch, or one that is repeated.
    """
    if given is None:
        return None
    found = tuple(int(each) for each in given)
    if not found or min(found) < 0 or max(found) >= size:
        raise ValueError(f"{name} are {found}; expected positions from 0 to {size - 1}")
    if repeated := sorted({each for each in found if found.count(each) > 1}):
        which = ", ".join(map(str, repeated))
        raise ValueError(f"{name} have {which} repeated; expected positions, each once")
    return None if found == tuple(range(size)) else found
