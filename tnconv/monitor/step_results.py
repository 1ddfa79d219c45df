"""From what a step's hooks collected to what measurements read."""

import time
from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from tnconv.monitor.micro_batches import Portion, micro_batches
from tnconv.monitor.needs import Activity, Diagonal, Spectrum
from tnconv.monitor.sample_results import Ranges, by_sample, shared, variance
from tnconv.monitor.seen import Seen, numbers
from tnconv.monitor.step_watch import SAMPLES, StepWatch
from tnconv.monitor.subject import whole

APART = (
    "p.grad is not their mean; expected gradients of the loss alone, without penalties (weight "
    "decay is the optimizer's), tensor dropout, and hooks that change gradients"
)


def seen_of(
    watch: StepWatch,
    step: int,
    before: Sequence[Tensor],
    start: Sequence[Tensor],
    last_updates: Sequence[Tensor],
    ranges: Ranges,
) -> Seen:
    """What was seen of a step that is over; its hooks are to be closed already.

    Args:
        watch: collected it.
        step: its number.
        before: the parameters before the step, where needed.
        start: the parameters at the reference point.
        last_updates: of the step before, to project on.
        ranges: of histograms that adapt; they move on.
    """
    subject, needs = watch.subject, watch.needs
    named = watch.named
    seen = Seen(step, [name for name, _ in named], time.time(), before=before, start=start)
    scale = watch.backward.scale
    seen.gradient_norms = [norm / scale for norm in numbers(watch.backward.norms)]
    seen.has |= {"step", "names", "time", "samples", "before", "start"}
    seen.has |= {"last_gradients", "last_updates"}
    if watch.backward.norms:
        seen.has.add("gradient_norms")
    if "updates" in needs:
        seen.updates = list(torch._foreach_sub(subject.values, list(before)))
        seen.has.add("updates")
    seen.several = _put_together(watch)
    _losses(watch, seen)
    own = sum(p.samples for p in watch.portions) or sum(watch.passes.values())
    seen.samples = int(shared(watch, [float(own)])[0])
    unit = _unit(watch, seen.samples)
    if "gradients" in needs and watch.backward.gradients:
        seen.gradients = [
            torch.zeros_like(whole(p)) if g is None else g if unit == 1 else g / unit
            for (_, p), g in zip(named, watch.backward.gradients, strict=True)
        ]
        seen.has.add("gradients")
        if not watch.constants and all(p.dtype.itemsize > 2 for _, p in named):
            found = numbers(watch.backward.own_norms)
            seen.squared_norms_of_mean = [(norm / unit) ** 2 for norm in found]
    if watch.terms and watch.failure is None and watch.unclear is None:
        factor = seen.samples / subject.workers.count / unit
        given = watch, seen, factor, last_updates, ranges
        subject.attempt(SAMPLES, lambda: by_sample(*given))
        _compare(watch, seen)
    _curvature(watch, seen)
    if watch.activity is not None:
        seen.dead = watch.activity.dead()
        asked = [need for need in needs if isinstance(need, Activity)]
        seen.saturated = {need: watch.activity.at_limits(need) for need in asked}
        seen.has |= seen.saturated.keys()
    return seen


def _compare(watch: StepWatch, seen: Seen) -> None:
    """Whether the samples' gradients have the mean that the step's gradient is: ``Σ_n g[n]·g``."""
    if "inner" not in seen.has or any(watch.indices[here] is not None for here in watch.passes):
        return
    wide = all(p.dtype.itemsize > 2 for _, p in watch.named) and not watch.mixed
    slack = (1e-3 if wide else 3e-2) * sqrt(seen.samples * seen.inner[1])
    expected = seen.samples * seen.squared_norm
    if abs(seen.inner[0] - expected) > slack + 0.01 * expected:
        seen.apart = True
        watch.subject.tell("what compares gradients of samples with p.grad is left out", APART)


def _put_together(watch: StepWatch) -> bool:
    """From losses to micro-batches; whether these have several terms.

    Where the samples' gradients are not known, say why.
    """
    several = False
    passes = 0 if watch.failure is not None else len(watch.passes)
    if watch.portions:
        try:
            mean = watch.subject.reduction == "mean"
            given = watch.portions, passes, watch.backward.count, watch.backward.scale
            reached = sum(each.factor is not None for each in watch.portions)
            watch.portions = micro_batches(*given, mean)
            several = len(watch.portions) < reached
        except NotImplementedError as error:
            watch.unclear = str(error)
    if watch.unclear is not None:
        watch.subject.tell("gradients of single samples are not known at some steps", watch.unclear)
    return several


def _unit(watch: StepWatch, samples: int) -> float:
    """What the gradients that arrived are multiples of: S in ``p.grad = S g``."""
    subject, factors = watch.subject, [p.factor or 1.0 for p in watch.portions]
    factors = [1.0] * len(factors) if watch.constants else factors
    total = sum(factors) if factors else watch.backward.scale
    if subject.reduction == "mean":
        return total
    return total / max(1, len(factors)) * samples / subject.workers.count


def _losses(watch: StepWatch, seen: Seen) -> None:
    """The mean loss, and the variance of the samples' losses."""
    portions = watch.portions
    if not portions:
        return
    mean = watch.subject.reduction == "mean"
    total = sum(float(p.loss) * (p.samples if mean else 1) for p in portions)
    count, whole = float(sum(p.samples for p in portions)), [p.each for p in portions]
    given = [each.double() for each in whole if each is not None]
    each = torch.cat(given) if given and len(given) == len(whole) else torch.empty(0)
    sums = [total, count, float(len(each)), *torch.stack([each.sum(), each.dot(each)]).tolist()]
    total, count, n, first, second = shared(watch, sums)
    seen.loss = total / count
    seen.losses = seen.loss, variance(n, first, second)
    seen.has.add("loss")
    if n:
        seen.has.add("losses")


def _curvature(watch: StepWatch, seen: Seen) -> None:
    """Diagonals and eigenvalues of the mean loss of all portions and workers."""
    portions, workers = watch.portions, watch.subject.workers
    mean = watch.subject.reduction == "mean"
    total = sum(p.samples for p in portions) or 1

    def share(portion: Portion) -> float:
        """The factor of a portion's loss in the mean loss."""
        return (portion.samples if mean else 1) / total

    for need in watch.needs:
        if isinstance(need, Diagonal) and portions and all(need in p.diagonals for p in portions):
            parts = [[share(p) * d for d in p.diagonals[need]] for p in portions]
            summed = workers.sums([sum(ds[1:], ds[0]) for ds in zip(*parts, strict=True)])
            seen.diagonals = {**seen.diagonals, need: [d / workers.count for d in summed]}
            seen.has.add(need)
        if isinstance(need, Spectrum) and portions and all(need in p.spectra for p in portions):
            most, least = (sum(share(p) * p.spectra[need][at] for p in portions) for at in (0, 1))
            taken = sum(p.spectra[need][2] for p in portions)
            seen.spectra = {**seen.spectra, need: (most, least, taken)}
            seen.has.add(need)
