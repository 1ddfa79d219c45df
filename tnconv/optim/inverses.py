"""Inverses and eigenbases of Kronecker factors, in float64 where their own dtype fails."""

import torch
from torch import Tensor


def inverse(
    matrix: Tensor,  # (g, d, d)
    damping: Tensor | float,  # (g,)
) -> Tensor:
    """``(M + λ I)⁻¹`` of positive semi-definite M by Cholesky; in float64 where that fails.

    >>> inverse(torch.ones(1, 1, 1), 1.0)
    tensor([[[0.5000]]])

    Raises:
        torch.linalg.LinAlgError: a matrix that is not positive definite in float64 either.
    """
    for dtype in (wide(matrix), torch.float64):
        damped = matrix.to(dtype, copy=True)
        shift = torch.as_tensor(damping, dtype=dtype, device=matrix.device)
        damped.diagonal(dim1=-2, dim2=-1).add_(shift.unsqueeze(-1))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            return torch.cholesky_inverse(lower).to(wide(matrix))
    raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
        f"a damped Kronecker factor of shape {tuple(matrix.shape)} is not positive definite; "
        "expected finite inputs and gradients, or a larger damping"
    )


def eigenbasis(
    matrix: Tensor,  # (g, d, d)
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
