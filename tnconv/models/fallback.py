"""What no layer's diagram explains: found in the graph, computed for every sample.

Parameters that a model uses by itself, layers without a diagram, and tables that all samples share
get the gradients of samples where the batch meets them (`tnconv.models.meetings`). Where that is
not possible, the model runs again, sample by sample, which is checked.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from tnconv.diagrams.notices import warn
from tnconv.models.anchors import is_batched
from tnconv.models.arrangement import is_arranged
from tnconv.models.bare import Bare, choose
from tnconv.models.calls import Call, Pass
from tnconv.models.capture import Watch
from tnconv.models.collector import Collector
from tnconv.models.graph import past, unexplained
from tnconv.models.meeting_points import Unsupported
from tnconv.models.meetings import Deliver, Meeting, by_itself, meeting
from tnconv.models.modules import named_parameters
from tnconv.models.operation_graph import Graph
from tnconv.models.sample_maps import Owned, Shared, Silent, Unknown, candidates, is_fast
from tnconv.models.samples import Known, Samples
from tnconv.models.samplewise import per_sample_gradients
from tnconv.models.terms import Term
from tnconv.quantities.base import LOSS_GRADIENT


class Fallback:
    """Gradients that hooks after layers do not show.

    Autograd's gradients of the parameters for which the model runs again are ``expected``, and what
    was computed must add up to them.
    """

    def __init__(self, collector: Collector, deliver: Deliver) -> None:
        self.collector, self.deliver = collector, deliver
        self.expected: dict[nn.Parameter, list[Tensor]] = {}
        self.meetings: dict[Pass, Meeting] = {}
        self.known: dict[Pass, Known] = {}
        self._gradients: dict[Pass, dict[int, Tensor]] = defaultdict(dict)

    def ends(self, here: Pass) -> list[GradientEdge | Tensor]:
        """Where a backward pass has to go for what is computed here."""
        found: list[GradientEdge | Tensor] = [*self.expected]
        if here in self.meetings:
            found += self.meetings[here].stops(self.meetings[here].points)
        return found

    def prepare(
        self,
        watch: Watch,
        here: Pass,
        roots: Sequence[Tensor],
        samples: Samples,
        loss: Tensor | None = None,
    ) -> None:
        """Find the parameters concerned in a pass, and ask for the gradients that they need.

        Args:
            watch: sees the model.
            here: the pass.
            roots: what the user's code goes on with.
            samples: finds out whose the rows of layers are.
            loss: one whose backward pass follows, and confirms what a single coded pass shows.
        """
        names = {p: name for p, name in named_parameters(watch.model).items() if p.requires_grad}
        if watch.per_sample:
            self._prepare_samples(watch, here, roots, samples, names, loss)
            return
        choose(here, roots)
        lost = unexplained(roots, here.calls, names)
        calls = [
            c for c in here.calls if not c.described and {p for _, p in c.parameters} - {*lost}
        ]
        every = {*lost, *(p for call in calls for _, p in call.parameters)}
        self.collector.skipped.update(every)
        self._expect(watch, every)

    def _prepare_samples(
        self,
        watch: Watch,
        here: Pass,
        roots: Sequence[Tensor],
        samples: Samples,
        names: Mapping[nn.Parameter, str],
        loss: Tensor | None,
    ) -> None:
        if not any(y.requires_grad for y in here.outputs):
            return
        _refuse_counts(here)
        graph = Graph(_nodes(here.outputs), {id(p): name for p, name in names.items()})
        around = _Unexplained(here, names, graph)
        known = self.known[here] = samples.explain(here, graph, around.probable, loss)
        lost = _lost(here, graph, known, around)
        _refuse_others(here, roots, names)
        self._refuse_outputs(watch, here)
        ends: dict[Call, GradientEdge] = {
            call: call.edge
            for call in here.calls
            if isinstance(call.map, Shared) and call.edge is not None
        }
        for parameter in lost:
            call = by_itself(names[parameter], parameter, here.samples)
            ends[call] = GradientEdge(graph.leaves[id(parameter)], 0)
            here.uses[parameter] = 1
        if not ends:
            return
        pairs = [*zip(here.outputs, here.maps, strict=True)]
        if any(y.requires_grad and not isinstance(m, Owned) for y, m in pairs):
            graph = Graph(_nodes(y for y, m in pairs if isinstance(m, Owned)))
        try:
            how = here, graph, known, samples, ends
            found = meeting(*how, self.deliver, _warn_of_operations)
        except Unsupported as error:
            self._run_again(watch, here, ends, names, str(error))
            return
        finally:
            samples.forget()
        self.meetings[here] = found
        found.follow(watch, lambda: samples.passes.listening)

    def _refuse_outputs(self, watch: Watch, here: Pass) -> None:
        """Refuse gradients of outputs that tell no samples apart, if they come to some layer."""
        owned = [get_gradient_edge(y).node for y, m in zip(here.outputs, here.maps, strict=True)
                 if isinstance(m, Owned) and y.requires_grad]  # fmt: skip
        for at, (output, known) in enumerate(zip(here.outputs, here.maps, strict=True)):
            if isinstance(known, Owned) or not output.requires_grad:
                continue
            if past([get_gradient_edge(output).node], owned):
                why = known.why if isinstance(known, Unknown) else "it belongs to no sample"
                watch.on_gradient(output, partial(_refuse, at, tuple(output.shape), why))

    def _run_again(
        self,
        watch: Watch,
        here: Pass,
        ends: Mapping[Call, GradientEdge],
        names: Mapping[nn.Parameter, str],
        why: str,
    ) -> None:
        """Let the model run again for what has no meeting points."""
        lost = list(dict.fromkeys(p for call in ends for _, p in call.parameters))
        what = ", ".join(repr(names[p]) for p in lost)
        if self.collector.sources != (LOSS_GRADIENT,):
            raise NotImplementedError(
                f"no diagram describes what parameters {what} do, which quantities beyond the "
                f"loss's gradient need ({why}); describe the layer with register_layer"
            )
        warn(f"the model runs again, sample by sample, for parameters {what}: {why}")
        self.collector.skipped.update(lost)
        self._expect(watch, lost)
        for at, output in enumerate(here.outputs):
            if output.requires_grad:
                watch.on_gradient(output, partial(self._gradients[here].__setitem__, at))

    def _expect(self, watch: Watch, parameters: Collection[nn.Parameter]) -> None:
        for parameter in {*parameters} - self.expected.keys():
            self.expected[parameter] = []
            watch.on_gradient(parameter, self.expected[parameter].append)

    def flush(self) -> None:
        """Hand over what still waits for gradients that did not come."""
        for found in self.meetings.values():
            found.flush()

    def finish(self, watch: Watch) -> None:
        """Compute what nothing else computed, and check it.

        Raises:
            RuntimeError: per-sample gradients that do not add up to autograd's.
        """
        names = named_parameters(watch.model)
        watch.paused = True
        try:
            for here, gradients in self._gradients.items():
                self._run(watch.model, here, gradients, names)
        finally:
            watch.paused = False
        for parameter, expected in self.expected.items():
            dtype = self.collector.dtype_of(parameter)
            if expected and not watch.per_sample:
                self.collector.add(parameter, Term.known(torch.stack(expected).to(dtype)))
            elif expected:
                total = torch.stack(expected).sum(0)
                _check(names[parameter], self.collector.sums[parameter], total)
        self.expected.clear()
        self.meetings.clear()
        self.known.clear()
        self._gradients.clear()

    def _run(
        self,
        model: nn.Module,
        here: Pass,
        gradients: dict[int, Tensor],
        names: dict[nn.Parameter, str],
    ) -> None:
        lost = {names[p]: p for p in self.expected if p in self.collector.skipped}
        cotangents = [
            gradients[at] if at in gradients else torch.zeros_like(output)
            for at, output in enumerate(here.outputs)
        ]
        for name, each in per_sample_gradients(model, here, cotangents, lost).items():
            self.collector.add_known(lost[name], each, here)


def _nodes(tensors: Iterable[Tensor]) -> list[Node]:
    return [get_gradient_edge(y).node for y in tensors if y.requires_grad]


class _Unexplained:
    """The parameters of a pass that some of its calls do not explain."""

    def __init__(self, here: Pass, names: Mapping[nn.Parameter, str], graph: Graph) -> None:
        self.here, self.names, self.graph = here, names, graph
        self._found: dict[tuple[bool, ...], list[nn.Parameter]] = {}

    def by(self, explain: tuple[bool, ...]) -> list[nn.Parameter]:
        """Those without the calls that do."""
        if explain not in self._found:
            calls = [call for call, does in zip(self.here.calls, explain, strict=True) if does]
            of = self.graph.leaves.values(), self.graph.below
            self._found[explain] = unexplained(self.here.outputs, calls, self.names, *of)
        return self._found[explain]

    def probable(self) -> list[GradientEdge]:
        """Where samples have to be told apart if all layers are as usual.

        Calls whose outputs are too small to hold the samples are shared by them, and mostly those
        that read nothing of the batch.
        """
        calls = self.here.calls
        usual = tuple(call.described and not isinstance(call.module, Bare) for call in calls)
        lost = [GradientEdge(self.graph.leaves[id(parameter)], 0) for parameter in self.by(usual)]
        described = [call for call, does in zip(calls, usual, strict=True) if does]
        return lost + [
            call.edge for call in described if call.edge is not None and self._seems_shared(call)
        ]

    def _seems_shared(self, call: Call) -> bool:
        if not any(candidates(call.output_shape, self.here.samples)):
            return True
        return not any(is_batched(self.here, x) or x.requires_grad for x in call.inputs)


def _lost(here: Pass, graph: Graph, known: Known, around: _Unexplained) -> list[nn.Parameter]:
    """The parameters that no call explains; calls are left with those that they do explain."""
    flags = tuple(_explains(call, here.samples) for call in here.calls)
    places = tuple(
        None if call.edge is None else graph.places.get(call.edge.node) for call in here.calls
    )
    key, by_name = (places, flags), {name: p for p, name in around.names.items()}
    if key not in known.lost:
        known.lost[key] = [around.names[p] for p in around.by(flags)]
    lost = [by_name[name] for name in known.lost[key]]
    if not lost and all(flags):
        return lost
    for call, explains in zip(list(here.calls), flags, strict=True):
        own = {p for _, p in call.parameters}
        here.keep(call, own - {*lost} if explains else ())
    return lost


def _explains(call: Call, samples: int) -> bool:
    if not call.described:
        return False
    if isinstance(call.module, Bare):
        return call.map is not None and is_fast(call.map)
    return isinstance(call.map, Silent) or is_arranged(call, samples)


def _refuse_counts(here: Pass) -> None:
    """Refuse tables whose gradients depend on the whole batch.

    Raises:
        NotImplementedError: there is one.
    """
    for call in here.calls:
        if getattr(call.module, "scale_grad_by_freq", False):
            raise NotImplementedError(
                f"layer {call.name!r} divides gradients by counts in the whole batch "
                "(scale_grad_by_freq), so no sample has a gradient of its own"
            )


def _refuse_others(here: Pass, roots: Sequence[Tensor], names: Mapping[nn.Parameter, str]) -> None:
    """Refuse parameters that the loss reads by itself.

    Raises:
        NotImplementedError: there is one.
    """
    if all(any(root is y for y in here.outputs) for root in roots):
        return
    outputs: list[Node] = [get_gradient_edge(y).node for y in here.outputs if y.requires_grad]
    starts = [get_gradient_edge(root).node for root in roots if root.requires_grad]
    leaves = {id(leaf) for leaf in past(starts, outputs)}
    for parameter, name in names.items():
        if id(parameter) in leaves:
            raise NotImplementedError(
                f"the loss reads parameter {name!r} by itself, not through the model's output, so "
                "that part of its gradient belongs to no sample"
            )


def _refuse(at: int, shape: tuple[int, ...], why: str, gradient: Tensor) -> None:
    raise NotImplementedError(
        f"a gradient comes from output {at} of the model, of shape {shape}, which tells no samples "
        f"apart: {why}"
    )


def _warn_of_operations(call: Call, operation: str) -> None:
    warn(
        f"the gradients of {call.name!r} are taken for one sample after another (slow): it meets "
        f"the batch in {operation}"
    )


def _check(name: str, found: Tensor, expected: Tensor) -> None:
    error = (found - expected).abs().max()
    if not error <= torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max():
        raise RuntimeError(
            f"the gradients of parameter {name!r}, sample by sample, do not add up to its "
            "gradient; expected layers that are not random and keep samples apart"
        )
