"""Rows of a Jacobian, within a memory limit: held where they fit, or else sent when needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tnconv.diagrams.errors import TooLittleMemory
from tnconv.models.modules import unwrapped
from tnconv.models.propagation import LossFunction
from tnconv.operators.low_rank.orders import Orders
from tnconv.operators.low_rank.row_products import Rows
from tnconv.operators.low_rank.rows import JacobianRows, RowsObservation
from tnconv.operators.low_rank.sending import SentBatch
from tnconv.operators.low_rank.sending_schedules import Needs
from tnconv.operators.low_rank.sent_rows import SentRows, SentVectors
from tnconv.operators.low_rank.sources import Given
from tnconv.quantities.base import Vectors


@dataclass(frozen=True)
class Limit:
    """How many bytes vectors, products and Gram matrices may hold; any number where it is None.

    ``order`` is how Gram matrices are contracted, as in `JacobianRows`, ``groups`` the number of
    these matrices.
    """

    size: int | None = None
    order: Orders = "auto"
    groups: int = 1

    def __post_init__(self) -> None:
        if self.size is not None and self.size <= 0:
            raise ValueError(f"memory_limit is {self.size}; expected a positive number of bytes")

    def rows(self, batch: SentBatch, other: JacobianRows | None = None) -> Rows:
        """The rows of a batch; ``other`` ones are held beside them.

        Raises:
            TooLittleMemory: a limit below what two vectors need, before any is sent.
        """
        if self.size is None:
            return self._of(batch)
        with batch.running() as sender:
            vectors, owners = sender.vectors(batch.source)
            needs = Needs(sender, vectors, sender.footprint(), self.order, self.groups, other)
            if (left := needs.left_beside_all(self.size)) is not None:
                return sender.kept(vectors, left, self.order)
            schedule, samples = needs.schedule(self.size), sender.size
        named = unwrapped(batch.model).named_parameters()
        like = {name: p.detach() for name, p in named if p.requires_grad}
        source = SentVectors(batch, vectors, owners, samples, schedule, self.order)
        return SentRows(source, like, len(vectors), samples)

    def both(self, columns: SentBatch, gradients: SentBatch) -> tuple[Rows, JacobianRows]:
        """The rows of columns, and those of gradients of other samples, which are held.

        Raises:
            TooLittleMemory: a limit below what is needed, before vectors of columns are sent.
        """
        if self.size is None:
            return self._of(columns), self._of(gradients)
        other = self._gradients(gradients, self.size)
        rows = self.rows(columns, other)
        if isinstance(rows, JacobianRows):
            other = replace(other, memory_limit=rows.memory_limit)
        return rows, other

    def _of(self, batch: SentBatch) -> JacobianRows:
        how = batch.model, batch.loss_fn, batch.inputs, batch.targets, batch.source
        return JacobianRows.of(*how, None, batch.batch_dim, self.order, keep=True)

    def _gradients(self, batch: SentBatch, size: int) -> JacobianRows:
        """Rows that half of the limit is for."""
        with batch.running() as sender:
            sender.order = self.order
            asked = sender, sender.loss_fn, sender.output, sender.targets
            return held_within(size, {batch.source: None}, *asked)[0]


def held_within(
    limit: int,
    wanted: Mapping[Vectors, Sequence[int] | None],
    observation: RowsObservation,
    loss_fn: LossFunction,
    output: Tensor,
    targets: Any,
) -> list[JacobianRows]:
    """Rows of sources of vectors, some samples' or all, that are held in one half of a limit.

    Raises:
        TooLittleMemory: they would take more, before any is sent.
    """
    given, total = dict[Given, Sequence[int] | None](), 0
    for source, chosen in wanted.items():
        vectors, _ = observation.drawn(source, loss_fn, output, targets)
        given[Given(vectors)] = chosen
        with observation.propagating(output) as propagation:
            each = propagation.footprint(chosen).total
        total += vectors.nbytes + len(vectors) * each
    if 2 * total > limit:
        raise TooLittleMemory(
            f"memory_limit is {limit} bytes; expected at least {2 * total}, twice what vectors "
            "after all layers hold",
            2 * total,
        )
    observation.send_given(given, loss_fn, output, targets)
    return observation.taken(given, limit - total)
