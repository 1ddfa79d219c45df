"""Which sample each row of each call's output, and of a model's outputs, belongs to.

The evidence are coded backward passes (`tnconv.models.coded`) from the model's outputs, on the
graph that is there anyway. They start from what is to be shown, whose the outputs' rows are: that
is held against layers that read the model's inputs (`tnconv.models.anchors`).

What was found is kept for each model and signature of its calls. Sizes are checked at every batch;
every hundredth runs the passes again.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from tnconv.models.anchors import Anchor, Unrunnable, anchors, is_batched, replaced
from tnconv.models.calls import Call, Pass
from tnconv.models.capture import Watch, alone
from tnconv.models.checkpoints import refuse_reentrant_nodes
from tnconv.models.coded import (
    LEVELS,
    SMALL,
    Arrived,
    Codes,
    Judgement,
    arrived,
    is_small,
    judged,
)
from tnconv.models.graph import before, sources
from tnconv.models.operation_graph import Graph
from tnconv.models.sample_maps import (
    Batch,
    Maps,
    Owned,
    SampleMap,
    Shared,
    Silent,
    Unknown,
    candidates,
    resized,
    whole,
)

EVERY = 100
NODE = 1 << 20  # entries of a gradient that is asked for at an operation
NOISE = 0.1  # on parameters, where weights that are zero hide what depends on what
Signature = tuple[object, ...]
Place = Call | Node
Ends = Callable[[], Sequence[GradientEdge]]
"""What samples will have to be told apart above, if anything."""
_seeds = count(1)


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
    losses: set[object] = field(default_factory=set)
    open: bool = False  # calls whose gradient was zero, so far
    slow: set[str] = field(default_factory=set)


_KNOWN: WeakKeyDictionary[nn.Module, dict[Signature, Known]] = WeakKeyDictionary()


class Samples:
    """Finds the maps of a watch's passes; ``listening`` while a coded pass is under way."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.listening = False
        self._sketches: dict[Place, list[Arrived | None]] = {}
        self._samples, self._all_dims = 1, False
        self._dims: dict[Call, int] = {}  # where samples are expected
        self.untold: set[Place] = set()  # in the last coded passes
        self.around: dict[Node, Maps] = {}  # of operations in the pass that was explained last

    def forget(self) -> None:
        """Keep nothing of a graph."""
        self.untold, self.around, self._dims = set(), {}, {}

    def take(self, call: Call, gradient: Tensor) -> bool:
        """Look at a gradient after a call, if it is one of a coded pass."""
        if self.listening and gradient.numel() > SMALL:
            how = self._samples, self._all_dims, self._dims.get(call)
            self._sketches[call] = [arrived(gradient, *how)]
        return self.listening

    def explain(self, here: Pass, graph: Graph, ends: Ends) -> Known:
        """Set the map of every call of a pass, whose outputs have a graph below them.

        Raises:
            NotImplementedError: no output tells the samples apart.
        """
        kept = _KNOWN.setdefault(self.watch.model, {})
        signature = _signature(self.watch.model, here)
        known = kept.get(signature)
        if known is not None:
            here.size = known.samples if known.samples in here.sizes else here.size
        if here.samples <= 1:
            known = Known(
                tuple(whole(tuple(y.shape), here.samples) for y in here.outputs),
                tuple(whole(call.output_shape, here.samples) for call in here.calls),
                tuple(is_batched(here, each) for each in here.leaves),
                here.samples,
            )
        elif known is None or not self._still(known, here):
            known = kept[signature] = self._searched(here, graph, ends())
        known.batches += 1
        here.maps, here.batched = known.outputs, known.batched
        here.maps = tuple(
            _sized(m, y, here) for m, y in zip(known.outputs, here.outputs, strict=True)
        )
        for call, found in zip(here.calls, known.calls, strict=True):
            call.map = resized(found, call.output_shape, here.samples) or found
        return known

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
        self._dims = {call: was.dim for call, was in was_known if isinstance(was, Owned)}
        found, _ = self.coded(here, [m or Silent() for m in maps])
        calls = []
        for call, was in zip(here.calls, known.calls, strict=True):
            now = found[call]
            if call in self.untold and not isinstance(was, Silent):
                now = was
            elif not isinstance(was, Silent) and now != resized(
                was, call.output_shape, here.samples
            ):
                return False
            calls.append(now)
        known.calls, known.open = tuple(calls), self._leaves_open(here)
        return True

    def _searched(self, here: Pass, graph: Graph, ends: Sequence[GradientEdge]) -> Known:
        """The first batch size among the inputs' for which there is evidence."""
        refuse_reentrant_nodes(graph.nodes)
        first: NotImplementedError | None = None
        for size in here.sizes:
            here.size = size
            try:
                return self._found(here, graph, ends)
            except NotImplementedError as error:
                first = first or error
        here.size = None
        assert first is not None
        raise first

    def _found(self, here: Pass, graph: Graph, ends: Sequence[GradientEdge]) -> Known:
        possible = [
            tuple(candidates(tuple(y.shape), here.samples)) if y.requires_grad else ()
            for y in here.outputs
        ]
        if not any(possible):
            shapes = [tuple(y.shape) for y in here.outputs]
            raise NotImplementedError(
                f"no dimension of the model's outputs, of shapes {shapes}, holds {here.samples} "
                "samples, so none has a gradient of its own"
            )
        batched = tuple(is_batched(here, each) for each in here.leaves)
        guess: list[SampleMap] = [
            each[0] if each else _none(y) for each, y in zip(possible, here.outputs, strict=True)
        ]
        nodes, rigid = graph.around(end.node for end in ends)
        fixed = list(anchors(here, nodes))
        seen: dict[Place, SampleMap] = {}

        def look() -> list[Anchor]:
            nonlocal seen
            calls, around = self.coded(here, guess, nodes, ends)
            seen = {node: each[0] for node, each in around.items()}
            seen |= dict[Place, SampleMap](calls.items())
            self.around = around | dict.fromkeys(rigid, (Shared(),))
            return [each for each in fixed if each[0] not in self.untold]

        known = Known(tuple(guess), (), batched, here.samples)
        sure = _all_lead_to(fixed, guess, here)
        if sure:
            sure = _agree(look(), seen)
        if not sure or _is_open(fixed, [seen[call] for call in here.calls], seen, here):
            guess, batched = self._again(here, possible, guess, sure)
            if not sure:
                used = [each for each in look() if batched[each[2]]]
                if _contradict(used, seen):
                    raise _mixed(here)
        known.outputs, known.batched = tuple(guess), batched
        known.calls = tuple(seen[call] for call in here.calls)
        known.open = self._leaves_open(here)
        return known

    def _again(
        self,
        here: Pass,
        possible: Sequence[Sequence[Owned]],
        guess: list[SampleMap],
        sure: bool,
    ) -> tuple[list[SampleMap], tuple[bool, ...]]:
        """What running the model again says of its outputs; it has the last word.

        Raises:
            NotImplementedError: that samples see each other, or nothing where nothing else does.
        """
        batched = tuple(is_batched(here, each) for each in here.leaves)
        self.watch.paused = True
        try:
            with alone(self.watch.model, self.watch):
                found, batched = replaced(self.watch.model, here, possible)
                if not any(each.changed for each in found):  # weights that are zero hide samples
                    found, batched = replaced(self.watch.model, here, possible, noise=NOISE)
        except Unrunnable as error:
            if sure:
                return guess, batched
            raise NotImplementedError(
                "the model's inputs and outputs show no samples, and it does not run again with "
                f"one of them replaced ({error}), so none has a gradient of its own"
            ) from error
        finally:
            self.watch.paused = False
        if not sure and not any(each.changed for each in found):
            raise NotImplementedError(
                "no output of the model changes with a sample, so nothing shows whose their rows "
                "are; expected a batch whose samples differ"
            )
        for at, (each, result) in enumerate(zip(possible, found, strict=True)):
            if not each:
                continue
            if sure and (not result.changed or guess[at] in result.left):
                continue
            guess[at] = result.known or Unknown("no dimension of it changes with a sample")
        if not any(isinstance(each, Owned) for each in guess):
            raise _mixed(here)
        return guess, batched

    def coded(
        self,
        here: Pass,
        maps: Sequence[SampleMap],
        nodes: Collection[Node] = (),
        ends: Sequence[GradientEdge] = (),
        calls: Iterable[Call] | None = None,
    ) -> tuple[dict[Call, SampleMap], dict[Node, Maps]]:
        """Send cotangents from the outputs, without codes and with: the maps of calls and nodes.

        ``ends`` are where gradients have to come, beside the calls of the pass.
        """
        given = zip(here.outputs, maps, strict=True)
        roots = [(y, m) for y, m in given if isinstance(m, Owned) and y.requires_grad]
        return self.coded_from(roots, here, nodes, ends, calls)

    def coded_from(
        self,
        roots: Sequence[tuple[Tensor, Owned]],
        here: Pass,
        nodes: Collection[Node] = (),
        ends: Sequence[GradientEdge] = (),
        calls: Iterable[Call] | None = None,
    ) -> tuple[dict[Call, SampleMap], dict[Node, Maps]]:
        """As `coded`, from tensors of the pass of given maps."""
        half = any(y.dtype == torch.float16 for y, _ in roots)
        codes = Codes.drawn(here.samples, next(_seeds), 2 if half else LEVELS)
        cotangents = [codes.cotangent(y) for y, _ in roots]
        with_codes = [codes.applied(v, m) for v, (_, m) in zip(cotangents, roots, strict=True)]
        watched = list(here.calls if calls is None else calls)
        tensors, places = [y for y, _ in roots], list[Place](watched)
        places += nodes
        how = watched, nodes, ends, here
        try:
            plain = self._sent(tensors, cotangents, *how)
        except RuntimeError:
            for call in watched:
                _ = call.given  # which says so where an input was changed in place
            raise
        coded = self._sent(tensors, with_codes, *how)
        found = {place: _judged(plain.get(place), coded.get(place), codes) for place in places}
        if any(None in each for each in found.values()):  # kernels that round anew in every pass
            plain = self._sent(tensors, cotangents, *how, all_dims=True)
            coded = self._sent(tensors, with_codes, *how, all_dims=True)
            found = {place: _judged(plain.get(place), coded.get(place), codes) for place in places}
        told = {place: [each for each in of if each is not None] for place, of in found.items()}
        self.untold = {place for place, of in told.items() if not any(known for _, known in of)}
        maps = {place: tuple(m for m, _ in of) for place, of in told.items()}
        return {call: maps[call][0] for call in watched}, {node: maps[node] for node in nodes}

    def _sent(
        self,
        roots: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        calls: Sequence[Call],
        nodes: Collection[Node],
        ends: Sequence[GradientEdge],
        here: Pass,
        all_dims: bool = False,
    ) -> dict[Place, list[Arrived | None]]:
        """What arrives at calls and nodes in one pass.

        Small gradients are asked for, which takes no hooks; hooks on the way to the ``ends`` reduce
        large ones at once.
        """
        places = list[Place](calls)
        places += nodes
        asked = {place: edges for place in places if (edges := _small(place))}
        large = [call for call in calls if call not in asked]
        hooked = [node for node in nodes if node not in asked]
        inputs = [edge for edges in asked.values() for edge in edges] + sources(large)
        inputs += ends if hooked else []
        if not inputs:
            return {}
        self._sketches, self._samples, self._all_dims = {}, here.samples, all_dims
        handles = [node.register_prehook(self._look(node)) for node in hooked]
        try:
            with self._listening(here), alone(self.watch.model, self.watch):
                how = {"retain_graph": True, "allow_unused": True}
                given = iter(torch.autograd.grad(roots, inputs, cotangents, **how))
            found = self._sketches
            for place, edges in asked.items():
                each = [next(given) for _ in edges]
                if isinstance(place, Call):  # asked for before it is viewed
                    each = [None if g is None else g.reshape(place.output_shape) for g in each]
                found[place] = [None if g is None else arrived(g, here.samples) for g in each]
            return found
        finally:
            for handle in handles:
                handle.remove()
            self._sketches = {}

    def _look(self, node: Node) -> Any:
        def look(grads: tuple[Tensor | None, ...]) -> None:
            self._sketches[node] = [
                None if g is None else arrived(g, self._samples, self._all_dims) for g in grads
            ]

        return look

    @contextmanager
    def _listening(self, here: Pass) -> Iterator[None]:
        reached = {call: call.reached for call in here.calls}
        self.listening = True
        try:
            yield
        finally:
            self.listening = False
            for call, was in reached.items():
                call.reached = was

    def _leaves_open(self, here: Pass) -> bool:
        """Whether a call of which too little is known could show more in another batch."""
        open_calls = [call for call in here.calls if call in self.untold]
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
            maps, _ = self.coded_from([(output, possible)], here, calls=calls)
            told = [(maps[c], c.map) for c in calls if isinstance(c.map, Owned)]
            live = [pair for pair in told if not isinstance(pair[0], Silent)]
            if live and all(one == other for one, other in live):
                known.derived[len(shape)] = possible
                return possible
        return Unknown(f"no dimension of shape {shape} tells them apart")


