"""Collecting Kronecker factors while a training loop of the user's own runs.

A pass counts for a parameter when a backward pass adds to its ``grad``, and as long as that stays:
hooks after layers show gradients, those of parameters show which of them a step will use. Passes
for evaluation, gradients that ``torch.autograd.grad`` returns, and other losses leave no trace.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakMethod, finalize, ref

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from tnconv.losses.reductions import divisor
from tnconv.losses.roots import recognised
from tnconv.models.calls import Call, Pass
from tnconv.models.capture import Inert, Watch, alone
from tnconv.models.graph import before, sources
from tnconv.models.modules import unwrapped, weak
from tnconv.models.terms import Arrival, detached
from tnconv.optim.contributions import Contribution, Wanted
from tnconv.optim.ekfac import Basis
from tnconv.optim.inverses import wide
from tnconv.quantities.kronecker_factors import KFAC

LossFunction = Callable[[Any, Any], Tensor]
LossScale = Callable[[], float | Tensor]
Arrived = tuple[Pass, str, Arrival]
"""A parameter's name in its layer, and a gradient after a call of that."""


@dataclass(eq=False)
class Columns:
    """What the columns of one loss's curvature give, until its own gradient goes the same way.

    ``tasks`` are the backward passes through the loss; None where no loss was seen, only its
    output.
    """

    here: Pass
    found: dict[Tensor, Contribution]
    tasks: set[int] | None = None


@dataclass(eq=False)
class Found:
    """What was collected for one parameter, and the passes that it is of."""

    contribution: Contribution = field(default_factory=Contribution)
    passes: set[Pass] = field(default_factory=set)
    version: int = 0  # of the parameter's gradient then


