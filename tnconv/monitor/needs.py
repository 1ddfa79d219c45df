"""What measurements can need of a step beside its attributes: with settings, equal ones once."""

from dataclasses import dataclass
from typing import Literal

from tnconv.losses.diagonals import Method

Curvature = Method | Literal["diag_ggn_exact", "diag_ggn_mc", "diag_h", "diag_h_mc"]
"""Hessian diagonals: HesScale's methods, Gauss-Newton and Hessian, both exact and sampled.

A sample of the Hessian's is one product with it; its trace is good for sums over many entries.
"""
CURVATURES = (
    *("hesscale", "gn", "bl89", "hesscale+"),
    *("diag_ggn_exact", "diag_ggn_mc", "diag_h", "diag_h_mc"),
)


@dataclass(frozen=True)
class Diagonal:
    """``d_j``, the diagonal of the mean loss's curvature, or an approximation of it."""

    kind: Curvature = "hesscale"

    def __post_init__(self) -> None:
        if self.kind not in CURVATURES:
            known = ", ".join(map(repr, CURVATURES))
            raise ValueError(f"curvature is {self.kind!r}; expected one of {known}")


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of the Hessian: the one of largest magnitude, or both ends.

    ``products`` is how many products with the Hessian an end takes at most, and ``tolerance`` the
    relative error at which it stops before. Of several micro-batches it is the mean of theirs:
    their graphs are not there together.
    """

    both: bool = False
    products: int = 12
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        if self.products < 1 or not self.tolerance > 0:
            raise ValueError(
                f"products and tolerance are {self.products}, {self.tolerance}; expected at least "
                "one product and a positive tolerance"
            )


@dataclass(frozen=True)
class Bins:
    """Equal bins of a range; entries outside count in the first and the last."""

    count: int
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 1 <= self.count <= 4096 or not self.low < self.high:
            raise ValueError(
                f"{self.count} bins of ({self.low}, {self.high}); expected 1 to 4096 bins of a "
                "range that is not empty"
            )


@dataclass(frozen=True)
class GradientHistogram:
    """Counts of the entries ``g[n, j]``; of each parameter's by itself if ``layerwise``."""

    bins: Bins
    adapts: bool = False
    layerwise: bool = False


@dataclass(frozen=True)
class JointHistogram:
    """Counts of the pairs ``(g[n, j], θ[j])``; of each parameter's by itself if ``layerwise``."""

    gradient: Bins
    parameter: Bins
    adapts: bool = False
    layerwise: bool = False


@dataclass(frozen=True)
class Activity:
    """Fractions of units that are dead or saturated, by layer."""

    saturation: float = 0.99