def _small(place: Place) -> list[GradientEdge]:
    """Where to ask for the gradients after a call or node, if they are small.

    Nodes may be larger: hooks on them would let products run that nothing else needs.
    """
    if isinstance(place, Call):
        asked = place.edge is not None and is_small(place.output_shape)
        return [place.edge] if asked and place.edge is not None else []
    sizes = getattr(place, "_input_metadata", None)  # private to torch
    if sizes is None or not all(prod(each.shape) <= NODE for each in sizes):
        return []
    return [GradientEdge(place, at) for at in range(len(sizes))]


def _judged(
    plain: Sequence[Arrived | None] | None, coded: Sequence[Arrived | None] | None, codes: Codes
) -> list[Judgement | None]:
    each = zip(plain or [None], coded or [None], strict=True)
    return [judged(before, after, codes) for before, after in each]


def _signature(model: nn.Module, here: Pass) -> Signature:
    """What batches of one kind have in common: calls, ranks and modes, but no sizes."""
    calls = tuple(
        (c.name, c.module.training, len(c.output_shape), tuple(name for name, _ in c.parameters))
        for c in here.calls
    )
    outputs = tuple((y.dim(), y.requires_grad) for y in here.outputs)
    inputs = tuple(x.dim() if isinstance(x, Tensor) else type(x) for x in here.leaves)
    return model.training, here.batch_dim, calls, outputs, inputs


