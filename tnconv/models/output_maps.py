"""Whose the rows of a model's outputs are, from the layers that read its inputs."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from tnconv.models.anchors import (
    Anchor,
    Unrunnable,
    anchors,
    is_batched,
    keeps_apart,
    replaced,
)
from tnconv.models.calls import Call, Pass
from tnconv.models.capture import Watch, alone
from tnconv.models.coded_passes import CodedPasses, Found, Place
from tnconv.models.graph import before
from tnconv.models.operation_graph import Graph
from tnconv.models.sample_maps import (
    Maps,
    Owned,
    SampleMap,
    Shared,
    Silent,
    Unknown,
    candidates,
)

NOISE = 0.1  # on parameters, where weights that are zero hide what depends on what


class Search:
    """The maps of a pass's outputs, which coded passes start from, for one size of the batch.

    ``maps`` are the outputs', ``batched`` the inputs that hold samples, ``seen`` the maps of calls
    and operations, and ``around`` those of operations near the ``ends`` at which gradients of
    samples are wanted.

    Raises:
        NotImplementedError: no output tells the samples apart.
    """

    def __init__(
        self,
        watch: Watch,
        passes: CodedPasses,
        here: Pass,
        graph: Graph,
        ends: Sequence[GradientEdge],
    ) -> None:
        self.watch, self.passes, self.here, self.ends = watch, passes, here, ends
        self.graph = graph
        self.possible = [
            tuple(candidates(tuple(y.shape), here.samples)) if y.requires_grad else ()
            for y in here.outputs
        ]
        if not any(self.possible):
            shapes = [tuple(y.shape) for y in here.outputs]
            raise NotImplementedError(
                f"no dimension of the model's outputs, of shapes {shapes}, holds {here.samples} "
                "samples, so none has a gradient of its own"
            )
        self.batched = tuple(is_batched(here, each) for each in here.leaves)
        self.maps: list[SampleMap] = [
            each[0] if each else _none(y)
            for each, y in zip(self.possible, here.outputs, strict=True)
        ]
        self.nodes, self._rigid = graph.around(end.node for end in ends)
        self._fixed = list(anchors(here, self.nodes))
        self.seen: dict[Place, SampleMap] = {}
        self.around: dict[Node, Maps] = {}

    def run(self, loss: Tensor | None) -> None:
        """Find all; a loss whose gradient follows saves a coded pass where all is as usual.

        Raises:
            NotImplementedError: samples see each other, or nothing shows whose rows are.
        """
        sure = _all_lead_to(self._fixed, self._roots(), self.graph)
        if sure:
            sure = self._is_as_usual(loss) or _agree(self._look(), self.seen)
        calls = (self.seen[call] for call in self.here.calls if call in self.seen)
        if sure and not _is_open(self._fixed, calls, self.seen, self.here):
            return
        self._run_again(sure)
        if not sure:
            used = [each for each in self._look() if self.batched[each[2]]]
            if _contradict(used, self.seen):
                raise _mixed(self.here)

    def _is_as_usual(self, loss: Tensor | None) -> bool:
        """Whether one pass is enough for now: its maps agree with the anchors."""
        if loss is None:
            return False
        found = self.passes.expect(self._roots(), loss, self.here, self.nodes, self.ends)
        if found is not None:
            self._note(found)
            if _agree(self._told(), self.seen):
                return True
        self.passes.expected = None
        return False

    def _roots(self) -> list[tuple[Tensor, Owned]]:
        return owned_roots(self.here, self.maps)

    def _look(self) -> list[Anchor]:
        """The anchors at which coded passes tell something."""
        self._note(self.passes.sent(self._roots(), self.here, self.nodes, self.ends))
        return self._told()

    def _note(self, found: Found) -> None:
        calls, around = found
        self.seen = {node: each[0] for node, each in around.items()}
        self.seen |= dict[Place, SampleMap](calls.items())
        self.around = around | dict.fromkeys(self._rigid, (Shared(),))

    def _told(self) -> list[Anchor]:
        return [each for each in self._fixed if each[0] not in self.passes.untold]

    def _run_again(self, sure: bool) -> None:
        """Run the model with samples replaced, which has the last word on its outputs.

        Raises:
            NotImplementedError: that samples see each other, or nothing where nothing else does.
        """
        here = self.here
        self.watch.paused = True
        try:
            with alone(self.watch.model, self.watch):
                if sure and keeps_apart(self.watch.model, here, self.maps):
                    return
                found, batched = replaced(self.watch.model, here, self.possible)
                if not any(each.changed for each in found):  # weights that are zero hide samples
                    found, batched = replaced(self.watch.model, here, self.possible, noise=NOISE)
        except Unrunnable as error:
            if sure:
                return
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
        self.batched = batched
        for at, (each, result) in enumerate(zip(self.possible, found, strict=True)):
            if not each:
                continue
            if sure and (not result.changed or self.maps[at] in result.left):
                continue
            self.maps[at] = result.known or Unknown("no dimension of it changes with a sample")
        if not any(isinstance(each, Owned) for each in self.maps):
            if any(each.reordered for each in found):
                raise _reordered(here)
            raise _alike(here) if any(len(each.left) > 1 for each in found) else _mixed(here)


def owned_roots(here: Pass, maps: Sequence[SampleMap]) -> list[tuple[Tensor, Owned]]:
    """The outputs that coded passes can start from."""
    given = zip(here.outputs, maps, strict=True)
    return [(y, m) for y, m in given if isinstance(m, Owned) and y.requires_grad]


def _none(output: Tensor) -> SampleMap:
    return Unknown(f"no dimension of shape {tuple(output.shape)} holds the samples")


def _all_lead_to(
    fixed: Sequence[Anchor], roots: Sequence[tuple[Tensor, Owned]], graph: Graph
) -> bool:
    """Whether every output depends on an operation that reads an input."""
    nodes = {_node(place) for place, _, _ in fixed}
    if len(graph.roots) == len(roots) == 1:
        return not nodes.isdisjoint(graph.places)
    return bool(nodes) and all(nodes & before([y]) for y, _ in roots)


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
    fixed: Collection[Anchor],
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


def _alike(here: Pass) -> NotImplementedError:
    shapes = [tuple(y.shape) for y in here.outputs]
    return NotImplementedError(
        f"samples differ too little to show whose the rows of the model's outputs, of shapes "
        f"{shapes}, are; expected a batch whose samples differ"
    )


def _reordered(here: Pass) -> NotImplementedError:
    shapes = [tuple(y.shape) for y in here.outputs]
    return NotImplementedError(
        f"samples are in another order in the model's outputs, of shapes {shapes}, than along "
        f"dimension {here.batch_dim} of its inputs; expected one order: sort outputs back"
    )


def _mixed(here: Pass) -> NotImplementedError:
    shapes = [tuple(y.shape) for y in here.outputs]
    return NotImplementedError(
        f"samples see each other, or are sorted, or another dimension than {here.batch_dim} of the "
        f"inputs is the batch: no dimension of the outputs, of shapes {shapes}, belongs to one of "
        f"{here.samples} samples alone"
    )
