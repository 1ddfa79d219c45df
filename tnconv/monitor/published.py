"""The nineteen quantities of Cockpit, under their names and by their formulas.

Source: Schneider, Dangel, Hennig 2021, and the formulas of the published tool. A formula without
a value (one sample, a gradient of zero) is NaN.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import nan, sqrt
from typing import Any, Literal

import torch
from torch import Tensor

from tnconv.monitor.measurement import Following, Measurement
from tnconv.monitor.needs import (
    Bins,
    Curvature,
    Diagonal,
    GradientHistogram,
    JointHistogram,
    Spectrum,
)
from tnconv.monitor.parabola import step_length
from tnconv.monitor.seen import Seen, distances

Adaptation = Literal["none", "absmax"]


class Loss(Measurement):
    """``L``: the mini-batch loss, the mean over samples."""

    needs = ("loss",)

    def value(self, seen: Seen) -> float:
        return seen.loss


class Parameters(Measurement):
    """All parameters before the step, as nested lists."""

    needs = ("before",)

    def value(self, seen: Seen) -> list[Any]:
        return [each.tolist() for each in seen.before]


class Time(Measurement):
    """Seconds since the epoch."""

    def value(self, seen: Seen) -> float:
        return seen.time


class GradNorm(Measurement):
    """``|p.grad|`` by parameter: of the loss that was given, unscaled and before clipping."""

    needs = ("gradient_norms",)

    def value(self, seen: Seen) -> list[float]:
        return list(seen.gradient_norms)


class Distance(Measurement):
    """``|θ(t) - θ(0)|`` by parameter."""

    needs = ("before", "start")

    def value(self, seen: Seen) -> list[float]:
        return distances(seen.before, seen.start)


class UpdateSize(Measurement):
    """``|θ(t+1) - θ(t)|`` by parameter."""

    needs = ("updates",)

    def value(self, seen: Seen) -> list[float]:
        return list(seen.update_sizes)


class NormTest(Measurement):
    """``√((Σ_n |g[n]|² - B |g|²) / (B (B-1) |g|²))``: Byrd et al. 2012, (3.9)."""

    needs = ("squared_norms", "gradients")

    def value(self, seen: Seen) -> float:
        b, norm = seen.samples, seen.squared_norm
        return _root(_ratio(seen.total_squared_norms - b * norm, b * (b - 1) * norm))


class InnerTest(Measurement):
    """``√((Σ_n (g[n]·g)² - B |g|⁴) / (B (B-1) |g|⁴))``: Bollapragada et al. 2017, (2.6)."""

    needs = ("inner", "gradients")

    def value(self, seen: Seen) -> float:
        b, norm = seen.samples, seen.squared_norm
        return _root(_ratio(seen.inner[1] - b * norm**2, b * (b - 1) * norm**2))


class OrthoTest(Measurement):
    """``√((Σ_n |g[n]|² - Σ_n (g[n]·g)² / |g|²) / (B (B-1) |g|²))``: there, (3.3)."""

    needs = ("squared_norms", "inner", "gradients")

    def value(self, seen: Seen) -> float:
        b, norm = seen.samples, seen.squared_norm
        part = _ratio(seen.inner[1], norm)
        return _root(_ratio(seen.total_squared_norms - part, b * (b - 1) * norm))


class CABS(Measurement):
    """``η (Σ_n |g[n]|² - B |g|²) / (B L)``: the batch size of Balles et al. 2017.

    With several learning rates η, each parameter's part has its own. It is derived for stochastic
    gradient descent without momentum.
    """

    needs = ("squared_norms", "gradients", "rates")
    plain_sgd = True

    def value(self, seen: Seen) -> float:
        b = seen.samples
        norms = seen.squared_norms_of_mean
        each = zip(seen.rates, seen.squared_norms, norms, strict=True)
        return _ratio(sum(rate * (s - b * norm) for rate, s, norm in each), b * seen.loss)


@dataclass(frozen=True)
class EarlyStopping(Measurement):
    """``1 - B mean_j[g_j² / (v_j + ε)]`` with v the unbiased variance: Mahsereci et al. 2017.

    Above 0 the gradient is within its noise. It is derived for gradient descent without momentum.
    """

    epsilon: float = 1e-5

    needs = ("squares", "gradients")
    plain_sgd = True

    def value(self, seen: Seen) -> float:
        b = seen.samples
        if b < 2:
            return nan

        def ratio(square: Tensor, g: Tensor) -> Tensor:
            variance = (square - b * g.square()) / (b - 1)
            return g.square() / (variance + self.epsilon)

        return 1 - b * _mean(map(ratio, seen.squares, seen.gradients))


@dataclass(frozen=True)
class MeanGSNR(Measurement):
    """``mean_j[g_j² / (mean_n g[n]_j² - g_j² + ε)]``: Liu et al. 2020."""

    epsilon: float = 1e-5

    needs = ("squares", "gradients")

    def value(self, seen: Seen) -> float:
        b = seen.samples

        def ratio(square: Tensor, g: Tensor) -> Tensor:
            return g.square() / (square / b - g.square() + self.epsilon)

        return _mean(map(ratio, seen.squares, seen.gradients))


@dataclass(frozen=True)
class OfCurvature(Measurement):
    """What is made of a diagonal of the curvature; ``curvature`` says which."""

    curvature: Curvature = "hesscale"

    @property
    def diagonal(self) -> Diagonal:
        """What is needed."""
        return Diagonal(self.curvature)

    def __post_init__(self) -> None:
        _ = self.diagonal

    def needed(self) -> Iterable[Hashable]:
        return (*self.needs, self.diagonal)


@dataclass(frozen=True)
class TICDiag(OfCurvature):
    """``Σ_j mean_n g[n]_j² / (d_j + ε)``: Thomas et al. 2020, with the curvature's diagonal d."""

    epsilon: float = 1e-7

    needs = ("squares",)

    def value(self, seen: Seen) -> float:
        pairs = zip(seen.squares, seen.diagonals[self.diagonal], strict=True)
        each = [(s / seen.samples / (d + self.epsilon)).double().sum() for s, d in pairs]
        return float(torch.stack(each).sum())


