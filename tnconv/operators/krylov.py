"""Krylov methods for symmetric matrices that are seen through products: spectra, solves.

Sources: Golub & Van Loan 2013, chapter 10 (Lanczos), 11.3 (conjugate gradients); Ubaru, Chen & Saad
2017 (stochastic Lanczos quadrature).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""A matrix times a flat vector."""


@dataclass(frozen=True)
class Ritz:
    """Eigenvalues ``(k,)`` of the matrix in a Krylov space, in ascending order.

    ``errors`` bound each one's distance from an eigenvalue of the matrix, ``weights`` are the
    squares of the start vector's coefficients along the Ritz vectors.
    """

    values: Tensor
    errors: Tensor
    weights: Tensor


def lanczos(
    product: Product,
    start: Tensor,
    steps: int,
    enough: Callable[[Ritz], bool] = lambda found: False,
) -> Ritz:
    """Ritz values after some steps, or as soon as they are ``enough``.

    The basis is orthogonalised against all of itself, twice, so that no eigenvalue comes back.
    """
    basis = [start / start.norm()]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    scale = start.new_zeros(())
    while True:
        new = product(basis[-1])
        diagonal.append(new @ basis[-1])
        every = torch.stack(basis)
        for _ in range(2):
            new = new - every.T @ (every @ new)
        beside.append(new.norm())
        scale = torch.maximum(scale, diagonal[-1].abs() + beside[-1])
        found = _ritz(torch.stack(diagonal), torch.stack(beside))
        exhausted = bool(beside[-1] <= 8 * torch.finfo(start.dtype).eps * scale)
        if len(diagonal) >= min(steps, len(start)) or exhausted or enough(found):
            return found
        basis.append(new / beside[-1])


def _ritz(diagonal: Tensor, beside: Tensor) -> Ritz:
    off = beside[:-1]
    matrix = torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix.double())
    errors = beside[-1].double() * vectors[-1].abs()
    return Ritz(values, errors, vectors[0].square())


def extreme_eigenvalue(
    product: Product, start: Tensor, which: Literal["smallest", "largest"], tolerance: float
) -> Ritz:
    """The smallest or largest eigenvalue, to a tolerance relative to the spectral norm.

    The start vector must have a component along its eigenvector; a random one has.
    """
    at = 0 if which == "smallest" else -1

    def enough(found: Ritz) -> bool:
        return bool(found.errors[at] <= tolerance * found.values.abs().max())

    found = lanczos(product, start, len(start), enough)
    return Ritz(found.values[at], found.errors[at], found.weights[at])


def conjugate_gradients(
    product: Product, right: Tensor, tolerance: float, steps: int
) -> tuple[Tensor, float]:
    """The solution of ``A x = b`` for a positive definite A, and its residual relative to b."""
    size = right.norm()
    x, residual = torch.zeros_like(right), right.clone()
    direction, square = residual.clone(), residual @ residual
    for _ in range(steps):
        if float(square.sqrt()) <= tolerance * float(size):
            break
        image = product(direction)
        step = square / (direction @ image)
        x = x + step * direction
        residual = residual - step * image
        square, before = residual @ residual, square
        direction = residual + (square / before) * direction
    left = float((right - product(x)).norm() / size) if float(size) else 0.0
    return x, left


def signs(count: int, size: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random vectors ``(count, size)`` of ones and minus ones, for estimates of traces."""
    device = like.device if generator is None else generator.device
    bits = torch.randint(2, (count, size), generator=generator, device=device)
    return (2 * bits - 1).to(like)
