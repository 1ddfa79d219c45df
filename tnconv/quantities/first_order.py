"""Quantities of the loss's gradient: ``g[n, θ]`` is sample n's, ``Σ_n g[n] = p.grad``.

The factor of the loss's reduction stays in g: with a mean over N samples, g[n] is 1/N of the
gradient of sample n's own loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tnconv import diagrams
from tnconv.quantities.base import Quantity, Statistic

SUM = Statistic(diagrams.gradient_sum)
EACH = Statistic(diagrams.per_sample_gradients, samples=0)
NORMS = Statistic(diagrams.gradient_norms, samples=0)
SQUARES = Statistic(diagrams.ggn_diagonal)
DOTS = Statistic(diagrams.gradient_dots, joint=True)


@dataclass(frozen=True)
class Gradient(Quantity[Tensor]):
    """``Σ_n g[n, θ]``, in the parameter's shape: what ``loss.backward()`` adds to ``p.grad``."""

    apart = False

    def statistics(self) -> Mapping[str, Statistic]:
        return {"sum": SUM}

    def result(self, found: Mapping[str, Tensor], samples: int) -> Tensor:
        return found["sum"]


@dataclass(frozen=True)
class PerSampleGradients(Quantity[Tensor]):
    """``g[n, θ]``, of shape ``(n, *parameter)``."""

    def statistics(self) -> Mapping[str, Statistic]:
        return {"each": EACH}

    def result(self, found: Mapping[str, Tensor], samples: int) -> Tensor:
        return found["each"]


@dataclass(frozen=True)
class SquaredNorms(Quantity[Tensor]):
    """``Σ_θ g[n, θ]²``, of shape ``(n,)``."""

    def statistics(self) -> Mapping[str, Statistic]:
        return {"norms": NORMS}

    def result(self, found: Mapping[str, Tensor], samples: int) -> Tensor:
        return found["norms"]


@dataclass(frozen=True)
class DotProducts(Quantity[Tensor]):
    """``Σ_θ g[n, θ] g[n', θ]``, of shape ``(n, n)``."""

    def statistics(self) -> Mapping[str, Statistic]:
        return {"dots": DOTS}

    def result(self, found: Mapping[str, Tensor], samples: int) -> Tensor:
        return found["dots"]


@dataclass(frozen=True)
class SumOfSquares(Quantity[Tensor]):
    """``Σ_n g[n, θ]²``, in the parameter's shape."""

    def statistics(self) -> Mapping[str, Statistic]:
        return {"squares": SQUARES}

    def result(self, found: Mapping[str, Tensor], samples: int) -> Tensor:
        return found["squares"]


@dataclass(frozen=True)
class SecondMoment(Quantity[Tensor]):
    """``1/N Σ_n g[n, θ]²``, in the parameter's shape."""

    def statistics(self) -> Mapping[str, Statistic]:
        return {"squares": SQUARES}

    def result(self, found: Mapping[str, Tensor], samples: int) -> Tensor:
        return found["squares"] / samples


@dataclass(frozen=True)
class Variance(Quantity[Tensor]):
    """``1/N Σ_n g[n, θ]² - (1/N Σ_n g[n, θ])²``, in the parameter's shape (biased)."""

    def statistics(self) -> Mapping[str, Statistic]:
        return {"sum": SUM, "squares": SQUARES}

    def result(self, found: Mapping[str, Tensor], samples: int) -> Tensor:
        return found["squares"] / samples - (found["sum"] / samples).square()
