"""What is made of the gradients of single samples in a step: norms, projections, histograms."""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any

import torch
from torch import Tensor

from tnconv.models.calls import Pass
from tnconv.monitor.histograms import Binning
from tnconv.monitor.kept_terms import SMALL, samples_of
from tnconv.monitor.needs import Bins, GradientHistogram, JointHistogram
from tnconv.monitor.sample_rows import SampleRows
from tnconv.monitor.sample_sums import Directions, Found, Wanted, contracted, together
from tnconv.monitor.seen import Seen
from tnconv.monitor.step_watch import StepWatch

DIRECTIONS = ("inner", "along", "ahead")
LEAST_RANGE = 1e-6


@dataclass
class Ranges:
    """Ranges of histograms that follow the largest magnitude of the last measured step."""

    gradient: float | None = None
    parameter: float | None = None

    def bins(self, given: Bins, limit: float | None, adapts: bool) -> Bins:
        """The bins at this step."""
        if not adapts or limit is None:
            return given
        reach = max(LEAST_RANGE / 2, limit)
        return Bins(given.count, -reach, reach)


@dataclass
class Totals:
    """Sums over the samples of this worker; counts are by parameter where they are layerwise."""

    device: torch.device
    squares: list[Tensor | None]
    norms: dict[Pass, SampleRows] = field(default_factory=dict)  # squared, (p, n)
    projections: dict[Pass, SampleRows] = field(default_factory=dict)  # (k, n)
    counts: dict[Hashable, list[Tensor | None]] = field(default_factory=dict)
    largest: float = 0.0


def by_sample(
    watch: StepWatch,
    seen: Seen,
    factor: float,
    last_updates: Sequence[Tensor],
    ranges: Ranges,
) -> None:
    """Everything that is made of the gradients of single samples, c[n] = g[n] / factor."""
    needs = watch.needs
    directions = [d for d in DIRECTIONS if d in needs and (d != "ahead" or last_updates)]
    sources = {"inner": seen.gradients, "along": seen.updates, "ahead": last_updates}
    wanted, bins = _wanted(watch, seen, factor, ranges)
    totals = _totals(watch, wanted, [sources[d] for d in directions])
    count = float(sum(_measured(watch, here) for here in watch.passes))
    local = float(sum(watch.passes.values()))
    weight = local / count if count else nan
    _moments(watch, seen, totals, directions, factor, weight)
    if "squares" in needs:
        own = [torch.zeros_like(b) if s is None else s.reshape(b.shape)
               for s, b in zip(totals.squares, _parameters(watch), strict=True)]  # fmt: skip
        shared = watch.subject.workers.sums(own)
        seen.squares = [each * (weight * factor**2) for each in shared]
        seen.has.add("squares")
    seen.histograms = {
        key: _histogram(watch, key, totals.counts.get(key, []), found)
        for key, found in bins.items()
    }
    seen.has |= {"histograms", *bins}
    if wanted.largest:
        ranges.gradient = totals.largest
        if any(isinstance(need, JointHistogram) for need in bins):
            ranges.parameter = max(float(p.abs().max()) for p in seen.before if p.numel())


def _parameters(watch: StepWatch) -> list[Tensor]:
    return [p.detach() for _, p in watch.named]


def _measured(watch: StepWatch, here: Pass) -> int:
    index = watch.indices[here]
    return watch.passes[here] if index is None else len(index)


def _wanted(
    watch: StepWatch, seen: Seen, factor: float, ranges: Ranges
) -> tuple[Wanted, dict[Hashable, tuple[Bins, ...]]]:
    histograms: dict[Hashable, Any] = {}
    bins: dict[Hashable, tuple[Bins, ...]] = {}
    numbers: dict[Hashable, list[Tensor]] = {}
    finite = all(norm == norm and abs(norm) != float("inf") for norm in seen.gradient_norms)
    for need in watch.needs if finite else ():
        if isinstance(need, GradientHistogram):
            bins[need] = (ranges.bins(need.bins, ranges.gradient, need.adapts),)
        elif isinstance(need, JointHistogram):
            one = ranges.bins(need.gradient, ranges.gradient, need.adapts)
            other = ranges.bins(need.parameter, ranges.parameter, need.adapts)
            bins[need] = one, other
            numbers[need] = [Binning(other).numbers(p.reshape(-1)) for p in seen.before]
        else:
            continue
        histograms[need] = need, Binning(bins[need][0], factor)
    adapts = any(need.adapts for need in bins)  # type: ignore[attr-defined]
    norms = bool(watch.needs & {"squared_norms", "normalisation", "largest_sample"})
    squares = "squares" in watch.needs
    return Wanted(norms, squares, histograms, numbers, adapts, factor), bins


def _totals(watch: StepWatch, wanted: Wanted, sources: Sequence[Sequence[Tensor]]) -> Totals:
    """Everything of all terms; small parameters of the same samples are worked on together."""
    numbers = {p: at for at, (_, p) in enumerate(watch.named)}
    totals = Totals(watch.named[0][1].device, [None] * len(numbers))
    for key, (need, _) in wanted.histograms.items():
        totals.counts[key] = [None] * (len(numbers) if need.layerwise else 1)
    directions = Directions(sources)
    small: dict[Hashable, dict[int, Tensor]] = defaultdict(dict)
    places: dict[Hashable, tuple[Pass, int]] = {}
    while watch.terms:  # each is freed once it was used
        parameter, term, here, first = watch.terms.pop(0)
        at, samples = numbers[parameter], samples_of(term)
        if parameter.numel() > SMALL:
            found = contracted(term, wanted, directions, at)
            _add(totals, found, [at], here, first, _measured(watch, here))
        else:
            each = term.gradients.flatten(1)
            again = sum(at in given and here is places[key][0] for key, given in small.items())
            place = here, first, samples, each.dtype, each.device, again
            small[place][at], places[place] = each, (here, first)
    for key, given in small.items():
        here, first = places[key]
        found = together(given, wanted, directions)
        _add(totals, found, list(given), here, first, _measured(watch, here))
    return totals


