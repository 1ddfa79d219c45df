"""Following gradients of samples to what they share, while backward passes go by."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from tnconv.models.calls import Alone, Call, Pass
from tnconv.models.capture import Watch
from tnconv.models.meeting_points import (
    Point,
    Unsupported,
    cotangent,
    is_light,
    points,
    pulled,
)
from tnconv.models.operation_graph import Graph
from tnconv.models.sample_maps import Maps, Owned
from tnconv.models.samples import Known, Samples
from tnconv.recursions.step import node_name

Deliver = Callable[[Pass, Call, Tensor], None]
Places = tuple[tuple[int, int, Maps], ...]  # of an end's points: operation, input, maps


def by_itself(name: str, parameter: nn.Parameter, samples: int) -> Alone:
    """The call that stands for a parameter's part in a pass."""
    shape = (samples, *parameter.shape)
    return Alone(name, nn.Identity(), (), {}, shape, None, True, (("parameter", parameter),))


@dataclass(eq=False)
class Meeting:
    """The points of one pass. ``deliver`` gets gradients ``(n, *end)`` when all have arrived."""

    here: Pass
    ends: Mapping[Call, GradientEdge]
    points: Mapping[Call, Sequence[Point]]
    deliver: Deliver
    slow: Callable[[Call, str], None] = lambda call, operation: None

    def __post_init__(self) -> None:
        self._at: dict[Node, dict[Point, list[Call]]] = {}
        for call, found in self.points.items():
            for point in found:
                self._at.setdefault(point.node, {}).setdefault(point, []).append(call)
        self._left: dict[Call, int] = {}
        self._sums: dict[Call, Tensor] = {}

    def follow(self, watch: Watch, ignored: Callable[[], bool]) -> None:
        """Look at the gradients that arrive at the points, but for those to be ignored."""
        for node in self._at:

            def arrived(grads: tuple[Tensor | None, ...], node: Node = node) -> None:
                if not ignored():
                    self._arrived(node, grads)

            watch.add_gradient_hook(node.register_prehook(arrived))

    def calls_behind(self, nodes: Collection[Node]) -> list[Call]:
        """The calls that a backward pass through some operations reaches."""
        return [c for c, found in self.points.items() if any(p.node in nodes for p in found)]

    def stops(self, calls: Iterable[Call]) -> list[GradientEdge]:
        """How far a backward pass has to go so that the points of some calls see it."""
        return list({(p.node, p.at): p.below for c in calls for p in self.points[c]}.values())

    @torch.no_grad()
    def _arrived(self, node: Node, grads: tuple[Tensor | None, ...]) -> None:
        for point, calls in self._at[node].items():
            each, one_by_one = cotangent(point, grads, self.here.samples)
            if one_by_one and not is_light(point):
                self.slow(calls[0], node_name(node))
            found: Sequence[Tensor | None] = [None for _ in calls]
            if each is not None:
                found = pulled(point, each, [self.ends[call] for call in calls])
            for call, gradient in zip(calls, found, strict=True):
                if gradient is not None:
                    held = self._sums.get(call)
                    self._sums[call] = gradient if held is None else held + gradient
                self._left[call] = self._left.get(call, len(self.points[call])) - 1
                if not self._left[call]:
                    self._hand_over(call)

    def _hand_over(self, call: Call) -> None:
        call.reached = True
        self._left.pop(call, None)
        gradient = self._sums.pop(call, None)
        if gradient is not None:
            self.deliver(self.here, call, gradient)

    def flush(self, calls: Iterable[Call] = (), like: Tensor | None = None) -> None:
        """Hand over what points that saw no gradient hold up; zero for calls that got none."""
        for call in list(self._left):
            self._hand_over(call)
        for call in calls:
            if call in self.points and not call.reached and like is not None:
                shape = call.output_shape
                each = shape if isinstance(call, Alone) else (self.here.samples, *shape)
                call.reached = True
                self.deliver(self.here, call, like.new_zeros(each))


def meeting(
    here: Pass,
    graph: Graph,
    known: Known,
    samples: Samples,
    ends: Mapping[Call, GradientEdge],
    deliver: Deliver,
    slow: Callable[[Call, str], None],
) -> Meeting:
    """Find where samples meet what some calls and parameters are made of.

    Args:
        here: the pass.
        graph: what is below the pass's outputs that tell samples apart.
        known: what is known of the pass's signature; the plan is kept there.
        samples: runs coded passes.
        ends: where gradients of samples are wanted.
        deliver: gets them.
        slow: hears of calls that take an operation for each sample, once for each kind of graph.

    Raises:
        Unsupported: there are no such points, for one of them.
    """
    if here.samples == 1:
        found = {c: [Point(p, at, ()) for p, at in graph.parents[e.node]] for c, e in ends.items()}
        if not all(found.values()):
            raise Unsupported("an output of the model is a parameter")
        return Meeting(here, ends, found, deliver)
    key = len(graph.nodes), tuple(graph.places.get(end.node) for end in ends.values())
    plan: Sequence[Places] | None = known.plans.get(key)
    told = True
    if plan is None:
        plan, told = _plan(graph, here, samples, ends)
        if told:
            known.plans[key] = plan

    def slow_once(call: Call, operation: str) -> None:
        if told and call.name not in known.slow:
            known.slow.add(call.name)
            slow(call, operation)

    return Meeting(
        here,
        ends,
        {
            call: [Point(graph.nodes[node], at, maps) for node, at, maps in places]
            for call, places in zip(ends, plan, strict=True)
        },
        deliver,
        slow_once,
    )


def _plan(
    graph: Graph,
    here: Pass,
    samples: Samples,
    ends: Mapping[Call, GradientEdge],
) -> tuple[list[Places], bool]:
    """The points of every end; and whether gradients came everywhere, to tell where they are.

    Maps of the operations around them may be known already, from the evidence for the calls.
    """
    try:
        plan, nodes = _points(graph, ends, samples.around)
    except (KeyError, Unsupported):
        owned = [c.edge.node for c in here.calls if c.edge is not None and isinstance(c.map, Owned)]
        stops = set(owned) - {end.node for end in ends.values()}
        above = graph.above([end.node for end in ends.values()], stops)
        _, maps = samples.coded(here, here.maps, above, list(ends.values()))
        plan, nodes = _points(graph, ends, defaultdict(tuple, maps))
    return plan, not nodes & samples.passes.untold


def _points(
    graph: Graph, ends: Mapping[Call, GradientEdge], maps: Mapping[Node, Maps]
) -> tuple[list[Places], set[Node]]:
    """The points of every end, and all operations between."""
    plan, nodes = list[Places](), set[Node]()
    for end in ends.values():
        found, shared = points(graph, end.node, maps)
        nodes.update(shared, (p.node for p in found))
        plan.append(tuple((graph.places[p.node], p.at, p.maps) for p in found))
    return plan, nodes - {end.node for end in ends.values()}
