"""Vectors after a model's output, on their way backwards through its layers, a few at a time.

Where all operations on the way have rules for it, they go together (`tnconv.recursions`), else one
by one through autograd's engine, whose hooks after layers hand them over.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from tnconv.models.arrangement import narrowed
from tnconv.models.calls import Call, Pass
from tnconv.models.collector import Collector
from tnconv.models.evidence import unseen
from tnconv.models.graph import before, sources
from tnconv.models.meetings import Meeting
from tnconv.models.sample_maps import Shared, is_fast
from tnconv.models.vector_products import vector_products
from tnconv.quantities.base import LOSS_GRADIENT, Vectors
from tnconv.recursions import ColumnPlan, Rows, column_plan

LossFunction = Callable[[Any, Any], Tensor]
AT_A_TIME = 32  # vectors that are held after all layers
FRONT = 2**24  # bytes of vectors after one layer, where rows line up
BLOCK = 2**23  # bytes of vectors of one block of samples: what caches hold


@dataclass(frozen=True)
class Footprint:
    """What each vector holds on its way, in bytes: the most, and while a layer's are worked on.

    ``total`` is what is held after all layers together.
    """

    most: int
    after: Mapping[Call, int]
    total: int


class Propagation:
    """All vectors but the loss's gradient, from an output to the layers that it depends on.

    While one of them is under way in autograd's engine, hooks after layers hand them to `receive`.
    Statistics that add up over vectors get them in parts, as few at a time as the collector's
    memory limit asks for.
    """

    def __init__(
        self,
        collector: Collector,
        passes: Sequence[Pass],
        output: Tensor,
        meetings: Mapping[Pass, Meeting],
    ) -> None:
        self.nodes = nodes = before([output])
        self.calls: dict[Call, Pass] = {
            call: here
            for here in passes
            for call in here.calls
            if call.edge is not None and call.edge.node in nodes
        }
        self.collector, self.output = collector, output
        self._ends = sources(list(self.calls))
        self._meetings: dict[Meeting, list[Call]] = {}
        for here in passes:
            if here in meetings:
                found = meetings[here].calls_behind(nodes)
                self._meetings[meetings[here]] = found
                self.calls.update((call, here) for call in found)
                self._ends += meetings[here].stops(found)
        self._source: Vectors = LOSS_GRADIENT
        self._part = 0
        self._held: dict[Call, Tensor] | None = None
        self._at, self._count = 0, 1  # the vector under way, of how many
        self._plan: ColumnPlan | None = None
        self._calls = {call: call for call in self.calls}  # as they are handed over
        self._rows = Rows()
        self._block: int | None = None  # bytes from which on samples go block by block
        self.narrowed = set[Vectors]()  # those that were sent for chosen samples alone

    def _planned(self, samples: int = 1) -> ColumnPlan | None:
        """How vectors go together, if they can; checkpoints run again in the engine alone."""
        calls = list(self.calls)
        if self._meetings or not calls or any(call.recomputed for call in calls):
            return None
        ends = [(call.edge.node, call.edge.output_nr) for call in calls if call.edge is not None]
        if len({*ends}) < len(calls):
            return None
        return column_plan(get_gradient_edge(self.output), ends, samples)

    def run(
        self,
        loss_fn: LossFunction,
        targets: Any,
        factor: float = 1.0,
        owners: Tensor | None = None,
        chosen: Mapping[Vectors, Sequence[int] | None] | None = None,
    ) -> None:
        """Send the vectors of every source for the loss times a factor.

        ``owners`` are the samples of the output's entries, where rows are no samples. ``chosen``
        are the sources that are wanted, with the samples that they are wanted of, as for
        `Observation.propagate`.

        Raises:
            RuntimeError: a vector that passed a layer unseen.
        """
        with self._unmarked():
            for source in self.collector.sources:
                if source == LOSS_GRADIENT or (chosen is not None and source not in chosen):
                    continue
                self._source = source
                self._choose(None if chosen is None else chosen[source], self._adds_up(source))
                parts = self.parts(source, loss_fn, targets, owners, self._at_a_time(source))
                for self._part, vectors in enumerate(parts):
                    self._send(vectors if factor == 1 else sqrt(factor) * vectors)
                self.collector.close(self.calls, source)

    def parts(
        self,
        source: Vectors,
        loss_fn: LossFunction,
        targets: Any,
        owners: Tensor | None = None,
        size: int = sys.maxsize,
    ) -> Iterator[Tensor]:
        """The vectors of a source, so many at a time; ``owners`` as for `run`."""
        given = loss_fn, self.output.detach(), targets, size
        parts: Callable[..., Iterator[Tensor]] = source.parts
        if owners is not None and source.by_sample:
            parts = partial(parts, owners=owners)
        return parts(*given)

    def send(self, vectors: Tensor, source: Vectors) -> None:
        """Send some vectors, all at once: what arrives counts as a source's.

        Raises:
            RuntimeError: a vector that passed a layer unseen.
        """
        with self._unmarked():
            self._source, self._part = source, 0
            self._choose(None)
            self._send(vectors)

    def footprint(self, chosen: Sequence[int] | None = None) -> Footprint:
        """What vectors of chosen samples, or of all, would hold: from shapes alone."""
        self._choose(chosen)
        own = {call: self._bytes(call) for call in self.calls}
        uses = {p for here in {*self.calls.values()} for p, count in here.uses.items() if count > 1}
        tied = {call for call in own if any(p in uses for _, p in call.parameters)}
        total = sum(own.values())
        waiting = 2 * sum(own[call] for call in tied)  # until all have arrived, and then joined
        if self._plan is None:
            held = total + waiting
            return Footprint(held, dict.fromkeys(own, held), total)
        ends = {(c.edge.node, c.edge.output_nr): c for c in own if c.edge is not None}
        most, taken = self._plan.held(self._rows, ends)
        after = {ends[edge]: held + waiting for edge, held in taken.items()}
        return Footprint(most + waiting, after, total)

    def _bytes(self, call: Call) -> int:
        """What a vector takes after a call."""
        entries = prod(self._calls[call].output_shape)
        if isinstance(call.map, Shared):
            entries *= self.calls[call].samples
        return entries * self.output.element_size()

    def receive(self, here: Pass, call: Call, vector: Tensor) -> None:
        """Take what a vector became after a layer."""
        if call not in self.calls:
            return
        if self._held is None:
            self._hand_over(call, vector.unsqueeze(0))
        else:
            if call not in self._held:  # all are placed at once: a list would be copied
                self._held[call] = vector.new_empty(self._count, *vector.shape)
            self._held[call][self._at] = vector

    def _at_a_time(self, source: Vectors) -> int:
        needed = [each for each in self.collector.statistics if each.vectors == source]
        if any(each.parts is None for each in needed):
            return sys.maxsize
        if any(each.parts == "rows" for each in needed):
            shapes = [call.output_shape for call in self._calls.values()]
            largest = max(map(prod, shapes), default=0) * self.output.element_size()
            return max(1, FRONT // max(1, largest))
        if self.collector.memory_limit is None:
            return AT_A_TIME
        entries = sum(prod(call.output_shape) for call in self.calls)
        fit = self.collector.memory_limit // max(1, entries * self.output.element_size())
        return max(1, min(AT_A_TIME, fit))

    def _send(self, vectors: Tensor) -> None:
        """One vector is worked on layer by layer, while it is in the cache; several are held."""
        if self._plan is not None and len(vectors):
            self._send_together(self._plan, vectors)
            return
        held: dict[Call, Tensor] = {}
        self._held, self._count = None if len(vectors) == 1 else held, len(vectors)
        for self._at, vector in enumerate(vectors):
            self._backward(vector)
        for call in self.calls if len(vectors) != 1 else ():
            if call in held:
                self._hand_over(call, held.pop(call))
            elif not len(vectors):
                shape = self._calls[call].output_shape
                if isinstance(call.map, Shared):
                    shape = (self.calls[call].samples, *shape)
                self._hand_over(call, self.output.new_empty(0, *shape))
        self.collector.settle(self._source)

    def _send_together(self, plan: ColumnPlan, vectors: Tensor) -> None:
        """Layers are worked on in the order of the walk: nothing but its front is held."""
        calls = {(c.edge.node, c.edge.output_nr): c for c in self.calls if c.edge is not None}

        def take(call: Call, v: Tensor, rows: Rows) -> None:
            call.reached = True
            given = self._calls[call] if rows is self._rows else narrowed(call, rows)
            shape = (v.shape[0], *given.output_shape)
            self._hand_over(call, v if v.shape == shape else v.reshape(shape), given, rows.begin)

        for call in self.calls:
            call.reached = False
        takes = {end: partial(take, call) for end, call in calls.items()}
        plan.send(self._rows.of(vectors, 1), self._rows, takes, self._block)
        self._expect_all()
        self.collector.settle(self._source)

    def _expect_all(self) -> None:
        for call in self.calls:
            if not call.reached:
                raise unseen(call)

    def _hand_over(
        self, call: Call, vectors: Tensor, given: Call | None = None, begin: int = 0
    ) -> None:
        here, count = self.calls[call], vectors.shape[0]
        how = self._source, count, self._part, begin
        self.collector.receive(here, given or self._calls[call], vectors, *how)

    def _choose(self, chosen: Sequence[int] | None, in_blocks: bool = False) -> None:
        """Send vectors of some samples alone, or of all block by block.

        Either needs to know where the rows of samples are.
        """
        self._block = None
        samples = {here.samples for here in self.calls.values()}
        if (chosen is not None or in_blocks) and len(samples) == 1 and self._has_rows():
            size = samples.pop()
            plan, rows = self._planned(size), Rows(size)
            parts = {call: call for call in self.calls}
            if chosen is not None:
                rows = Rows(size, torch.tensor(chosen, device=self.output.device))
                parts = {call: narrowed(call, rows) for call in self.calls}
            if plan is not None and all(part.described for part in parts.values()):
                self._plan, self._rows, self._calls = plan, rows, parts
                if chosen is None:
                    self._block = BLOCK
                else:
                    self.narrowed.add(self._source)
                return
        self._rows, self._calls = Rows(), {call: call for call in self.calls}
        self._plan = self._planned()

    def _adds_up(self, source: Vectors) -> bool:
        """Whether samples may come block by block: all that is made of them adds up over them.

        Accelerators gain nothing by it.
        """
        tied = any(n > 1 for here in {*self.calls.values()} for n in here.uses.values())
        needed = [each for each in self.collector.statistics if each.vectors == source]
        return (
            self.output.is_cpu
            and not tied
            and all(
                each.samples is None and not each.joint and each.parts == "sum" for each in needed
            )
        )

    def _has_rows(self) -> bool:
        """Whether row n of the output, and of what layers read and gave, is sample n's."""
        given = [pair for here in {*self.calls.values()}
                 for pair in zip(here.outputs, here.maps, strict=False)]  # fmt: skip
        maps = {known for output, known in given if output is self.output}
        own = (call.described and call.map is not None and is_fast(call.map) for call in self.calls)
        return len(maps) == 1 and all(map(is_fast, maps)) and all(own)

    def _backward(self, vector: Tensor) -> None:
        for call in self.calls:
            call.reached = False
        vector_products([self.output], self._ends, [vector])
        for found, calls in self._meetings.items():
            found.flush(calls, vector)
        self._expect_all()

    @contextmanager
    def _unmarked(self) -> Iterator[None]:
        """What the loss's own gradient reached stays noted."""
        reached = {call: call.reached for call in self.calls}
        try:
            yield
        finally:
            for call, was in reached.items():
                call.reached = was