def _add(
    totals: Totals,
    found: Found,
    parameters: Sequence[int],
    here: Pass,
    first: int,
    samples: int,
) -> None:
    """Add what was found of some parameters and of the samples from the first on."""
    for kept, rows in ((totals.norms, found.norms), (totals.projections, found.projections)):
        if rows is not None:
            held = kept.get(here)
            if held is None:
                held = kept[here] = SampleRows(samples, totals.device, widest(totals.device))
            held.add(parameters, first, rows)
    for at, squares in zip(parameters, found.squares, strict=False):
        before = totals.squares[at]
        totals.squares[at] = squares if before is None else before + squares
    for key, counts in found.counts.items():
        known = totals.counts[key]
        for place, each in zip(parameters if len(known) > 1 else [0], counts, strict=True):
            before = known[place]
            known[place] = each if before is None else before + each
    totals.largest = max(totals.largest, found.largest)


def widest(device: torch.device) -> torch.dtype:
    """The widest floating-point dtype of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def _moments(
    watch: StepWatch,
    seen: Seen,
    totals: Totals,
    directions: Sequence[str],
    factor: float,
    weight: float,
) -> None:
    """Sums over all workers' samples of norms and projections."""
    each = [rows.added() for rows in totals.projections.values()]
    given = torch.cat(each, 1) if each else torch.zeros(len(directions), 0, dtype=torch.float64)
    own = [0.0] * len(watch.named)
    for rows in totals.norms.values():
        for at, norm in rows.by_parameter():
            own[at] += norm
    sums = [float(given.shape[1]), *own]
    sums += given.sum(1).tolist() + given.square().sum(1).tolist()
    n, *rest = shared(watch, sums)
    p, k = len(own), len(directions)
    if "squared_norms" in watch.needs:
        seen.squared_norms = [weight * factor**2 * norm for norm in rest[:p]]
        seen.has.add("squared_norms")
    if "normalisation" in watch.needs:
        unit = seen.samples / watch.subject.workers.count / factor
        seen.normalisation = _normalisation(watch, rest[:p], weight * factor**2, unit)
        seen.has.add("normalisation")
    if "largest_sample" in watch.needs:
        norms = [rows.by_sample() for rows in totals.norms.values()]
        most = max((float(each.max()) for each in norms if each.numel()), default=0.0)
        workers = watch.subject.workers
        seen.largest_sample = factor**2 * max(
            shared(watch, [most if rank == workers.rank else 0.0 for rank in range(workers.count)])
        )
        seen.has.add("largest_sample")
    for at, name in enumerate(directions):
        first, second = factor * rest[p + at], factor**2 * rest[p + k + at]
        if name == "inner":
            seen.inner = weight * first, weight * second
        else:
            found = (first / n if n else nan), variance(n, first, second)
            setattr(seen, name, found)
        seen.has.add(name)


def _normalisation(
    watch: StepWatch, norms: Sequence[float], weight: float, unit: float
) -> tuple[float, float]:
    """``Σ_n |g[n]|²`` and ``|g|²`` in the parameters of normalisation layers alone."""
    chosen = {*watch.subject.normalising}
    at = [number for number, (_, p) in enumerate(watch.named) if p in chosen]
    norms_of_mean = watch.backward.own_norms
    if watch.constants:
        norms_of_mean = [
            torch.zeros(()) if g is None else g.norm() for g in watch.backward.gradients
        ]
    mean = sum((float(norms_of_mean[number]) / unit) ** 2 for number in at)
    return weight * sum(norms[number] for number in at), mean


def _histogram(
    watch: StepWatch, key: Hashable, counts: Sequence[Tensor | None], bins: Sequence[Bins]
) -> Mapping[str, Any]:
    """The counts of all parameters together, and of each if that is asked for."""
    assert isinstance(key, GradientHistogram | JointHistogram)
    shape = [each.count for each in bins]
    device = watch.named[0][1].device
    own = [
        torch.zeros(shape, dtype=torch.int64, device=device) if c is None else c.to(device)
        for c in counts
    ]
    shared = [c.cpu().numpy() for c in watch.subject.workers.sums(own)]
    edges = [Binning(each).edges.numpy() for each in bins]
    shown: Any = edges[0] if len(edges) == 1 else tuple(edges)
    found: dict[str, Any] = {"hist": sum(shared[1:], shared[0]), "edges": shown}
    if key.layerwise:
        found |= {f"param_{at}": {"hist": h, "edges": shown} for at, h in enumerate(shared)}
    return found


def variance(n: float, first: float, second: float) -> float:
    return max(0.0, second - first**2 / n) / (n - 1) if n > 1 else nan


def shared(watch: StepWatch, values: Sequence[float]) -> list[float]:
    """Sums over workers."""
    workers = watch.subject.workers
    if workers.count == 1:
        return list(values)
    device = watch.named[0][1].device
    given = torch.tensor(values, dtype=widest(device), device=device)
    found: list[float] = workers.sums([given])[0].tolist()
    return found
