"""Extreme eigenvalues of a symmetric matrix, seen through products, from earlier eigenvectors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt

import torch
from torch import Tensor

from tnconv.monitor.lanczos_experience import (
    LONG,
    End,
    Experience,
    error_of,
    ritz,
    unchallenged,
)

FEWEST = 4  # products before a run may have converged: starts can lack the eigenvector
FEWEST_KNOWN = 3  # before experience may end one: after two, one start in fifty lacked too much


@dataclass(frozen=True)
class Ritz:
    """An eigenvalue's approximation, its vector, the residual's norm, and the products it took."""

    value: float
    vector: Tensor
    residual: float
    products: int


@torch.no_grad()
def extreme(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    end: End = "magnitude",
    products: int = 12,
    tolerance: float = 0.01,
    experience: Experience | None = None,
) -> Ritz:
    """The extreme eigenvalue by Lanczos, with full orthogonalisation, from a vector.

    The run has converged when, after `FEWEST` products or more, the estimated relative error (see
    `error_of`) is below a third of the tolerance and no other eigenvalue can be larger by what the
    run shows (`unchallenged`). It ends then, or after ``products``.

    Earlier runs from similar vectors can end it sooner, after the number of products that was
    enough for them. Then the value is completed by their coefficients. This is not done if the
    last product changed the value by more than three tolerances, if the estimated error is larger
    than theirs was, or if another eigenvalue can be larger. Long runs, from which experience is
    gained, go on until the estimated error is below a tenth of the tolerance.

    Args:
        product: of the matrix with a flat vector.
        start: where to start.
        end: which eigenvalue.
        products: at most, but for long runs, which take up to `LONG`.
        tolerance: relative.
        experience: of earlier runs; it grows.

    >>> matrix = torch.diag(torch.tensor([-6.0, 2.0, 1.0]))
    >>> round(extreme(lambda v: matrix @ v, torch.ones(3)).value, 3)
    -6.0
    """
    long = experience is not None and experience.long
    known = Experience() if experience is None else experience
    most = min(max(products, LONG) if long else products, len(start))
    limit = tolerance / (10 if long else 3)
    basis, values = Basis(start), list[float]()
    diagonal, beside = list[float](), list[float]()
    while True:
        w, own, scale, beta = basis.orthogonal(product(basis.last))
        diagonal.append(own)
        beside.append(beta)
        if not isfinite(scale):
            return Ritz(float("nan"), start, inf, len(diagonal))
        value, weights, gap = ritz(diagonal, beside[:-1], end)
        values.append(known.completed(diagonal, beside, end))
        residual = beta * abs(weights[-1])
        error = error_of(residual, gap) / (abs(value) or 1.0)
        exhausted = beta <= 1e-7 * scale or len(diagonal) >= most
        alone = unchallenged(diagonal, beside, end, tolerance)
        converged = len(diagonal) >= FEWEST and error <= limit and alone
        enough = alone and not long and _enough(known, values, tolerance, error)
        if exhausted or converged or enough:
            break
        basis.append(w, beta)
    known.runs += 1
    found = value if converged else values[-1]
    if long:
        known.learn(diagonal, beside, found, end)
    return Ritz(found, basis.combined(weights), residual, len(diagonal))


def _enough(
    experience: Experience, values: Sequence[float], tolerance: float, error: float
) -> bool:
    """Whether the last of the values that each product more gave is good, by experience."""
    if len(values) < FEWEST_KNOWN or not experience.enough(len(values), tolerance, error):
        return False
    return abs(values[-1] - values[-2]) <= 3 * tolerance * abs(values[-1])


class Basis:
    """Orthonormal vectors; a few of them are a matrix, so that products with all read them once."""

    rows = 4

    def __init__(self, start: Tensor) -> None:
        self.blocks: list[Tensor] = []
        self.count = 0
        self.append(start, float(torch.linalg.vector_norm(start)))

    @property
    def last(self) -> Tensor:
        """The vector that came last."""
        return self.blocks[-1][(self.count - 1) % self.rows]

    def append(self, vector: Tensor, norm: float) -> None:
        """Add a vector that is orthogonal to all, over its norm."""
        at = self.count % self.rows
        if not at:
            self.blocks.append(vector.new_empty(self.rows, len(vector)))
        torch.mul(vector, 1 / norm if norm else 0.0, out=self.blocks[-1][at])
        self.count += 1

    def orthogonal(self, w: Tensor) -> tuple[Tensor, float, float, float]:
        """A vector's part that is orthogonal to all, its product with the last, norms of both.

        Once is enough unless next to nothing is left (Daniel et al. 1976).
        """
        scale, own = 0.0, 0.0
        for _ in range(3):
            inside = 0.0
            for block in self._filled():
                products = torch.mv(block, w)
                w = torch.addmv(w, block.T, products, alpha=-1)
                inside += float(torch.dot(products, products))
            own += float(products[-1])
            left = float(torch.linalg.vector_norm(w))
            before = sqrt(inside + left**2)
            scale = scale or before
            if not left < 1e-2 * before:
                break
        return w, own, scale, left

    def combined(self, weights: Sequence[float]) -> Tensor:
        """The sum of all, weighted."""
        found = torch.zeros_like(self.blocks[0][0])
        parts = torch.split(found.new_tensor(list(weights)), self.rows)
        for block, own in zip(self._filled(), parts, strict=True):
            found += torch.mv(block.T, own)
        return found

    def _filled(self) -> list[Tensor]:
        last = (self.count - 1) % self.rows + 1
        return [*self.blocks[:-1], self.blocks[-1][:last]]
