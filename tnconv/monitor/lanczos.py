"""Extreme eigenvalues of a symmetric matrix, seen through products, from earlier eigenvectors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from statistics import mean
from typing import Literal

import torch
from torch import Tensor

End = Literal["largest", "smallest", "magnitude"]


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
) -> Ritz:
    """The extreme eigenvalue by Lanczos, with full orthogonalisation, from a vector.

    It stops where the estimated error, ``r² / gap`` for the residual r and the gap to the next Ritz
    value (Parlett 1998, section 11.7), is below the tolerance times the eigenvalue's magnitude, or
    after so many products. The norm of the last residual is an entry of the next tridiagonal matrix
    already; with the mean of the known diagonal for the one entry that is missing, that matrix
    gives the value: of 22 steps of 3C3D the mean error after four products is 0.6 % instead of 2.6.

    Args:
        product: of the matrix with a flat vector.
        start: where to start; the last eigenvector, if the matrix has changed a little.
        end: which eigenvalue.
        products: at most.
        tolerance: relative.

    >>> matrix = torch.diag(torch.tensor([-6.0, 2.0, 1.0]))
    >>> round(extreme(lambda v: matrix @ v, torch.ones(3)).value, 3)
    -6.0
    """
    basis = Basis(start)
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        w, own, scale, beta = basis.orthogonal(product(basis.last))
        diagonal.append(own)
        if not isfinite(scale):
            return Ritz(float("nan"), start, inf, len(diagonal))
        found = _ritz(diagonal, beside, end)
        value, weights, gap = found
        residual = beta * abs(weights[-1])
        exhausted = beta <= 1e-7 * scale or len(diagonal) >= min(products, len(start))
        error = min(residual, residual**2 / gap) if gap > 0 else residual
        if exhausted or (len(diagonal) > 1 and error <= tolerance * abs(value)):
            vector = basis.combined(weights)
            next_value, *_ = _ritz([*diagonal, mean(diagonal)], [*beside, beta], end)
            return Ritz(next_value, vector, residual, len(diagonal))
        beside.append(beta)
        basis.append(w / beta)


class Basis:
    """Orthonormal vectors; a few of them are a matrix, so that products with all read them once."""

    rows = 4

    def __init__(self, start: Tensor) -> None:
        self.blocks: list[Tensor] = []
        self.count = 0
        self.append(start / torch.linalg.vector_norm(start))

    @property
    def last(self) -> Tensor:
        """The vector that came last."""
        return self.blocks[-1][(self.count - 1) % self.rows]

    def append(self, vector: Tensor) -> None:
        """Add a vector of norm 1 that is orthogonal to all."""
        at = self.count % self.rows
        if not at:
            self.blocks.append(vector.new_empty(self.rows, len(vector)))
        self.blocks[-1][at] = vector
        self.count += 1

    def orthogonal(self, w: Tensor) -> tuple[Tensor, float, float, float]:
        """A vector's part that is orthogonal to all, its product with the last, norms of both.

        Once is enough unless next to nothing is left (Daniel et al. 1976).
        """
        scale, own = float(torch.linalg.vector_norm(w)), 0.0
        left = scale
        for _ in range(3):
            before = left
            for block in self._filled():
                products = torch.mv(block, w)
                w = torch.addmv(w, block.T, products, alpha=-1)
            own += float(products[-1])
            left = float(torch.linalg.vector_norm(w))
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


def _ritz(diagonal: list[float], beside: list[float], end: End) -> tuple[float, list[float], float]:
    """A Ritz value, its vector in the basis, and its distance to the nearest other."""
    n = len(diagonal)
    matrix = torch.zeros(n, n, dtype=torch.float64)
    matrix.diagonal().copy_(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        off = torch.tensor(beside, dtype=torch.float64)
        matrix.diagonal(1).copy_(off)
        matrix.diagonal(-1).copy_(off)
    values, vectors = torch.linalg.eigh(matrix)
    ends = {"largest": n - 1, "smallest": 0, "magnitude": int(values.abs().argmax())}
    at = ends[end]
    others = [abs(float(values[at] - values[k])) for k in range(n) if k != at]
    return float(values[at]), vectors[:, at].tolist(), min(others, default=0.0)
