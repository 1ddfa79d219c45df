"""The monitor: around a step, or by hooks, it measures what training does and changes nothing."""

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tnconv.diagrams.notices import warn
from tnconv.given import instances, optional
from tnconv.losses.reductions import Reduction, reduction_of
from tnconv.monitor.alerts import RULES, Alert, Alerts, History, Rule
from tnconv.monitor.budgets import Budget, Group, clock, group_of, groups_of
from tnconv.monitor.configurations import Configuration, measurements, sampled
from tnconv.monitor.events import event_of
from tnconv.monitor.expected_settings import expect_plain_sgd, expect_settings
from tnconv.monitor.measurement import Following, Measurement
from tnconv.monitor.missed import expect_needs, why_missing
from tnconv.monitor.monitor_state import KEPT, restore, state_of
from tnconv.monitor.needs import Curvature
from tnconv.monitor.origins import Origins
from tnconv.monitor.published import OfCurvature
from tnconv.monitor.recordable import recordable
from tnconv.monitor.run_folder import RunWriter, frame
from tnconv.monitor.sample_results import Ranges, shared
from tnconv.monitor.schedules import Linear, Schedule
from tnconv.monitor.seen import Seen
from tnconv.monitor.sinks import Sink, deliver
from tnconv.monitor.step_needs import compares, implied, of_samples, possible
from tnconv.monitor.step_results import seen_of
from tnconv.monitor.step_watch import StepWatch
from tnconv.monitor.subject import Loss, Subject, copies, reason_of, reduction_in
from tnconv.optim.workers import Workers

_LOG = logging.getLogger("tnconv.monitor")
LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
Quantities = Configuration | Sequence[Measurement | str | type[Measurement]]


