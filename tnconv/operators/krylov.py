"""Krylov methods for symmetric matrices that are seen through products: spectra, solves.

Sources: Golub & Van Loan 2013, chapter 10 (Lanczos), 11.3 (conjugate gradients); Ubaru, Chen & Saad
2017 (stochastic Lanczos quadrature).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Literal

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""A matrix times a flat vector."""
Function = Callable[[Tensor], Tensor]
"""A function of eigenvalues, entry by entry."""


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
    for space in krylov_spaces(product, start, steps):
        found = _ritz(*space[1:])
        if enough(found):
            break
    return found


def krylov_spaces(
    product: Product, start: Tensor, steps: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Bases ``(k, size)`` of growing Krylov spaces, and the matrix there: diagonal and the next.

    The last has ``steps`` vectors, or as many as the start vector lies in an invariant space of.
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
        yield every, torch.stack(diagonal), torch.stack(beside)
        exhausted = bool(beside[-1] <= 8 * torch.finfo(start.dtype).eps * scale)
        if len(diagonal) >= min(steps, len(start)) or exhausted:
            return
        basis.append(new / beside[-1])


def matrix_function(
    product: Product, start: Tensor, function: Function, tolerance: float, steps: int
) -> tuple[Tensor, float]:
    """``f(A) b`` in the Krylov space of b, and the relative residual of ``A x = b`` there.

    For a matrix with no eigenvalue below one and ``f(x) = ∫ (x + t)⁻¹ dμ(t)`` with ``f(1) <= 1``,
    such as 1/x and 1/√x, that residual bounds the error relative to b: the residuals of all
    ``A + t`` are smaller. Source: Frommer & Simoncini 2008, "Matrix functions", section 4.
    """
    size = start.norm()
    if not float(size):
        return torch.zeros_like(start), 0.0
    left = inf
    for space in krylov_spaces(product, start, steps):
        basis, diagonal, beside = space
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside).double())
        solved = vectors[-1] @ (vectors[0] / values)
        left = float(beside[-1].double() * solved.abs())
        if left <= tolerance:
            break
    found = vectors @ (function(values) * vectors[0])
    return size * (found.to(start) @ basis), left


def _tridiagonal(diagonal: Tensor, beside: Tensor) -> Tensor:
    off = beside[:-1]
    return torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)


def quadrature(
    product: Product, starts: Iterable[Tensor], function: Function, steps: int
) -> Tensor:
    """Estimates of ``tr f(A)``, one for each start vector z with covariance one: ``zᵀ f(A) z``."""
    found = []
    for z in starts:
        ritz = lanczos(product, z, steps)
        found.append((z @ z).double() * (ritz.weights @ function(ritz.values)))
    return torch.stack(found)


def _ritz(diagonal: Tensor, beside: Tensor) -> Ritz:
    values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside).double())
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