class FactorWatch:
    """What the layers of a model in training mode add to their Kronecker factors, between steps.

    Passes count as micro-batches of one batch; several losses of one pass add up. ``stale`` is
    called where a parameter learns that did not when ``parameters`` were set. A vanished watch
    leaves no hooks.
    """

    def __init__(
        self,
        model: nn.Module,
        kfac: KFAC,
        loss_fn: LossFunction | None = None,
        loss_scale: LossScale | None = None,
        stale: Callable[[], None] = lambda: None,
    ) -> None:
        self.kfac, self.loss_fn, self.loss_scale, self.stale = kfac, loss_fn, loss_scale, stale
        self._kinds = {joint: replace(kfac, joint=joint) for joint in (False, True)}
        self.parameters: Mapping[nn.Parameter, bool] = {}  # whether a bias's column is joined
        self.learned: Collection[nn.Parameter] = ()
        self.bases: Mapping[Tensor, Basis] = {}
        self.keep = False  # what moments in another basis are made of
        self.rotates = False  # moments are wanted in some basis
        self._hooked = set[nn.Parameter]()
        self._columns: dict[Call, list[Tensor]] | None = None
        self.clear()
        self.watch = Watch(unwrapped(model), _nothing, weak(self._receive), loose=True)
        chosen = WeakMethod(self._wants)
        self.watch.wanted = lambda module, p: (wants := chosen()) is not None and wants(module, p)
        self.watch.start()
        self._stops = [finalize(self, self.watch.stop)]
        if isinstance(loss_fn, nn.Module) and kfac.fisher != "forward-only":
            hook = Inert(weak(self._loss_called))
            handle = loss_fn.register_forward_hook(hook, with_kwargs=True)
            self._stops.append(finalize(self, handle.remove))

    def look_at(self, parameters: Mapping[nn.Parameter, bool]) -> None:
        """Collect factors of some parameters, by whether a bias's column is joined to theirs."""
        self.parameters = parameters
        model = self.watch.model
        self.learned = {p for p in model.parameters() if p.requires_grad}
        self.watch.look_again()
        for parameter in parameters:
            if parameter.requires_grad and parameter not in self._hooked:
                self._hooked.add(parameter)
                own: Any = parameter
                first = own.register_hook(_of(parameter, self._before))
                last = own.register_post_accumulate_grad_hook(weak(self._accumulated))
                self._stops += [finalize(self, first.remove), finalize(self, last.remove)]

    def stop(self) -> None:
        """Remove all hooks."""
        for each in self._stops:
            each()

    @property
    def passes(self) -> set[Pass]:
        """Those that something was collected from."""
        return set[Pass]().union(*(each.passes for each in self._found.values()))

    @property
    def total(self) -> float:
        """What a mean over all passes divides by: their samples, or what their losses say.

        Where no layer has factors, passes that can be learned from are taken for those that are.
        """
        learned = [p for p in self.watch.passes if any(y.requires_grad for y in p.outputs)]
        return sum(self._weight(here) for here in self.passes or learned)

    @property
    def averages(self) -> bool:
        """Whether the loss is a mean over samples: then so are the factors of output gradients."""
        if self.loss_fn is None or self.kfac.fisher in ("empirical", "forward-only"):
            return self.kfac.reduction == "mean"
        return bool(recognised(self.loss_fn)[1].get("reduction", "mean") == "mean")

    def forget(self) -> None:
        """Start afresh, after a step."""
        self.clear()
        self._open.clear()
        self._weights.clear()
        self._unusable.clear()
        self.watch.forget()

    def clear(self) -> None:
        """Drop what was collected, not the passes that are under way."""
        self._found: dict[Tensor, Found] = {}
        self._blind = False  # a gradient came whose loss was not seen
        if not hasattr(self, "_open"):
            self._open: list[Columns] = []
            self._weights: dict[Pass, float] = {}
            self._unusable = set[Pass]()
        self._arrived: dict[int, dict[Tensor, list[Arrived]]] = {}

    def found(self) -> Mapping[Tensor, Contribution]:
        """What was collected since the last step, of parameters that have a gradient.

        Output gradients' sums are times what a mean divides by.

        Raises:
            RuntimeError: passes whose loss was not seen.
        """
        for parameter in [p for p in self._found if p.grad is None]:
            del self._found[parameter]
        if self._blind and not self._found:
            raise RuntimeError(
                f"fisher is {self.kfac.fisher!r}, but no loss of the model's output was seen; call "
                "the loss_fn that the optimizer was given (a module), or optimizer.propagate(output"
                ", targets), before loss.backward()"
            )
        found = {parameter: each.contribution for parameter, each in self._found.items()}
        if self.kfac.fisher == "empirical" and self.averages:
            for each in found.values():
                for name in {"grad_output", "moments"} & each.sums.keys():
                    each.sums[name] = each.sums[name] * self.total**2
                each.terms = [(term, weight * self.total**2) for term, weight in each.terms]
        return found

    def propagate(self, output: Tensor, targets: Any, loss: Tensor | None = None) -> None:
        """Send the columns of the loss's curvature backwards through the passes under way."""
        passes = [here for here in self.watch.passes if here.calls]
        if self.watch.silent or not passes or not output.requires_grad:
            return
        if not torch.is_grad_enabled():
            return
        assert self.loss_fn is not None
        exact = output.detach().to(wide(output))
        if not exact.isfinite().all():  # nothing can be drawn; gradients are not finite, either
            self._unusable.update(passes)
            return
        columns = self.kfac.vectors.columns(self.loss_fn, exact, targets)
        weight = divisor(self.loss_fn, output, targets) if self.averages else 1.0
        scale = max(1, len(output)) ** 0.5  # of order one also in half precision
        ends = sources([call for here in passes for call in here.calls])
        self._columns = defaultdict(list)
        try:
            with alone(self.watch.model, self.watch):
                for column in columns:
                    vector = (scale * column).to(output.dtype)
                    torch.autograd.grad(output, ends, vector, retain_graph=True, allow_unused=True)
            found = {call: _stacked(each) for call, each in self._columns.items()}
        finally:
            self._columns = None
        tasks = set[int]()
        if loss is not None and loss.requires_grad:
            loss.register_hook(lambda grad: tasks.add(_task()))  # type: ignore[no-untyped-call]
        for here in passes:
            if any(call in found for call in here.calls):
                self._weights[here] = max(self._weights.get(here, 0.0), weight)
                new = self._of_columns(here, found, len(columns), weight / scale**2)
                self._open.append(Columns(here, new, None if loss is None else tasks))

    def _loss_called(
        self, loss_fn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any
    ) -> None:
        given = dict(zip(("input", "target"), args, strict=False)) | kwargs
        output, targets = given["input"], given["target"]
        if self.kfac.fisher != "empirical":
            self.propagate(output, targets, loss)
        elif self.averages and not self.watch.silent and output.requires_grad:
            for here in self._passes_before(output):
                self._weights[here] = divisor(loss_fn, output, targets)

    def _passes_before(self, output: Tensor) -> list[Pass]:
        """The passes that an output comes from."""
        given = [here for here in self.watch.passes if any(output is y for y in here.outputs)]
        if given:
            return given
        nodes = before([output])
        edges = {here: [c.edge for c in here.calls if c.edge] for here in self.watch.passes}
        return [here for here, each in edges.items() if any(e.node in nodes for e in each)]

    def _weight(self, here: Pass) -> float:
        if here not in self._weights:
            self._weights[here] = float(here.samples)
        return self._weights[here]

    def _wants(self, module: nn.Module, parameter: nn.Parameter) -> bool:
        if parameter not in self.learned:
            self.stale()
        return module.training and parameter in self.parameters

    def _receive(self, here: Pass, call: Call, grad_output: Tensor) -> None:
        if self._columns is not None:
            self._columns[call].append(grad_output)
            return
        task = _task()
        if task not in self._arrived:
            self._arrived[task] = defaultdict(list)
            Variable._execution_engine.queue_callback(partial(_drop, self._arrived, task))
        if self.kfac.fisher == "empirical":
            grad_output = detached(grad_output)
            if self.loss_scale is not None:
                grad_output = grad_output.to(wide(grad_output)) / self.loss_scale()
        elif self.kfac.fisher == "forward-only":
            grad_output = grad_output.new_zeros(0, *call.output_shape)
        vectors = 0 if self.kfac.fisher == "forward-only" else None
        arrival = Arrival(call, grad_output, vectors)
        for name, parameter in call.parameters:
            self._arrived[task][parameter].append((here, name, arrival))

    def _before(self, parameter: nn.Parameter) -> None:
        """A gradient is about to be added; without the one before, that counts no longer."""
        if not self._found:
            return
        found, grad = self._found.get(parameter), parameter.grad
        if found is not None and (
            grad is None or (grad._version != found.version and not grad.any())
        ):
            del self._found[parameter]

    def _accumulated(self, parameter: nn.Parameter) -> None:
        """A backward pass added to the parameter's gradient: so it uses what arrived before."""
        if not self._arrived and not self._found:
            return
        task = _task()
        waiting = self._arrived.get(task, {})
        arrived = waiting.pop(parameter, [])
        by_pass: dict[Pass, list[tuple[str, Arrival]]] = defaultdict(list)
        for here, name, arrival in arrived:
            by_pass[here].append((name, arrival))
        for here, those in by_pass.items():
            new = self._used(parameter, here, those, task)
            if new is not None:
                found = self._found.setdefault(parameter, Found())
                found.contribution.add(new)
                found.passes.add(here)
        for _, _, arrival in arrived:
            call = arrival.call
            others = [each for _, p in call.parameters for each in waiting.get(p, ())]
            if not any(each[2] is arrival for each in others):
                call.free()
        if parameter in self._found and parameter.grad is not None:
            self._found[parameter].version = parameter.grad._version

    def _used(
        self,
        parameter: nn.Parameter,
        here: Pass,
        arrivals: list[tuple[str, Arrival]],
        task: int,
    ) -> Contribution | None:
        if self.kfac.fisher not in ("type-2", "mc"):
            return self.wanted(parameter).of(parameter, arrivals, here.samples)
        own = [each for each in self._open if each.here is here]
        self._blind = self._blind or not (own or here in self._unusable)
        found = [
            each.found.pop(parameter)
            for each in own
            if parameter in each.found and (each.tasks is None or task in each.tasks)
        ]
        total = found[0] if found else None
        for other in found[1:]:
            found[0].add(other)
        return total

    def _of_columns(
        self, here: Pass, found: Mapping[Call, Tensor], vectors: int, weight: float
    ) -> dict[Tensor, Contribution]:
        """The contributions to all parameters of a pass that columns reached."""
        arrivals: dict[nn.Parameter, list[tuple[str, Arrival]]] = defaultdict(list)
        for call in here.calls:
            if call in found:
                for name, parameter in call.parameters:
                    arrivals[parameter].append((name, Arrival(call, found[call], vectors)))
        return {
            parameter: self.wanted(parameter).of(parameter, each, here.samples, weight)
            for parameter, each in arrivals.items()
        }

    def wanted(self, parameter: nn.Parameter) -> Wanted:
        """What is collected of a parameter."""
        basis = self.bases.get(parameter)
        keep = self.rotates and (self.keep or basis is None)
        return Wanted(self.kfac_of(parameter), basis, keep)

    def kfac_of(self, parameter: nn.Parameter) -> KFAC:
        """Its factors: patches end with an entry 1 where a bias's column is joined to it."""
        return self._kinds[self.parameters.get(parameter, False)]


def _task() -> int:
    return torch._C._current_graph_task_id()


def _drop(arrived: dict[int, Any], task: int) -> None:
    """A backward pass is over: what it did not use is nobody's."""
    arrived.pop(task, None)


def _nothing(here: Pass) -> None:
    """A pass is complete: its loss is still to come."""


def _stacked(columns: list[Tensor]) -> Tensor:
    """All columns, without a copy of a single one."""
    return columns[0].unsqueeze(0) if len(columns) == 1 else torch.stack(columns)


def _of(parameter: nn.Parameter, method: Callable[[nn.Parameter], None]) -> Callable[[Any], None]:
    """A hook on a parameter's gradient that asks for the parameter alone."""
    call, own = weak(method), ref(parameter)

    def hook(grad: Any) -> None:
        if (found := own()) is not None:
            call(found)

    return hook