@dataclass(frozen=True)
class TICTrace(OfCurvature):
    """``Σ_j mean_n g[n]_j² / (Σ_j d_j + ε)``: Thomas et al. 2020."""

    epsilon: float = 1e-7

    needs = ("squared_norms",)

    def value(self, seen: Seen) -> float:
        trace = sum(_traces(seen.diagonals[self.diagonal]))
        return seen.total_squared_norms / seen.samples / (trace + self.epsilon)


@dataclass(frozen=True)
class HessTrace(OfCurvature):
    """``Σ_j d_j`` by parameter."""

    def value(self, seen: Seen) -> list[float]:
        return _traces(seen.diagonals[self.diagonal])


@dataclass(frozen=True)
class HessMaxEV(Measurement):
    """The Hessian's eigenvalue of largest magnitude, by Lanczos from the gradient on.

    A run takes at most ``products``, but for the first ones and then ever fewer, down to every
    32nd, which take up to twelve: others stop after as many as these needed for a relative error
    below ``tolerance``, and are completed by their coefficients.
    """

    products: int = 12
    tolerance: float = 0.01

    def needed(self) -> Iterable[Hashable]:
        return (Spectrum(False, self.products, self.tolerance),)

    def value(self, seen: Seen) -> float:
        return seen.spectra[Spectrum(False, self.products, self.tolerance)][0]


@dataclass(frozen=True)
class GradHist1d(Measurement):
    """``{"hist", "edges"}`` of all entries ``g[n]_j``; those outside the range count at its ends.

    ``adaptation="absmax"`` takes the largest magnitude of the last measured step as the range.
    ``layerwise`` adds ``"param_<i>"`` for each parameter.

    Args:
        every: the steps that measure it, by default those of the monitor.
        bins: how many.
        range: of the entries.
        adaptation: "none" or "absmax".
        layerwise: whether each parameter has a histogram of its own, too.
    """

    bins: int = 100
    range: tuple[float, float] = (-2.0, 2.0)
    adaptation: Adaptation = "none"
    layerwise: bool = False

    def __post_init__(self) -> None:
        _ = self.needed()

    def needed(self) -> tuple[GradientHistogram]:
        bins = Bins(self.bins, *self.range)
        return (GradientHistogram(bins, _adapts(self.adaptation), self.layerwise),)

    def value(self, seen: Seen) -> Mapping[str, Any]:
        found: Mapping[str, Any] = seen.histograms[self.needed()[0]]
        return found


@dataclass(frozen=True)
class GradHist2d(Measurement):
    """``{"hist", "edges"}`` of all pairs ``(g[n]_j, θ_j)``, counted as in `GradHist1d`.

    Args:
        every: the steps that measure it, by default those of the monitor.
        bins: how many, of gradients and of parameters.
        range: of gradients and of parameters.
        adaptation: "none" or "absmax".
        layerwise: whether each parameter has a histogram of its own, too.
    """

    bins: tuple[int, int] = (40, 50)
    range: tuple[tuple[float, float], tuple[float, float]] = ((-1.0, 1.0), (-2.0, 2.0))
    adaptation: Adaptation = "none"
    layerwise: bool = False

    def __post_init__(self) -> None:
        _ = self.needed()

    def needed(self) -> tuple[JointHistogram]:
        first, second = (Bins(n, *r) for n, r in zip(self.bins, self.range, strict=True))
        return (JointHistogram(first, second, _adapts(self.adaptation), self.layerwise),)

    def value(self, seen: Seen) -> Mapping[str, Any]:
        found: Mapping[str, Any] = seen.histograms[self.needed()[0]]
        return found


class Alpha(Following):
    """Where a step ended on the parabola through losses and slopes at its ends, each by its noise.

    -1 is where it began, 0 the parabola's minimum, 1 the opposite side; -1, too, where the parabola
    has no minimum; None where it is not determined.
    """

    needs = ("losses", "along", "updates")
    next_needs = ("losses", "ahead")

    def after(self, first: Seen, second: Seen) -> float | None:
        size = first.update_size
        values = (first.losses[0], second.losses[0], first.along[0], second.ahead[0])
        variances = (first.losses[1], second.losses[1], first.along[1], second.ahead[1])
        return step_length(size, values, variances)


PUBLISHED: tuple[type[Measurement], ...] = (
    *(Loss, Parameters, Time, GradNorm, Distance, UpdateSize, NormTest, InnerTest, OrthoTest),
    *(CABS, EarlyStopping, MeanGSNR, TICDiag, TICTrace, HessTrace, HessMaxEV),
    *(GradHist1d, GradHist2d, Alpha),
)


def _traces(diagonals: Sequence[Tensor]) -> list[float]:
    return [float(each.double().sum()) for each in diagonals]


def _mean(parts: Iterable[Tensor]) -> float:
    total, count = 0.0, 0
    for each in parts:
        total, count = total + float(each.double().sum()), count + each.numel()
    return total / count if count else nan


def _ratio(a: float, b: float) -> float:
    return a / b if b else nan


def _root(square: float) -> float:
    """The square root; rounding below zero is zero."""
    return sqrt(max(square, 0.0)) if square == square else nan


def _adapts(adaptation: Adaptation) -> bool:
    if adaptation not in ("none", "absmax"):
        raise ValueError(f"adaptation is {adaptation!r}; expected 'none' or 'absmax'")
    return adaptation == "absmax"
