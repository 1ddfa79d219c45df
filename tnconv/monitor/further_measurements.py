"""Measurements beside the published ones: the spectrum, noise, ratios, units, and what moves."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import nan, sqrt
from typing import Any

import torch
from torch import Tensor

from tnconv.monitor.measurement import Measurement
from tnconv.monitor.needs import Activity, Spectrum
from tnconv.monitor.seen import Seen, norms, numbers


@dataclass(frozen=True)
class HessSpectrum(Measurement):
    """``{"largest", "smallest"}``: both ends of the Hessian's spectrum by Lanczos.

    The largest is found as in `HessMaxEV`, the smallest from its vector of the step before, with
    so many ``products`` or to a relative error estimated below ``tolerance``; ``"products"`` says
    how many both took.
    """

    products: int = 12
    tolerance: float = 0.01

    def needed(self) -> Iterable[Hashable]:
        return (Spectrum(True, self.products, self.tolerance),)

    def value(self, seen: Seen) -> dict[str, float]:
        largest, smallest, products = seen.spectra[Spectrum(True, self.products, self.tolerance)]
        return {"largest": largest, "smallest": smallest, "products": products}


class GradientRatio(Measurement):
    """``|g| / |θ|`` by parameter."""

    needs = ("gradients", "before")

    def value(self, seen: Seen) -> list[float]:
        return _ratios(seen.gradients, seen.before)


class UpdateRatio(Measurement):
    """``|θ(t+1) - θ(t)| / |θ(t)|`` by parameter."""

    needs = ("updates", "before")

    def value(self, seen: Seen) -> list[float]:
        return _ratios(seen.updates, seen.before)


@dataclass(frozen=True)
class DeadUnits(Measurement):
    """The fraction of units of rectifiers that are zero for all samples of the step, by layer."""

    def needed(self) -> Iterable[Hashable]:
        return (Activity(),)

    def value(self, seen: Seen) -> dict[str, float]:
        return dict(seen.dead)


@dataclass(frozen=True)
class SaturatedUnits(Measurement):
    """The fraction of entries of bounded activations next to their limits, by layer.

    Next is less than ``1 - saturation`` of the way from a limit to the middle.
    """

    saturation: float = 0.99

    def needed(self) -> Iterable[Hashable]:
        return (Activity(self.saturation),)

    def value(self, seen: Seen) -> dict[str, float]:
        return dict(seen.saturated[Activity(self.saturation)])


class GradientCosine(Measurement):
    """The cosine of the angle between this gradient and that of the step before."""

    needs = ("gradients", "last_gradients")

    def value(self, seen: Seen) -> float:
        return _cosine(seen.gradients, seen.last_gradients)


class UpdateCosine(Measurement):
    """The cosine of the angle between this update and that of the step before."""

    needs = ("updates", "last_updates")

    def value(self, seen: Seen) -> float:
        return _cosine(seen.updates, seen.last_updates)


class CriticalBatchSize(Measurement):
    """``tr Σ / |G|²``, the simple noise scale: McCandlish et al. 2018, appendix A.

    Both from one batch, without bias: ``tr Σ = (mean_n |g[n]|² - |g|²) B / (B-1)`` and
    ``|G|² = (B |g|² - mean_n |g[n]|²) / (B-1)``; NaN where the latter is not positive.
    """

    needs = ("squared_norms", "gradients")

    def value(self, seen: Seen) -> float:
        return _noise_scale(seen.samples, seen.total_squared_norms, seen.squared_norm)


class NormalisationNoiseScale(Measurement):
    """`CriticalBatchSize` in the parameters of normalisation layers alone, for next to no cost.

    It follows that of all parameters in transformers: Gray et al. 2024. Layers that normalise by
    the batch's statistics do not count: there no sample has a gradient of its own.
    """

    needs = ("normalisation",)

    def value(self, seen: Seen) -> float:
        return _noise_scale(seen.samples, *seen.normalisation)


class LargestSample(Measurement):
    """``max_n |g[n]|² / mean_n |g[n]|²``: how far the sample with the largest gradient is out."""

    needs = ("squared_norms", "largest_sample")

    def value(self, seen: Seen) -> float:
        mean = seen.total_squared_norms / max(1, seen.samples)
        return seen.largest_sample / mean if mean else nan


@dataclass(frozen=True)
class Smoothed(Measurement):
    """The exponential moving average of another measurement's numbers, corrected for its start.

    ``m <- β m + (1-β) x``; values that are not finite are skipped.

    Args:
        every: the steps that measure it, by default those of the monitor.
        inner: what is averaged.
        beta: β in [0, 1).
        state: the average so far.
    """

    inner: Measurement
    beta: float = 0.9
    state: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1 or self.inner.follows:
            raise ValueError(
                f"beta is {self.beta} and inner {self.inner.name}; expected a number in [0, 1) and "
                "a measurement of one step"
            )

    @property
    def name(self) -> str:
        return f"Smoothed{self.inner.name}"

    @property
    def plain_sgd(self) -> bool:  # type: ignore[override]
        return self.inner.plain_sgd

    def needed(self) -> Iterable[Hashable]:
        return self.inner.needed()

    def value(self, seen: Seen) -> Any:
        found = self.inner.value(seen)
        if isinstance(found, Mapping):
            smooth = self._smooth([*found.values()], [*found])
            return dict(zip(found, smooth, strict=True))
        if isinstance(found, list):
            return self._smooth(found, [*seen.names])
        return self._smooth([found], [])[0]

    def _smooth(self, given: Sequence[Any], keys: list[str]) -> list[float]:
        """Averages of numbers; they begin anew where other parameters or layers have them."""
        if len(self.state.get("mean", given)) != len(given) or self.state.get("keys", keys) != keys:
            self.state.clear()
        count, held = self.state.get("count", 0), self.state.get("mean", [0.0] * len(given))
        if all(isinstance(x, float | int) and x - x == 0 for x in given):
            held = [self.beta * m + (1 - self.beta) * x for m, x in zip(held, given, strict=True)]
            count += 1
            self.state.update(count=count, mean=held, keys=keys)
        return [m / (1 - self.beta**count) if count else nan for m in held]


FURTHER: tuple[type[Measurement], ...] = (
    *(HessSpectrum, GradientRatio, UpdateRatio, DeadUnits, SaturatedUnits, GradientCosine),
    *(UpdateCosine, CriticalBatchSize, LargestSample, NormalisationNoiseScale),
)


def _noise_scale(samples: int, squares: float, norm: float) -> float:
    """From ``Σ_n |g[n]|²`` and ``|g|²``; NaN where the signal is not positive."""
    mean = squares / max(1, samples)
    if samples < 2 or not samples * norm > mean:
        return nan
    return (mean - norm) * samples / (samples * norm - mean)


def _ratios(some: Sequence[Tensor], others: Sequence[Tensor]) -> list[float]:
    pairs = zip(numbers(norms(some)), numbers(norms(others)), strict=True)
    return [a / b if b else nan for a, b in pairs]


def _cosine(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    if not others:
        return nan
    products = torch.zeros(3, dtype=torch.float64)
    for a, b in zip(some, others, strict=True):
        pairs = ((a, b), (a, a), (b, b))
        products += torch.stack([(p * q).sum(dtype=torch.float64).cpu() for p, q in pairs])
    ab, aa, bb = products.tolist()
    return ab / sqrt(aa * bb) if aa * bb else nan
