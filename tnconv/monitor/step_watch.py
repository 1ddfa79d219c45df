"""Watching one step: losses when they are computed, gradients when a backward pass ends."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tnconv.losses.diagonals import LossFunction
from tnconv.models.calls import Pass
from tnconv.models.capture import Inert, alone
from tnconv.models.terms import Term
from tnconv.monitor.activity import ActivityWatch
from tnconv.monitor.backward_passes import BackwardPasses
from tnconv.monitor.constant_statistics import Beginning, constant_statistics
from tnconv.monitor.kept_terms import KeepingObservation, index_of
from tnconv.monitor.micro_batches import Portion
from tnconv.monitor.needs import Activity, Diagonal, Spectrum
from tnconv.monitor.sample_losses import sample_losses
from tnconv.monitor.step_curvature import (
    WALKED,
    HessianProducts,
    by_layers,
    by_product,
    by_walk,
    exactly,
)
from tnconv.monitor.subject import Subject

PROJECTIONS = frozenset(("inner", "along", "ahead"))
OF_ALL = PROJECTIONS | {"squared_norms", "largest_sample", "squares", "histograms"}
"""Needs that take gradients of single samples in all parameters."""
BY_SAMPLE = OF_ALL | {"normalisation"}
"""Needs that take gradients of single samples."""
SAMPLES = "gradients of single samples"
NEITHER = (
    "it is neither the mean nor the sum of its values on single samples; expected such a loss, or "
    "Monitor(..., reduction=...)"
)
UNSEEN = (
    "a backward pass brought gradients through no pass of the model that had brought none before; "
    "expected one backward pass for each, of the sum of all losses and penalties"
)


@dataclass(eq=False)
class StepWatch:
    """The hooks of one step, and what they collect until it ends."""

    subject: Subject
    needs: frozenset[Hashable]
    named: Sequence[tuple[str, nn.Parameter]]
    portions: list[Portion] = field(default_factory=list)
    terms: list[tuple[nn.Parameter, Term, Pass, int]] = field(default_factory=list)
    passes: dict[Pass, int] = field(default_factory=dict)
    indices: dict[Pass, Tensor | None] = field(default_factory=dict)
    now: Callable[[], float] = lambda: 0.0
    spent: float = 0.0  # seconds at losses and at the ends of backward passes

    def __post_init__(self) -> None:
        self._stack = ExitStack()
        compared = bool(self.needs & (BY_SAMPLE | {"gradients"}))
        self.backward = BackwardPasses(self.subject, self.named, compared, self._over)
        self._busy = False
        self._propagated: Pass | None = None
        self.calls: int | None = None  # of the model, where they are counted
        self.mixed = False  # whether a loss was computed under autocast
        self.unclear: str | None = None  # why gradients are not those of the samples that were seen
        self._observation: KeepingObservation | None = None
        self._activity: ActivityWatch | None = None
        self._beginning: Beginning | None = None
        self._returned: Any = None
        self.constants = False  # gradients are of a pass with the batch's statistics as constants

    def open(self) -> None:
        """Register the hooks."""
        subject = self.subject
        for _, parameter in self.named:
            register: Any = parameter.register_post_accumulate_grad_hook
            hook = register(self.backward.accumulated)
            self._stack.callback(hook.remove)
        if getattr(subject.model, "_compiled_call_impl", None) is None:  # a hook compiles anew
            self.calls = 0
            hook = subject.model.register_forward_pre_hook(Inert(self._counted))
            self._stack.callback(hook.remove)
        if isinstance(subject.loss_fn, nn.Module):
            hook = subject.loss_fn.register_forward_hook(Inert(self._loss_called), with_kwargs=True)
            self._stack.callback(hook.remove)
        if subject.loss_fn is None:
            hook = subject.core.register_forward_hook(Inert(self._model_called))
            self._stack.callback(hook.remove)
        layered = [d for need in self._of(Diagonal) if (d := by_layers(need, subject.generator))]
        if self.needs.intersection(BY_SAMPLE) or layered:
            chosen = partial(index_of, measured=subject.samples, generator=subject.generator)
            some = None if self.needs & OF_ALL else frozenset(subject.normalising)
            in_parts = len(self.needs & OF_ALL) > 1 or not self.needs & PROJECTIONS
            self._observation = KeepingObservation(
                subject.model, layered, chosen, some, subject.batch_dim, in_parts
            )
            watch = self._stack.enter_context(self._observation.watched())
            self.constants = subject.constants and subject.mixing is not None
            watch.paused = self.constants
        if self.constants or Diagonal("diag_h") in self.needs:
            hook = subject.core.register_forward_pre_hook(Inert(self._called), with_kwargs=True)
            self._stack.callback(hook.remove)
            hook = subject.core.register_forward_hook(Inert(self._gave))
            self._stack.callback(hook.remove)
        activities = self._of(Activity)
        if activities:
            self._activity = ActivityWatch(subject.core, activities)
            self._stack.enter_context(self._activity)

    def close(self) -> None:
        """Remove the hooks."""
        self._stack.close()
        self.backward.left = []
        self._observation = self._beginning = self._returned = None

    def loss(self, output: Any, targets: Any) -> Tensor:
        """The loss of a function that is no module, watched."""
        assert self.subject.loss_fn is not None
        found = self.subject.loss_fn(output, targets)
        if not isinstance(self.subject.loss_fn, nn.Module):
            self.saw(output, targets, found)
        return found

    def saw(self, output: Any, targets: Any, loss: Tensor) -> None:
        """Take note of a loss, before it goes backwards."""
        if self._busy or not loss.requires_grad or not torch.is_grad_enabled():
            return
        self._busy, began = True, self.now()
        self.mixed |= torch.is_autocast_enabled(loss.device.type)
        try:
            observation = self._observation if self.constants else None
            if observation is not None:
                observation.attempt(partial(self._pass_again, observation, output, targets))
            portion = Portion(loss.detach(), self._samples(output), self.calls)
            self.portions.append(portion)
            if observation is not None:
                self._collect(observation, [portion])
                observation._watch.paused = True
            loss.register_hook(partial(self._reached, portion))  # type: ignore[no-untyped-call]
            if self.subject.asks_for_reduction:
                self._ask_for_reduction(portion, output, targets)
            self._measure(portion, output, targets, loss)
        finally:
            self._busy = False
            self.spent += self.now() - began

    @property
    def activity(self) -> ActivityWatch | None:
        """What was seen of activations."""
        return self._activity

    @property
    def failure(self) -> str | None:
        """Why samples could not be told apart, if so."""
        return None if self._observation is None else self._observation.failure

    def _of(self, kind: type[Any]) -> list[Any]:
        return [need for need in self.needs if isinstance(need, kind)]

    def _loss_called(
        self, loss_fn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any
    ) -> None:
        given = _arguments(loss_fn, args, kwargs)
        if isinstance(loss, Tensor) and len(given) > 1:
            self.saw(given[0], given[1], loss)

    def _model_called(self, model: nn.Module, args: Any, output: Any) -> None:
        """Models of transformers that are given labels return their loss."""
        loss = getattr(output, "loss", None)
        if isinstance(loss, Tensor) and not loss.dim():
            self.saw(next((v for k, v in output.items() if k != "loss"), None), None, loss)

    def _samples(self, output: Any) -> int:
        if self._observation is not None and self._observation.failure is None:
            passes = self._observation._watch.passes
            if passes:
                return passes[-1].samples
        rows = (len(t) for t in tree_leaves(output) if isinstance(t, Tensor) and t.dim())
        return next(rows, 1)

    def _measure(self, portion: Portion, output: Any, targets: Any, loss: Tensor) -> None:
        """What is made of the graph while it is there."""
        parameters = [p for _, p in self.named]
        self._measure_products(portion, loss, parameters)
        subject, loss_fn = self.subject, self.subject.loss_fn
        if loss_fn is None:
            lost = [n for n in self.needs if n == "losses" or isinstance(n, Diagonal)]
            for need in lost:
                subject.leave_out(need, "the monitor was made without loss_fn")
            return
        if "losses" in self.needs:
            portion.each = subject.attempt(
                "losses", lambda: sample_losses(loss_fn, output, targets, portion.samples)
            )
        walked = [d for d in self._of(Diagonal) if d.kind in (*WALKED, "diag_h")]
        layered = any(by_layers(d, subject.generator) for d in self._of(Diagonal))
        if layered and not self.constants:
            self._propagate(output, targets)
        for need in walked:
            if need.kind == "diag_h":
                found = subject.attempt(need, partial(self._exactly, output, targets))
            else:
                walk = (need, subject.core, loss_fn, output, targets, parameters)
                found = subject.attempt(need, partial(by_walk, *walk))
            if found is not None:
                portion.diagonals[need] = found

    def _ask_for_reduction(self, portion: Portion, output: Any, targets: Any) -> None:
        """Whether the loss is the mean or the sum of its values on single samples, from two on."""
        subject, loss_fn = self.subject, self.subject.loss_fn
        if portion.samples < 2 or loss_fn is None:
            return
        subject.asks_for_reduction = False
        each = subject.attempt(
            "the loss's reduction",
            lambda: sample_losses(loss_fn, output, targets, portion.samples).double(),
        )
        if each is None or not each.isfinite().all():
            return
        found, slack = float(portion.loss), 1e-3 * float(each.abs().sum())
        if abs(found - float(each.mean())) <= slack / len(each):
            subject.found_reduction = "mean"
        elif abs(found - float(each.sum())) <= slack:
            subject.found_reduction = subject.reduction = "sum"
        else:
            subject.tell("the loss is taken for a mean over samples", NEITHER)

    def _measure_products(
        self, portion: Portion, loss: Tensor, parameters: Sequence[Tensor]
    ) -> None:
        """What is made of products with the Hessian, on one graph of the gradient."""
        subject, spectra = self.subject, self._of(Spectrum)
        sampled = [d for d in self._of(Diagonal) if d.kind == "diag_h_mc"]
        if not spectra and not sampled:
            return
        products = subject.attempt(
            (*spectra, *sampled)[0],
            lambda: HessianProducts(subject.core, loss, parameters, subject.workers),
        )
        for need in spectra if products is not None else ():
            found = subject.attempt(need, partial(subject.spectra.of, products, need))
            if found is not None:
                portion.spectra[need] = found
        for diagonal in sampled if products is not None else ():
            found = subject.attempt(diagonal, partial(by_product, products, subject.generator))
            if found is not None:
                portion.diagonals[diagonal] = found

    def _counted(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if self.calls is not None and not self._busy and torch.is_grad_enabled():
            self.calls += 1

    def _called(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._busy and torch.is_grad_enabled():
            self._beginning = Beginning.of(args, kwargs, self.named[0][1].device)

    def _gave(self, model: nn.Module, args: Any, output: Any) -> None:
        if not self._busy and torch.is_grad_enabled():
            self._returned = output

    def _pass_of(self, output: Any) -> tuple[LossFunction, Beginning]:
        """What to repeat the pass with that an output comes from.

        Raises:
            NotImplementedError: the loss reads something else.
        """
        loss_fn = self.subject.loss_fn
        if loss_fn is None or self._beginning is None or output is not self._returned:
            raise NotImplementedError(
                "the loss reads something else than what the model returned, so that its pass is "
                "not repeated; expected loss_fn(model(inputs), targets)"
            )
        return loss_fn, self._beginning

    def _exactly(self, output: Any, targets: Any) -> list[Tensor]:
        loss_fn, begun = self._pass_of(output)
        names, parameters = zip(*self.named, strict=True)
        given = begun.args, begun.kwargs
        return exactly(self.subject.core, loss_fn, given, targets, names, parameters)

    def _pass_again(self, observation: KeepingObservation, output: Any, targets: Any) -> None:
        """The pass with the batch's statistics as constants, forwards and backwards."""
        loss_fn, begun = self._pass_of(output)
        core, workers, watch = self.subject.core, self.subject.workers, observation._watch
        parameters = [p for _, p in self.named]
        watch.paused = False
        try:
            with alone(core, watch), constant_statistics(core), begun.replayed():
                again = core(*begun.args, **begun.kwargs)
                observation.propagate(loss_fn, again, targets)
                found = torch.autograd.grad(loss_fn(again, targets), parameters, allow_unused=True)
        finally:
            watch.paused = True
        pairs = zip(parameters, found, strict=True)
        own = workers.sums([torch.zeros_like(p) if g is None else g for p, g in pairs])
        shared = [each / workers.count for each in own] if workers.count > 1 else own
        held = [g for g in self.backward.gradients if g is not None]
        self.backward.gradients = [*(torch._foreach_add(held, shared) if held else shared)]

    def _propagate(self, output: Any, targets: Any) -> None:
        observation, loss_fn = self._observation, self.subject.loss_fn
        if observation is not None and loss_fn is not None:
            passes = observation._watch.passes
            if passes and passes[-1] is self._propagated:
                return  # another term of a loss: vectors go through a pass once
            self._propagated = passes[-1] if passes else None
            observation.attempt(lambda: observation.propagate(loss_fn, output, targets))

    def _reached(self, portion: Portion, gradient: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        portion.arriving = task, float(gradient.reshape(-1)[0])
        self._begins()
        if self.subject.sharded:  # parameters that no gradient is added to by autograd
            self.backward.ask_for_the_end()

    def _begins(self) -> None:
        """A backward pass begins: what the step's others brought may be gone by now."""
        if self.backward.was_cut_short() and self._observation is not None:
            self._observation.failure = "a backward pass of this step raised"
        if self.backward.begins():
            self._forget()

    def _forget(self) -> None:
        """The gradients so far were zeroed: what they are of is not in the step."""
        self.portions = [each for each in self.portions if each.factor is None]
        for kept in (self.terms, self.passes, self.indices):
            kept.clear()
        self.backward.forget()
        self.unclear = None

    @torch.no_grad()
    def _over(self, task: int) -> None:
        """A backward pass is over: take its gradients before anybody clips them."""
        began = self.now()
        given = self.backward.look()
        arrived = [each for each in self.portions if each.arrived(task)]
        if not self.constants:
            if "gradients" in self.needs:
                self.backward.keep(given)
            if self._observation is not None:
                self._collect(self._observation, arrived)
        self.spent += self.now() - began

    def _collect(self, observation: KeepingObservation, arrived: Sequence[Portion]) -> None:
        kept = observation.kept

        def finish() -> None:
            result = observation.result()
            if not kept.passes:
                self.unclear = UNSEEN
            for here in kept.passes:
                self.passes[here] = here.samples
                self.indices[here] = kept.indices.get(here)
            self.terms += kept.terms
            names = [name for name, _ in self.named]
            for need in self._of(Diagonal):
                quantity = by_layers(need, self.subject.generator)
                if quantity is not None and len(arrived) == len(kept.passes):
                    found = result[quantity]
                    zeros = [p for _, p in self.named]
                    diagonals = [
                        found[name] if name in found else torch.zeros_like(p)
                        for name, p in zip(names, zeros, strict=True)
                    ]
                    for each in arrived:
                        each.diagonals[need] = diagonals

        observation.attempt(finish)


def _arguments(loss_fn: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments of a loss in the order in which it has them, whatever their order was."""
    if not kwargs:
        return [*args]
    try:
        bound = signature(getattr(loss_fn, "_orig_mod", loss_fn).forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return [*args, *kwargs.values()]
    return [*bound.arguments.values()]