class Monitor:
    """Measures training step by step; the weights stay what they are without it, bit by bit.

    Either each step is put into ``with monitor.step():`` (forward and backward pass and the
    optimizer's step), or ``monitor.attach(optimizer)`` finds the steps by the optimizer's hooks.
    Losses are seen where ``loss_fn`` is a module that the loop calls; a function is called as
    ``monitor.loss(output, targets)`` instead. What needs gradients of single samples is left out,
    with one warning, where samples see each other, as in a batch normalisation that trains.

    Args:
        model: any, also compiled or in DistributedDataParallel.
        loss_fn: the loss that the loop uses.
        quantities: "cheap", "economy", "business", "full", or a list of measurements, their
            classes or published names.
        every: a number of steps, or a schedule, for all that have none of their own.
        sinks: functions of ``(dict, step)``, or of `tnconv.monitor.sinks`.
        optimizer: for what depends on learning rates.
        scaler: of automatic mixed precision, whose factor gradients carry.
        folder: where records are written, for instance for ``python -m tnconv monitor``.
        samples: how many of each batch's samples are measured, drawn anew each time; all by
            default.
        curvature: of "business" and "full", and of classes in a list.
        products: with the Hessian, at most, for its largest eigenvalue in "full".
        alerts: rules that look at every record; see `tnconv.monitor.alerts`.
        reduction: "mean" or "sum", of a loss that does not say.
        batch_dim: where inputs have their samples.
        seed: of the monitor's own random numbers.
        budget: the overhead that is allowed, as a fraction of the run's own time: schedules say at
            which steps something may be measured, and the monitor chooses among them, and how many
            samples, by what it measures; exact Gauss-Newton columns become sampled ones. See
            ``monitor.budget.report()``.
        process_group: of workers, where DistributedDataParallel does not tell.
        batch_statistics_as_constants: where batch normalisation trains, measure gradients of single
            samples as if the batch's mean and variance were constants, in a pass of their own
            through the model. Their mean, which tests and projections then take for the gradient,
            is not ``p.grad``.

    >>> from tnconv.monitor import Monitor
    >>> model, loss_fn = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), nn.MSELoss()
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> monitor = Monitor(model, loss_fn, quantities="economy")
    >>> for _ in range(3):
    ...     with monitor.step():
    ...         optimizer.zero_grad()
    ...         loss_fn(model(torch.rand(8, 3)), torch.rand(8, 2)).backward()
    ...         optimizer.step()
    >>> len(monitor.records), monitor.records[-1]["NormTest"] > 0
    (3, True)

    Raises:
        TypeError: a class for an instance, or what is no measurement.
        ValueError: an unknown set or name, or a quantity of plain gradient descent for another
            optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss | None = None,
        quantities: Quantities = "economy",
        every: int | Schedule = 1,
        sinks: Sequence[Sink] = (),
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: Any = None,
        folder: str | Path | None = None,
        samples: int | None = None,
        curvature: Curvature = "hesscale",
        products: int = 12,
        alerts: Sequence[Rule] = RULES,
        reduction: Reduction | None = None,
        batch_dim: int = 0,
        seed: int = 0,
        budget: float | None = None,
        process_group: "dist.ProcessGroup | Literal['local'] | None" = None,
        batch_statistics_as_constants: bool = False,
    ) -> None:
        instances(model=model, **optional(loss_fn=loss_fn))
        if next(model.parameters(), None) is None:
            raise ValueError(f"model is a {type(model).__name__} without parameters; expected some")
        expect_settings(every=every, sinks=sinks, optimizer=optimizer, scaler=scaler, folder=folder,
                        samples=samples, curvature=curvature, products=products, alerts=alerts,
                        batch_dim=batch_dim, seed=seed, budget=budget)  # fmt: skip
        self.budget = None if budget is None else Budget(budget, samples)
        self.measurements = measurements(quantities, curvature, products)
        if self.budget is not None:
            given, self.measurements = self.measurements, [sampled(m) for m in self.measurements]
            pairs = zip(given, self.measurements, strict=True)
            self.budget.instead = {m.name: m.curvature for old, m in pairs
                                   if m != old and isinstance(m, OfCurvature)}  # fmt: skip
        expect_needs(self.measurements)
        self.schedule = Linear(every) if isinstance(every, int) else every
        self.optimizer = optimizer
        expect_plain_sgd(self.measurements, optimizer)
        self._reduction = reduction
        generator, found = torch.Generator().manual_seed(seed), reduction_in(loss_fn, reduction)
        workers = Workers(process_group, model)
        told = reduction is not None or loss_fn is None or reduction_of(loss_fn) is not None
        settings = workers, generator, samples, scaler, batch_dim, batch_statistics_as_constants
        self.subject = Subject(model, loss_fn, found, *settings)
        self.subject.asks_for_reduction = not told
        self.sinks, self._rules = tuple(sinks), Alerts(tuple(alerts))
        self._prepare(folder)

    def __repr__(self) -> str:
        names = ", ".join(type(each).__name__ for each in self.measurements)
        model = type(self.subject.model).__name__
        return f"<Monitor of a {model} after {self.steps} steps: {names}>"

    def _prepare(self, folder: str | Path | None) -> None:
        """Everything before the first step."""
        named = self.subject.named
        self.records: list[dict[str, Any]] = []
        self.alerts: list[tuple[int, Alert]] = []
        self.steps = 0
        self._origins = Origins(named, self.subject.values if self._ever("start") else ())
        self._ranges, self._warned = Ranges(), False
        self._compared = False  # whether samples' gradients were compared with p.grad
        self._since = 0  # the step from which on these parameters learn
        self._missed: set[str] = set()  # what was said to lack something
        self._last: Seen | None = None
        self._followed: tuple[Measurement, ...] = ()
        self._watch: StepWatch | None = None
        self._before: list[Tensor] = []
        self._due: list[Measurement] = []
        self._handles: list[Any] = []
        self._writer: RunWriter | None = None
        if folder is not None and not self.subject.workers.rank:
            kinds = [each.name for each in self.measurements]
            header = {"parameters": [name for name, _ in named], "quantities": kinds}
            self._writer = RunWriter(folder, header)

    @contextmanager
    def step(self) -> Iterator[Self]:
        """Around one step of a loop: forward and backward passes, and the optimizer's step."""
        self._begin()
        try:
            yield self
        except BaseException:
            self._abandon()
            raise
        self._end()

    def attach(self, optimizer: torch.optim.Optimizer) -> Self:
        """Take everything between two steps of an optimizer for one, until `detach`."""
        if not isinstance(optimizer, torch.optim.Optimizer):
            given = type(optimizer).__name__
            raise TypeError(f"optimizer is a {given}; expected a torch.optim.Optimizer")
        if self._handles:
            raise RuntimeError("the monitor is attached already; expected detach() before")
        self.optimizer = optimizer
        expect_plain_sgd(self.measurements, optimizer)
        self._handles.append(optimizer.register_step_post_hook(self._stepped))
        self._begin()
        return self

    def detach(self) -> None:
        """Remove all hooks."""
        while self._handles:
            self._handles.pop().remove()
        self._abandon()

    def loss(self, output: Any, targets: Any) -> Tensor:
        """The loss, where ``loss_fn`` is a function that is no module.

        Raises:
            ValueError: a monitor without a loss.
        """
        if self.subject.loss_fn is None:
            raise ValueError("the monitor was made without loss_fn; expected one")
        if self._watch is None:
            found: Tensor = self.subject.loss_fn(output, targets)
            return found
        return self._watch.loss(output, targets)

    def to_pandas(self) -> Any:
        """The records as a table: see `tnconv.monitor.run_folder.Run.to_pandas`."""
        return frame(self.records, [name for name, _ in self.subject.named])

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._end()
        self._begin()

    def _ever(self, need: Hashable) -> bool:
        return any(need in {*each.needed(), *each.next_needs} for each in self.measurements)

    def _begin(self) -> None:
        if self._watch is not None:
            raise RuntimeError("a step is going on already; expected the one before to end")
        begin = self._now()
        self.subject.look_again()
        self._look_for_changes(self.subject.named)
        self._due = [m for m in self.measurements if (m.every or self.schedule)(self.steps)]
        if self.budget is not None:
            self._due = self._afforded(self.budget, self._due)
        needs = {need for m in self._due for need in m.needed()}
        needs |= {need for m in self._followed for need in m.next_needs}
        needs = possible(self.subject, needs | implied(needs, self._ever, not self._compared))
        if "before" in needs:
            self._before = copies(self.subject.values)
        what = self.subject, frozenset(needs), self.subject.named
        self._watch = StepWatch(*what, now=self._now)
        if self._due or self._followed:
            self._watch.open()
        self._began, self._own = begin, self._now() - begin

    def _look_for_changes(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        """The loss's reduction, and which parameters learn, may not be what they were."""
        given = self._reduction or self.subject.found_reduction
        self.subject.reduction = reduction_in(self.subject.loss_fn, given)
        if self._origins.stay(named):
            return
        self._origins.follow(named, self.subject.values)
        if self._writer is not None:
            self._write(self._writer.resumed, {"parameters": [name for name, _ in named]})
        self._last, self._followed, self._since = None, (), self.steps
        self.subject.spectra.vectors.clear()

    def _now(self) -> float:
        if self.budget is None:
            return 0.0
        return clock(next(self.subject.core.parameters()).device.type == "cpu")

    def _afforded(self, budget: Budget, due: Sequence[Measurement]) -> list[Measurement]:
        """What of the measurements that are due the budget pays for at this step."""
        owed: Group | None = "samples" if self._followed else None
        group = budget.chosen(groups_of(due), owed)
        self.subject.samples = budget.samples
        chosen = ("cheap",) if owed is not None else ("cheap", group)
        return [each for each in due if group_of(each) in chosen]

    def _abandon(self) -> None:
        watch, self._watch = self._watch, None
        self._followed = ()
        if watch is not None:
            watch.close()

    @torch.no_grad()
    def _end(self) -> None:
        watch, last, ended = self._watch, self._last, self._now()
        assert watch is not None
        watch.close()
        step, self._watch, self._last, self.steps = self.steps, None, None, self.steps + 1
        if self._due or self._followed:
            try:
                self._look(watch, step, last)
            except Exception as error:  # the run goes on, whatever happens here
                self._followed, self._before = (), []
                self.subject.tell("the monitor could not measure a step", reason_of(error))
        if self.budget is not None:
            now = self._now()
            spent = [now - self._began, self._own + watch.spent + now - ended]
            if (many := self.subject.workers.count) > 1:  # all have to choose alike
                spent = [seconds / many for seconds in shared(watch, spent)]
            self.budget.spent(*spent)

    def _look(self, watch: StepWatch, step: int, last: Seen | None) -> None:
        """Make records of a step that is over."""
        updates = last.updates if last is not None else ()
        seen = seen_of(watch, step, self._before, self._origins.start, updates, self._ranges)
        if last is not None:
            seen.last_updates, seen.last_gradients = last.updates, last.gradients
        self._rate(seen)
        if "inner" in seen.has:
            self._compared = not seen.apart
        if self.budget is not None:
            self.budget.batch = seen.samples
        self._measure(seen, last)
        self._last = seen.kept(KEPT)
        self._before = []

    def _rate(self, seen: Seen) -> None:
        """Note what multiplies each parameter's g in a step, where the optimizer is known."""
        if self.optimizer is not None:
            of = {p: float(g["lr"]) for g in self.optimizer.param_groups for p in g["params"]}
            sums = self.subject.reduction == "sum"
            factor = seen.samples / self.subject.workers.count if sums else 1
            seen.rates = [factor * of.get(p, 0.0) for _, p in self.subject.named]
            seen.has.add("rates")

    def _measure(self, seen: Seen, last: Seen | None) -> None:
        """Record what is due, and what the step before waited for."""
        if last is not None:
            late = [
                (m, partial(m.after, last, seen))
                for m in self._followed
                if isinstance(m, Following) and seen.has.issuperset(m.next_needs)
            ]
            if values := self._values(late):
                self._publish(last.step, values, seen.samples)
        due = [m for m in self._due if seen.has.issuperset(m.needed())]
        if seen.apart:
            due = [m for m in due if not compares({*m.needed()})]
        self._followed = tuple(m for m in due if m.follows)
        self._warn_of_one(seen, due)
        if "gradient_norms" in seen.has:
            self._warn_of_missing(seen)
        if self._due:
            now = [(m, partial(m.value, seen)) for m in due if not m.follows]
            self._publish(seen.step, self._values(now), seen.samples)

    def _values(self, work: Sequence[tuple[Measurement, Callable[[], Any]]]) -> dict[str, Any]:
        """What measurements give; one that raises is left out, and the run goes on."""
        found: dict[str, Any] = {}
        for each, value in work:

            def note(name: str = each.name, value: Callable[[], Any] = value) -> None:
                found[name] = recordable(value())

            self.subject.attempt(each.name, note)
        return found

    def _warn_of_missing(self, seen: Seen) -> None:
        """Say once why something is not recorded, where the monitor's user can change that."""
        for each in self._due:
            for need in {*each.needed()} - seen.has - self.subject.left_out.keys():
                reason = why_missing(need, seen)
                if reason is not None and each.name not in self._missed:
                    self._missed.add(each.name)
                    warn(f"{each.name} is not recorded: {reason}")

    def _warn_of_one(self, seen: Seen, due: Sequence[Measurement]) -> None:
        if seen.samples == 1 and any(of_samples(n) for m in due for n in m.needed()):
            if not self._warned:
                self._warned = True
                warn("a step has one sample: what compares samples is NaN there")

    def _publish(self, step: int, values: Mapping[str, Any], samples: int) -> None:
        """Add values to the record of a step, write them, and tell sinks and rules of them."""
        held = next((r for r in reversed(self.records[-2:]) if r["step"] == step), None)
        if held is None:
            self.records.append(held := {"step": step})
        held.update(values)
        if self.subject.workers.rank or not (self._rules.rules or self.sinks or self._writer):
            return
        names = [name for name, _ in self.subject.named]
        event = event_of(step, values, names)
        history = History(self.records, names, frozenset(values), samples, self._since)
        event.alerts = self._rules.of(step, history)
        self.alerts += [(step, alert) for alert in event.alerts]
        for alert in event.alerts:
            _LOG.log(LEVELS[alert.level], "step %d: %s: %s", step, alert.title, alert.text)
        if self._writer is not None:
            self._write(self._writer.write, step, values)
            for alert in event.alerts:
                self._write(self._writer.alert, step, asdict(alert))
        failed = deliver(self.sinks, event)
        self.sinks = tuple(sink for sink in self.sinks if sink not in failed)

    def _write(self, what: Callable[..., None], *given: Any) -> None:
        """Write to the run's folder, until that fails: a full disk ends no run."""
        try:
            if self._writer is not None:
                what(*given)
        except Exception as error:
            warn(f"records are not written any more: {reason_of(error)}")
            self._writer = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to record what an uninterrupted one would."""
        return state_of(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from another run's `state_dict`."""
        restore(self, state_dict)
