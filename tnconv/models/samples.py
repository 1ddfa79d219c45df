"""Which sample each row of each call's output, and of a model's outputs, belongs to.

The evidence are coded backward passes (`tnconv.models.coded`) from the model's outputs, on the
graph that is there anyway. They start from what is to be shown, whose the outputs' rows are: that
is held against layers that read the model's inputs (`tnconv.models.anchors`).

What was found is kept for each model and signature of its calls. Sizes are checked at every batch;
every `EVERY`-th runs the passes again.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from tnconv.models.anchors import is_batched
from tnconv.models.calls import Call, Pass
from tnconv.models.capture import Watch
from tnconv.models.checkpoints import refuse_reentrant_nodes
from tnconv.models.coded_passes import CodedPasses, Found
from tnconv.models.graph import before
from tnconv.models.operation_graph import Graph
from tnconv.models.output_maps import Search, owned_roots
from tnconv.models.sample_maps import (
    Maps,
    Owned,
    SampleMap,
    Silent,
    Unknown,
    candidates,
    resized,
    whole,
)

EVERY = 200
MOST_KINDS = 64  # of batches, by operations and calls, that are remembered of a model
Signature = tuple[object, ...]
Ends = Callable[[], Sequence[GradientEdge]]
"""What samples will have to be told apart above, if anything."""


@dataclass(eq=False)
class Known:
    """What was found for one signature; ``plans`` are by structure of the graph."""

    outputs: tuple[SampleMap, ...]
    calls: tuple[SampleMap, ...]
    batched: tuple[bool, ...]
    samples: int
    batches: int = 0
    plans: dict[Any, Any] = field(default_factory=dict)
    lost: dict[Any, list[str]] = field(default_factory=dict)
    derived: dict[Any, Owned] = field(default_factory=dict)
    losses: dict[object, int] = field(default_factory=dict)  # kinds, and the batch at the check
    open: bool = False  # calls whose gradient was zero, so far
    slow: set[str] = field(default_factory=set)


_KNOWN: WeakKeyDictionary[nn.Module, dict[Signature, Known]] = WeakKeyDictionary()


class Samples:
    """Finds the maps of a watch's passes."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.passes = watch, CodedPasses(watch)
        self.around: dict[Node, Maps] = {}  # of operations in the pass that was explained last
        self._keep: Callable[[], None] | None = None

    def forget(self) -> None:
        """Keep nothing of a graph, but what is still to be confirmed."""
        self.around, self.passes.dims = {}, {}
        if self.passes.expected is None:
            self.passes.untold = set()

    def explain(self, here: Pass, graph: Graph, ends: Ends, loss: Tensor | None = None) -> Known:
        """Set the map of every call of a pass, whose outputs have a graph below them.

        Args:
            here: the pass.
            graph: what is below its outputs.
            ends: what samples will have to be told apart above.
            loss: one whose backward pass will follow in `confirming`: that saves a coded pass.

        Raises:
            NotImplementedError: no output tells the samples apart.
        """
        kept = _KNOWN.setdefault(self.watch.model, {})
        signature = _signature(self.watch.model, here, graph)
        known = kept.get(signature)
        if known is not None:
            here.size = known.samples if known.samples in here.sizes else here.size
        if here.samples <= 1:
            known = _of_one(here)
        elif known is None or not self._still(known, here):
            found = known = self._searched(here, graph, ends(), loss)

            def keep() -> None:
                kept[signature] = found
                if len(kept) > MOST_KINDS:
                    del kept[next(iter(kept))]

            if self.passes.expected is None:
                keep()
            else:
                self._keep = keep
        known.batches += 1
        here.batched = known.batched
        here.maps = tuple(
            resized(m, tuple(y.shape), here.samples) or m
            for m, y in zip(known.outputs, here.outputs, strict=True)
        )
        for call, m in zip(here.calls, known.calls, strict=True):
            call.map = resized(m, call.output_shape, here.samples) or m
        return known

    @contextmanager
    def confirming(self, here: Pass, known: Known | None) -> Iterator[None]:
        """The loss's backward pass, which confirms what one coded pass has shown.

        Raises:
            Contradiction: it does not; nothing was kept.
        """
        keep, self._keep = self._keep, None
        calls = list(here.calls)
        with self.passes.confirming():
            yield
        if keep is not None and known is not None:
            known.open = self._leaves_open(here, calls)
            keep()
        self.passes.untold = set()

    def _still(self, known: Known, here: Pass) -> bool:
        """Whether sizes agree with what is known, and, now and then, codes."""
        shapes = [tuple(y.shape) for y in here.outputs]
        pairs = [*zip(known.outputs, shapes, strict=True)]
        pairs += zip(known.calls, (call.output_shape for call in here.calls), strict=True)
        if any(resized(found, shape, here.samples) is None for found, shape in pairs):
            return False
        if known.batches % EVERY and not known.open:
            return True
        maps = [resized(m, s, here.samples) for m, s in zip(known.outputs, shapes, strict=True)]
        was_known = zip(here.calls, known.calls, strict=True)
        self.passes.dims = {call: was.dim for call, was in was_known if isinstance(was, Owned)}
        found, _ = self.coded(here, [m or Silent() for m in maps])
        calls = []
        for call, was in zip(here.calls, known.calls, strict=True):
            now = found[call]
            if call in self.passes.untold and not isinstance(was, Silent):
                now = was
            elif not isinstance(was, Silent) and now != resized(
                was, call.output_shape, here.samples
            ):
                return False
            calls.append(now)
        known.calls, known.open = tuple(calls), self._leaves_open(here, here.calls)
        return True

    def _searched(
        self, here: Pass, graph: Graph, ends: Sequence[GradientEdge], loss: Tensor | None
    ) -> Known:
        """The first batch size among the inputs' for which there is evidence."""
        refuse_reentrant_nodes(graph.key[0])
        first: NotImplementedError | None = None
        for size in here.sizes:
            here.size = size
            try:
                search = Search(self.watch, self.passes, here, graph, ends)
                search.run(loss)
            except NotImplementedError as error:
                first = first or error
                continue
            self.around = search.around
            maps = tuple(search.seen[call] for call in here.calls)
            known = Known(tuple(search.maps), maps, search.batched, here.samples)
            known.open = self._leaves_open(here, here.calls)
            return known
        here.size = None
        assert first is not None
        raise first

    def coded(
        self,
        here: Pass,
        maps: Sequence[SampleMap],
        nodes: Collection[Node] = (),
        ends: Sequence[GradientEdge] = (),
    ) -> Found:
        """Send cotangents from the outputs, whose maps are known: those of calls and nodes."""
        return self.passes.sent(owned_roots(here, maps), here, nodes, ends)

    def _leaves_open(self, here: Pass, calls: Sequence[Call]) -> bool:
        """Whether a call of which too little is known could show more in another batch."""
        open_calls = [call for call in calls if call in self.passes.untold]
        nodes = before(here.outputs) if open_calls else set()
        return any(call.edge is not None and call.edge.node in nodes for call in open_calls)

    def of(self, output: Tensor, here: Pass, known: Known) -> SampleMap:
        """The map of a tensor that was made of the model's outputs, or of its layers'.

        What codes on it do has to agree with the maps of the calls behind.
        """
        for y, m in zip(here.outputs, here.maps, strict=True):
            if y is output:
                return m
        shape = tuple(output.shape)
        if here.samples <= 1:
            return whole(shape, here.samples)
        kept = known.derived.get(len(shape))
        if kept is not None and (found := resized(kept, shape, here.samples)) is not None:
            return found
        behind = before([output])
        calls = [c for c in here.calls if c.edge is not None and c.edge.node in behind]
        for possible in candidates(shape, here.samples):
            maps, _ = self.passes.sent([(output, possible)], here, calls=calls)
            told = [(maps[c], c.map) for c in calls if isinstance(c.map, Owned)]
            live = [pair for pair in told if not isinstance(pair[0], Silent)]
            if live and all(one == other for one, other in live):
                known.derived[len(shape)] = possible
                return possible
        return Unknown(f"no dimension of shape {shape} tells them apart")


def _of_one(here: Pass) -> Known:
    """One sample, which owns all rows, or none at all."""
    return Known(
        tuple(whole(tuple(y.shape), here.samples) for y in here.outputs),
        tuple(whole(call.output_shape, here.samples) for call in here.calls),
        tuple(is_batched(here, each) for each in here.leaves),
        here.samples,
    )


def _signature(model: nn.Module, here: Pass, graph: Graph) -> Signature:
    """What batches of one kind have in common: operations, calls, ranks and modes, but no sizes."""
    calls = tuple(
        (c.name, c.module.training, len(c.output_shape), tuple(name for name, _ in c.parameters))
        for c in here.calls
    )
    outputs = tuple((y.dim(), y.requires_grad) for y in here.outputs)
    inputs = tuple(x.dim() if isinstance(x, Tensor) else type(x) for x in here.leaves)
    return model.training, here.batch_dim, calls, outputs, inputs, graph.key