def _sized(known: SampleMap, tensor: Tensor, here: Pass) -> SampleMap:
    return resized(known, tuple(tensor.shape), here.samples) or known


def _none(output: Tensor) -> SampleMap:
    return Unknown(f"no dimension of shape {tuple(output.shape)} holds the samples")


def _all_lead_to(fixed: Sequence[Anchor], maps: Sequence[SampleMap], here: Pass) -> bool:
    """Whether every output depends on an operation that reads an input."""
    nodes = {_node(place) for place, _, _ in fixed}
    owned = [y for y, m in zip(here.outputs, maps, strict=True) if isinstance(m, Owned)]
    return bool(nodes) and all(nodes & before([y]) for y in owned)


def _node(place: Place) -> Node | None:
    if not isinstance(place, Call):
        return place
    return None if place.edge is None else place.edge.node


def _agree(fixed: Iterable[Anchor], seen: Mapping[Place, SampleMap]) -> bool:
    told = [(seen[place], m) for place, m, _ in fixed if not isinstance(seen[place], Silent)]
    return bool(told) and all(one == other for one, other in told)


def _contradict(fixed: Iterable[Anchor], seen: Mapping[Place, SampleMap]) -> bool:
    return any(seen[p] != m and not isinstance(seen[p], Silent) for p, m, _ in fixed)


def _is_open(
    fixed: Sequence[Anchor],
    calls: Iterable[SampleMap],
    seen: Mapping[Place, SampleMap],
    here: Pass,
) -> bool:
    """Whether samples could meet where no gradient shows it."""
    if any(not isinstance(m, Owned | Silent) for m in calls):
        return True
    read = {at for place, _, at in fixed if isinstance(seen[place], Owned)}
    return any(
        is_batched(here, each) and each.is_floating_point() and at not in read
        for at, each in enumerate(here.leaves)
    )


def _mixed(here: Pass) -> NotImplementedError:
    shapes = [tuple(y.shape) for y in here.outputs]
    return NotImplementedError(
        f"samples see each other, or another dimension than {here.batch_dim} of the inputs is the "
        f"batch: no dimension of the outputs, of shapes {shapes}, belongs to one of "
        f"{here.samples} samples alone"
    )


__all__ = ["Batch", "Known", "Samples"]
