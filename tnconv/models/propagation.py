"""Vectors after a model's output, on their way backwards through its layers, a few at a time."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from tnconv.models.calls import Call, Pass
from tnconv.models.collector import Collector
from tnconv.models.evidence import unseen
from tnconv.models.graph import before, sources
from tnconv.models.meetings import Meeting
from tnconv.models.sample_maps import Shared
from tnconv.quantities.base import LOSS_GRADIENT, Vectors

LossFunction = Callable[[Any, Any], Tensor]
AT_A_TIME = 32  # vectors that are held after all layers


class Propagation:
    """All vectors but the loss's gradient, from an output to the layers that it depends on.

    While one of them is under way, hooks after layers hand them to `receive`. Statistics that add
    up over vectors get them in parts, as few at a time as the collector's memory limit asks for.
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

    def run(
        self,
        loss_fn: LossFunction,
        targets: Any,
        factor: float = 1.0,
        owners: Tensor | None = None,
    ) -> None:
        """Send the vectors of every source for the loss times a factor.

        ``owners`` are the samples of the output's entries, where rows are no samples.

        Raises:
            RuntimeError: a vector that passed a layer unseen.
        """
        with self._unmarked():
            for source in self.collector.sources:
                if source == LOSS_GRADIENT:
                    continue
                self._source = source
                given = loss_fn, self.output.detach(), targets, self._at_a_time(source)
                parts: Callable[..., Iterator[Tensor]] = source.parts
                if owners is not None and source.by_sample:
                    parts = partial(parts, owners=owners)
                for self._part, vectors in enumerate(parts(*given)):
                    self._send(vectors if factor == 1 else sqrt(factor) * vectors)
                self.collector.close(self.calls, source)

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
        if self.collector.memory_limit is None:
            return AT_A_TIME
        entries = sum(prod(call.output_shape) for call in self.calls)
        fit = self.collector.memory_limit // max(1, entries * self.output.element_size())
        return max(1, min(AT_A_TIME, fit))

    def _send(self, vectors: Tensor) -> None:
        """One vector is worked on layer by layer, while it is in the cache; several are held."""
        held: dict[Call, Tensor] = {}
        self._held, self._count = None if len(vectors) == 1 else held, len(vectors)
        for self._at, vector in enumerate(vectors):
            self._backward(vector)
        for call in self.calls if len(vectors) != 1 else ():
            if call in held:
                self._hand_over(call, held.pop(call))
            elif not len(vectors):
                shape = call.output_shape
                if isinstance(call.map, Shared):
                    shape = (self.calls[call].samples, *shape)
                self._hand_over(call, self.output.new_empty(0, *shape))
        self.collector.settle(self._source)

    def _hand_over(self, call: Call, vectors: Tensor) -> None:
        here, count = self.calls[call], len(vectors)
        self.collector.receive(here, call, vectors, self._source, count, self._part)

    def _backward(self, vector: Tensor) -> None:
        for call in self.calls:
            call.reached = False
        how = {"retain_graph": True, "allow_unused": True}
        torch.autograd.grad(self.output, self._ends, vector, **how)
        for found, calls in self._meetings.items():
            found.flush(calls, vector)
        for call in self.calls:
            if not call.reached:
                raise unseen(call)

    @contextmanager
    def _unmarked(self) -> Iterator[None]:
        """What the loss's own gradient reached stays noted."""
        reached = {call: call.reached for call in self.calls}
        try:
            yield
        finally:
            for call, was in reached.items():
                call.reached = was
