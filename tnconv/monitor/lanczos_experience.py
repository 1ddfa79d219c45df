"""What long runs of Lanczos show of the coefficients that short ones leave out.

If runs start from the gradient, their tridiagonal matrices are alike from batch to batch but for a
factor: on 3C3D the entries beside the diagonal, over the largest eigenvalue, vary by 2 to 3 %, and
eigenvectors turn by 60 degrees. A short run is therefore completed by the entries of earlier long
ones, to the scale of its own eigenvalue. Long runs also tell how far that was off for every number
of products, and so how many are enough.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from statistics import mean
from typing import Any, Literal

import numpy as np

End = Literal["largest", "smallest", "magnitude"]
RUNS = 3  # long ones that are remembered
SELDOM = 32  # runs from one long one to the next, in the end
LONG = 16  # products of a long one, at most
ALIKE = 1.2  # how far the estimated error of a short run may exceed those of long ones
COMPLETED = 1.5  # tolerances up to which an estimated error is left to completion
SEEN = 0.25  # of a start that its Ritz vector makes up, below which others may be hidden
FORGETTING = 0.3  # of what is known of overlaps, from one run to the next
CLOSER = 1.2  # by what factor the other vector has to be closer before runs start from it


@dataclass
class Experience:
    """Coefficients of the last long runs, and how far predictions from fewer products were off."""

    diagonals: list[list[float]] = field(default_factory=list)
    besides: list[list[float]] = field(default_factory=list)
    errors: dict[int, list[float]] = field(default_factory=dict)
    estimates: dict[int, list[float]] = field(default_factory=dict)  # before completion, relative
    runs: int = 0
    overlaps: list[float] = field(default_factory=lambda: [1.0, 0.0])
    turned: bool = False  # whether runs start from the last eigenvector, not from the gradient

    def overlapped(self, gradient: float, vector: float) -> None:
        """Take note of a run's cosines of its eigenvector with the gradient and the last vector.

        Where runs start from the other of the two from now on, they will not be alike earlier ones:
        those are forgotten.
        """
        for at, seen in enumerate((gradient, vector)):
            self.overlaps[at] += FORGETTING * (abs(seen) - self.overlaps[at])
        now, other = self.overlaps[self.turned], self.overlaps[not self.turned]
        if other > CLOSER * now:
            self.turned, self.runs = not self.turned, 0
            self.diagonals, self.besides, self.errors, self.estimates = [], [], {}, {}

    @property
    def long(self) -> bool:
        """Whether the next run is long: the first ones are, and then ever fewer."""
        at = self.runs
        return at % SELDOM == 0 or (at < SELDOM and at & (at - 1) == 0)

    def enough(self, products: int, tolerance: float, estimate: float) -> bool:
        """Whether so many products predicted the last long runs within a relative tolerance.

        The run's own estimate of its error, relative and before completion, must be like theirs.
        """
        known, others = self.errors.get(products, []), self.estimates.get(products, [])
        if len(known) < 2 or len(others) < 2 or max(known) > tolerance:
            return False
        return estimate <= min(ALIKE * max(others), COMPLETED * tolerance)

    def completed(self, diagonal: Sequence[float], beside: Sequence[float], end: End) -> float:
        """The eigenvalue of a run of ``len(diagonal)`` products.

        ``beside`` has the norm of the last residual as well, which is an entry of the next matrix
        already. Where nothing is known, the one entry that this lacks is the diagonal's mean.
        """
        k, found = len(diagonal), ritz(diagonal, beside[:-1], end)[0]
        known = [at for at, each in enumerate(self.diagonals) if len(each) > k]
        if not known or not found:
            return ritz([*diagonal, mean(diagonal)], beside, end)[0]
        tails: list[tuple[list[float], list[float]]] = []
        for at in known:
            a, b = self.diagonals[at], self.besides[at]
            scale = found / (ritz(a[:k], b[: k - 1], end)[0] or found)
            tails.append(([scale * x for x in a[k:]], [scale * x for x in b[k:]]))
        size = min(len(a) for a, _ in tails)
        more = [mean(a[at] for a, _ in tails) for at in range(size)]
        others = [abs(mean(b[at] for _, b in tails)) for at in range(size)]
        rest = [*diagonal[1:], *more]
        return ritz([*diagonal, *more, mean(rest)], [*beside, *others], end)[0]

    def learn(self, diagonal: list[float], beside: list[float], value: float, end: End) -> None:
        """Take note of a long run, with the norm of its last residual, and its eigenvalue."""
        for k in range(2, len(diagonal) if value else 0):
            found = self.completed(diagonal[:k], beside[:k], end)
            error = abs(found - value) / abs(value)
            self.errors[k] = [*self.errors.get(k, []), error][-RUNS:]
            own, weights, gap = ritz(diagonal[:k], beside[: k - 1], end)
            estimate = error_of(beside[k - 1] * abs(weights[-1]), gap) / (abs(own) or 1.0)
            self.estimates[k] = [*self.estimates.get(k, []), estimate][-RUNS:]
        self.diagonals = [*self.diagonals, diagonal][-RUNS:]
        self.besides = [*self.besides, beside][-RUNS:]

    def state(self) -> dict[str, Any]:
        """Numbers alone."""
        return asdict(self)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Experience":
        """From a `state`."""
        return cls(**{name: type(value)(value) for name, value in state.items()})


def error_of(residual: float, gap: float) -> float:
    """How far a Ritz value is off, estimated: ``r² / gap`` (Parlett 1998, section 11.7).

    The gap is to the next Ritz value and not to the next eigenvalue: it is off by a factor of 3.
    """
    return min(residual, residual**2 / gap) if gap > 0 else residual


def ritz(
    diagonal: Sequence[float], beside: Sequence[float], end: End
) -> tuple[float, list[float], float]:
    """A Ritz value, its vector in the basis, and its distance to the nearest other."""
    values, vectors, at = _pairs(diagonal, beside, end)
    others = np.abs(np.delete(values, at) - values[at]).tolist()
    return float(values[at]), vectors[:, at].tolist(), min(others, default=0.0)


def unchallenged(
    diagonal: Sequence[float], beside: Sequence[float], end: End, tolerance: float
) -> bool:
    """Whether a run shows no other eigenvalue that can be beyond its Ritz value.

    An eigenvalue is within the residual of each Ritz value (Parlett 1998, section 4.5), so that
    none of the other intervals may reach further. An eigenvector that the start next to lacks shows
    in no residual until it has grown: where the start has little of the Ritz vector, too, and so
    may have as little of another, the residual itself has to be below the tolerance.
    """
    values, vectors, at = _pairs(diagonal, beside[:-1], end)
    residuals = beside[-1] * np.abs(vectors[-1])
    reach = {"largest": values, "smallest": -values, "magnitude": np.abs(values)}[end]
    slack = tolerance * abs(float(values[at]))
    if (np.delete(reach + residuals, at) > reach[at] + slack).any():
        return False
    return bool(abs(vectors[0, at]) >= SEEN or residuals[at] <= slack)


def _pairs(diagonal: Sequence[float], beside: Sequence[float], end: End) -> tuple[Any, Any, int]:
    """All Ritz values, their vectors in the basis, and the place of the one at an end."""
    return _known_pairs(tuple(diagonal), tuple(beside), end)


@lru_cache(maxsize=64)
def _known_pairs(
    diagonal: tuple[float, ...], beside: tuple[float, ...], end: End
) -> tuple[Any, Any, int]:
    """Of one matrix several things are asked, and of the beginnings of long runs at every step."""
    n = len(diagonal)
    matrix = np.diag(np.asarray(diagonal, dtype=np.float64))
    matrix[range(n - 1), range(1, n)] = matrix[range(1, n), range(n - 1)] = beside
    values, vectors = np.linalg.eigh(matrix)
    ends = {"largest": n - 1, "smallest": 0, "magnitude": int(np.abs(values).argmax())}
    values.flags.writeable = vectors.flags.writeable = False
    return values, vectors, ends[end]
