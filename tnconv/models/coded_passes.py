"""Sending coded cotangents backwards through a pass's graph, and judging what arrives.

Two passes, without codes and with them, tell the map of every call and operation. Where the loss's
own gradient is about to follow, one pass with codes is enough: a code that is zero shows at once
whose the rows probably are, and the loss's gradient is the pass without codes (`Expected`).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from math import prod

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from tnconv.models.calls import Call, Pass
from tnconv.models.capture import Watch, alone
from tnconv.models.coded import (
    LEVELS,
    SMALL,
    Arrived,
    Codes,
    Judgement,
    Prediction,
    arrived,
    confirmed,
    is_small,
    judged,
    predicted,
)
from tnconv.models.graph import sources
from tnconv.models.sample_maps import Maps, Owned, SampleMap
from tnconv.models.vector_products import vector_products

NODE = 1 << 20  # entries of a gradient that is asked for at an operation
Place = Call | Node
Found = tuple[dict[Call, SampleMap], dict[Node, Maps]]
"""The maps of calls and operations."""
_seeds = count(1)


class Contradiction(Exception):
    """The loss's gradient belongs to other samples than one coded pass has shown."""


@dataclass
class Expected:
    """What one coded pass has shown, until the loss's gradient has arrived and confirms it.

    All that arrives is looked at together, which takes a fraction of the time of one by one.
    """

    here: Pass
    codes: Codes
    coded: Mapping[Place, Sequence[Arrived | None]]
    guesses: Mapping[Place, Sequence[Prediction]]
    untold: set[Place]
    plain: dict[Place, Sequence[Tensor | Arrived | None]] = field(default_factory=dict)
    task: int | None = None  # the loss's backward pass

    def arrive(self, place: Place, gradients: Sequence[Tensor | None]) -> None:
        """Take gradients of the loss at a place; of large ones sums are kept.

        Passes inside of the loss's, which pull gradients through what samples share, start later.
        """
        task = torch._C._current_graph_task_id()
        if self.task is None or task < self.task:
            self.task = task
            self.plain.clear()
        if task == self.task and place in self.coded and place not in self.plain:
            large = any(g is not None and g.numel() > SMALL for g in gradients)
            self.plain[place] = self._looked_at(gradients) if large else gradients

    def _looked_at(self, gradients: Sequence[Tensor | Arrived | None]) -> list[Arrived | None]:
        n = self.here.samples
        return [arrived(g, n) if isinstance(g, Tensor) else g for g in gradients]

    def confirm(self) -> None:
        """Hold the gradients of the loss that came against the maps.

        Raises:
            Contradiction: they belong to other samples.
        """
        if any(len(each) != len(self.coded[place]) for place, each in self.plain.items()):
            raise Contradiction
        places = [place for place, each in self.plain.items() for _ in each]
        plain = self._looked_at([g for each in self.plain.values() for g in each])
        guesses = [each for place in self.plain for each in self.guesses[place]]
        coded = [each for place in self.plain for each in self.coded[place]]
        found = confirmed(guesses, plain, coded, self.codes)
        for place, confirms in zip(places, found, strict=True):
            if confirms is False:
                raise Contradiction
            if confirms:
                self.untold.discard(place)


