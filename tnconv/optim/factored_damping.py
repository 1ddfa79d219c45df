"""Damping: how ``λ I`` is added to ``B ⊗ A``, and how λ follows what the model promised."""

import torch
from torch import Tensor

from tnconv.optim.blocked import from_left, from_right
from tnconv.optim.inverses import Damped, eigenbasis, inverted


def factored(
    a: Tensor,  # (g, a, a), or its blocks (g, k, m, m)
    b: Tensor,  # (g, d, d), or blocks
    damping: float,
) -> tuple[Tensor, Tensor]:
    """``(A + π√λ I)⁻¹`` and ``(B + √λ/π I)⁻¹``, π² the ratio of the mean eigenvalues of A and B.

    One π per group; 1 where a factor is zero. A factor with one entry is a number: there the
    product ``B ⊗ A + λ I`` is inverted exactly, as the other factor. Source: Martens & Grosse 2015,
    section 6.3.

    >>> first, second = factored(torch.eye(2)[None], 4 * torch.eye(3)[None], damping=0.01)
    >>> 1 / first[0, 0, 0], 1 / second[0, 0, 0]
    (tensor(1.0500), tensor(4.2000))
    """
    first, second = inverted(damped(a, b, damping))
    return first, second


def damped(a: Tensor, b: Tensor, damping: float) -> tuple[Damped, Damped]:
    """What `factored` inverts."""
    if a.shape[1:] == (1, 1):
        return torch.ones_like(a), (b * _number(a, b), damping)
    if b.shape[1:] == (1, 1):
        return (a * _number(b, a), damping), torch.ones_like(b)
    means = [factor.diagonal(dim1=-2, dim2=-1).flatten(1).mean(-1) for factor in (a, b)]
    ratio = (means[0] / means[1]).sqrt()
    pi = torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0)
    root = damping**0.5
    return (a, _number(pi * root, a)), (b, _number(root / pi, b))


def _number(of_groups: Tensor, factor: Tensor) -> Tensor:
    """One number a group, beside the matrices of a factor: ``(g, ...)`` as ``(g, 1, ...)``."""
    shape = (-1, *(1,) * (factor.dim() - 3))
    found = of_groups.reshape(shape)
    return found[..., None, None] if of_groups.dim() > 1 else found


def spectrum(
    a: Tensor,  # (g, a, a), or its blocks (g, k, m, m)
    b: Tensor,  # (g, d, d), or blocks
) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvectors of A and B, and the eigenvalues ``(g, d, a)`` of ``B ⊗ A``: see `exact`.

    >>> [tuple(found.shape) for found in spectrum(torch.eye(2)[None], torch.eye(3)[None])]
    [(1, 2, 2), (1, 3, 3), (1, 3, 2)]
    """
    (first, q), (second, r) = eigenbasis(a), eigenbasis(b)
    return q, r, second.flatten(1).unsqueeze(2) * first.flatten(1).unsqueeze(1)


def exact(
    rows: Tensor,  # (g, d, a)
    q: Tensor,  # (g, a, a)
    r: Tensor,  # (g, d, d)
    eigenvalues: Tensor,  # (g, d, a)
    damping: float,
) -> Tensor:
    """``(B ⊗ A + λ I)⁻¹ G = R ((Rᵀ G Q) / (eigenvalues + λ)) Qᵀ``.

    >>> q, r, values = spectrum(torch.eye(2)[None], torch.eye(3)[None])
    >>> exact(torch.ones(1, 3, 2), q, r, values, damping=1.0)[0, 0]
    tensor([0.5000, 0.5000])
    """
    turned = from_left(r.mT, from_right(rows, q)) / (eigenvalues + damping)
    found = from_left(r, from_right(turned, q.mT))
    return found[..., : rows.shape[-2], : rows.shape[-1]]


def adapted(damping: float, ratio: float, factor: float) -> float:
    """Levenberg-Marquardt: λ·factor if the loss fell as promised, λ/factor if by far less.

    ``ratio`` is the change of the loss over the one that the quadratic model predicted. Source:
    Martens & Grosse 2015, section 6.5.

    >>> adapted(1.0, 0.9, 0.5), adapted(1.0, 0.5, 0.5), adapted(1.0, 0.1, 0.5)
    (0.5, 1.0, 2.0)
    """
    if ratio > 0.75:
        return damping * factor
    return damping if ratio >= 0.25 else damping / factor
