"""Inverses and eigenbases of Kronecker factors, in float64 where their own dtype fails."""

from collections import defaultdict
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

Damped = tuple[Tensor, Tensor | float] | Tensor
"""A matrix with what is added to its diagonal before it is inverted; or an inverse as it is."""
SMALL = 512  # rows up to which accelerators factorise equal sizes together


def inverted(given: Sequence[Damped], together: bool | None = None) -> list[Tensor]:
    """`inverse` of each matrix, the others as they are.

    Accelerators are asked once whether all factorisations succeeded, since every question waits for
    what they are doing; small matrices of one size are one batch there. ``together`` says whether
    to do so, by default on accelerators.

    >>> inverted([(torch.ones(1, 1, 1), 1.0), torch.eye(1)[None]])
    [tensor([[[0.5000]]]), tensor([[[1.]]])]

    Raises:
        torch.linalg.LinAlgError: a matrix that is not finite, or far from semi-definite.
    """
    pairs = {at: each for at, each in enumerate(given) if not isinstance(each, Tensor)}
    if together is None:
        together = any(matrix.device.type != "cpu" for matrix, _ in pairs.values())
    if not pairs or not together:
        return [each if isinstance(each, Tensor) else inverse(*each) for each in given]
    lowers = [(places, *_factors([pairs[at] for at in places])) for places in _alike(pairs)]
    device = next(iter(pairs.values()))[0].device
    if torch.stack([failed.any().to(device) for _, _, failed in lowers]).any():
        return [each if isinstance(each, Tensor) else inverse(*each) for each in given]
    found = {at: each for at, each in enumerate(given) if isinstance(each, Tensor)}
    for places, lower, _ in lowers:
        shapes = [pairs[at][0].shape for at in places]
        counts = [prod(shape[:-2]) for shape in shapes]
        parts = torch.split(torch.cholesky_inverse(lower), counts)
        for at, part, shape in zip(places, parts, shapes, strict=True):
            found[at] = part.reshape(shape)
    return [found[at] for at in range(len(given))]


def _alike(pairs: dict[int, tuple[Tensor, Tensor | float]]) -> list[list[int]]:
    """Which matrices are factorised together."""
    found = defaultdict[tuple[object, ...], list[int]](list)
    for at, (matrix, _) in pairs.items():
        size = matrix.shape[-1]
        found[size, matrix.dtype, matrix.device, at if size > SMALL else -1].append(at)
    return list(found.values())


def _factors(pairs: Sequence[tuple[Tensor, Tensor | float]]) -> tuple[Tensor, Tensor]:
    matrices = torch.cat([matrix.flatten(0, -3) for matrix, _ in pairs])
    shifts = torch.cat([_shift(matrix, damping).flatten() for matrix, damping in pairs])
    return _cholesky(matrices, shifts, wide(matrices))


def _shift(matrix: Tensor, damping: Tensor | float) -> Tensor:
    shift = torch.as_tensor(damping, dtype=torch.float64, device=matrix.device)
    return shift.expand(matrix.shape[:-2])


def inverse(
    matrix: Tensor,  # (g, d, d), or (g, k, m, m)
    damping: Tensor | float,  # (g,), or (g, 1)
) -> Tensor:
    """``(M + λ I)⁻¹`` of positive semi-definite M by Cholesky; in float64 where that fails.

    Where λ is below the rounding errors of M even in float64, more is added to those matrices: a
    fraction 10⁻¹² of their mean eigenvalue, and ten times as much with every try.

    >>> inverse(torch.ones(1, 1, 1), 1.0)
    tensor([[[0.5000]]])

    Raises:
        torch.linalg.LinAlgError: a matrix that is not finite, or far from semi-definite.
    """
    shift = _shift(matrix, damping)
    for dtype in (wide(matrix), torch.float64):
        lower, failed = _cholesky(matrix, shift, dtype)
        if not failed.any():
            return torch.cholesky_inverse(lower).to(wide(matrix))
    means = matrix.double().diagonal(dim1=-2, dim2=-1).mean(-1).abs()
    for more in (10.0**power for power in range(-12, 3)):
        lower, failed = _cholesky(matrix, shift + (failed > 0) * more * means, torch.float64)
        if not failed.any():
            return torch.cholesky_inverse(lower).to(wide(matrix))
    raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
        f"a damped Kronecker factor of shape {tuple(matrix.shape)} is not positive definite; "
        "expected finite inputs and gradients, or a larger damping"
    )


def _cholesky(matrix: Tensor, shift: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    damped = matrix.to(dtype, copy=True)
    damped.diagonal(dim1=-2, dim2=-1).add_(shift.to(dtype).unsqueeze(-1))
    lower, failed = torch.linalg.cholesky_ex(damped)
    return lower, failed


def eigenbasis(
    matrix: Tensor,  # (g, d, d), or (g, k, m, m)
) -> tuple[Tensor, Tensor]:
    """``M = Q diag(λ) Qᵀ`` of positive semi-definite M: λ ``(g, d)``, at least 0, and Q.

    >>> values, vectors = eigenbasis(torch.diag(torch.tensor([2.0, 1.0]))[None])
    >>> values
    tensor([[1., 2.]])

    Raises:
        torch.linalg.LinAlgError: a matrix whose eigenvectors do not converge in float64 either.
    """
    for dtype in (wide(matrix), torch.float64):
        try:
            values, vectors = torch.linalg.eigh(matrix.to(dtype))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            if dtype == torch.float64:
                raise
        else:
            if vectors.isfinite().all() or dtype == torch.float64:
                break
    return values.clamp(min=0).to(wide(matrix)), vectors.to(wide(matrix))


def wide(matrix: Tensor) -> torch.dtype:
    """The dtype in which linear algebra is done: at least float32."""
    return torch.promote_types(matrix.dtype, torch.float32)