class CodedPasses:
    """Those of a watch's passes; ``listening`` while one is under way.

    ``untold`` are the places at which the last ones were no evidence; ``dims`` says where samples
    are expected.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.listening = False
        self.untold: set[Place] = set()
        self.dims: dict[Call, int] = {}
        self.expected: Expected | None = None
        self._confirming = False
        self._sketches: dict[Place, list[Arrived | None]] = {}
        self._samples, self._all_dims = 1, False

    def take(self, call: Call, gradient: Tensor) -> bool:
        """Look at a gradient after a call; whether it is one of a coded pass."""
        if self.listening and gradient.numel() > SMALL:
            how = self._samples, self._all_dims, self.dims.get(call)
            self._sketches[call] = [arrived(gradient, *how)]
        elif self._confirming and self.expected is not None:
            self.expected.arrive(call, [gradient])
        return self.listening

    def sent(
        self,
        roots: Sequence[tuple[Tensor, Owned]],
        here: Pass,
        nodes: Collection[Node] = (),
        ends: Sequence[GradientEdge] = (),
        calls: Iterable[Call] | None = None,
    ) -> Found:
        """Send cotangents from tensors of given maps, without codes and with: the maps behind.

        Args:
            roots: where the passes start, with their maps.
            here: the pass of the model.
            nodes: operations whose gradients are judged, beside those after calls.
            ends: where gradients have to come, beside the calls of the pass.
            calls: those to judge; all of the pass by default.
        """
        half = any(y.dtype == torch.float16 for y, _ in roots)
        codes = Codes.drawn(here.samples, next(_seeds), 2 if half else LEVELS)
        cotangents = [codes.cotangent(y) for y, _ in roots]
        with_codes = [codes.applied(v, m) for v, (_, m) in zip(cotangents, roots, strict=True)]
        watched = list(here.calls if calls is None else calls)
        tensors, places = [y for y, _ in roots], list[Place](watched)
        places += nodes
        how = watched, nodes, ends, here
        try:
            plain = self._arrived(tensors, cotangents, *how)
        except RuntimeError:
            for call in watched:
                _ = call.given  # which says so where an input was changed in place
            raise
        coded = self._arrived(tensors, with_codes, *how)
        found = {place: _judged(plain.get(place), coded.get(place), codes) for place in places}
        if any(None in each for each in found.values()):  # kernels that round anew in every pass
            plain = self._arrived(tensors, cotangents, *how, all_dims=True)
            coded = self._arrived(tensors, with_codes, *how, all_dims=True)
            found = {place: _judged(plain.get(place), coded.get(place), codes) for place in places}
        told = {place: [each for each in of if each is not None] for place, of in found.items()}
        self.untold = {place for place, of in told.items() if not any(known for _, known in of)}
        maps = {place: tuple(m for m, _ in of) for place, of in told.items()}
        return {call: maps[call][0] for call in watched}, {node: maps[node] for node in nodes}

    def expect(
        self,
        roots: Sequence[tuple[Tensor, Owned]],
        loss: Tensor,
        here: Pass,
        nodes: Collection[Node] = (),
        ends: Sequence[GradientEdge] = (),
    ) -> Found | None:
        """As `sent`, by the loss's cotangents with codes alone: what is probable, and `expected`.

        None where the loss does not depend on all roots, or codes may leave their range.
        """
        tensors = [y for y, _ in roots]
        if any(y.dtype == torch.float16 for y in tensors):
            return None
        with self._listening(here), alone(self.watch.model, self.watch):
            given = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
        cotangents = [each for each in given if each is not None]
        if len(cotangents) < len(tensors):
            return None
        codes = Codes.drawn(here.samples, next(_seeds), LEVELS, hiding=True)
        pairs = zip(cotangents, roots, strict=True)
        with_codes = [codes.applied(v, m) for v, (_, m) in pairs]
        coded = self._arrived(tensors, with_codes, here.calls, nodes, ends, here)
        places = list[Place](here.calls)
        places += nodes
        coded = {place: coded.get(place, [None]) for place in places}
        told = iter(predicted([of for each in coded.values() for of in each], codes))
        guesses = {place: [next(told) for _ in each] for place, each in coded.items()}
        self.expected = Expected(here, codes, coded, guesses, {*places})
        self.untold = {place for place, each in coded.items() if all(of is None for of in each)}
        maps = {place: tuple(guess.map for guess in each) for place, each in guesses.items()}
        return {call: maps[call][0] for call in here.calls}, {node: maps[node] for node in nodes}

    @contextmanager
    def confirming(self) -> Iterator[None]:
        """Hold the gradients of the loss, which come while this is open, against `expected`.

        Raises:
            Contradiction: they belong to other samples, whatever else that led to.
        """
        expected = self.expected
        if expected is None:
            yield
            return
        self._confirming = True
        try:
            with ExitStack() as stack:
                for place in expected.coded:
                    if not isinstance(place, Call):
                        look = partial(expected.arrive, place)
                        stack.callback(place.register_prehook(look).remove)
                try:
                    yield
                except (NotImplementedError, RuntimeError, ValueError):
                    expected.confirm()  # wrong maps are the reason of what came later
                    raise
            expected.confirm()
            self.untold = expected.untold
        finally:
            self._confirming, self.expected = False, None

    def _arrived(
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
                try:
                    given = iter(vector_products(roots, inputs, cotangents))
                except RuntimeError:
                    for call in here.calls:  # an input that was changed in place names its layer
                        _ = call.given
                    raise
            found = self._sketches
            for place, edges in asked.items():
                each = [next(given) for _ in edges]
                if isinstance(place, Call):  # asked for before it is viewed
                    shape = place.output_shape
                    each = [g if g is None or g.shape == shape else g.reshape(shape) for g in each]
                found[place] = [None if g is None else arrived(g, here.samples) for g in each]
            return found
        finally:
            for handle in handles:
                handle.remove()
            self._sketches = {}

    def _look(self, node: Node) -> Callable[[tuple[Tensor | None, ...]], None]:
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
