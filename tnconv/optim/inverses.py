"""Inverses and eigenbases of Kronecker factors, in float64 where their own dtype fails."""

import torch
from torch import Tensor


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
    shift = torch.as_tensor(damping, dtype=torch.float64, device=matrix.device)
    shift = shift.expand(matrix.shape[:-2])
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
