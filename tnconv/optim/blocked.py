"""Factors with diagonal blocks only, where a whole one would be too large.

A factor of size a is whole, ``(g, a, a)``, or has k blocks of equal size m on its diagonal,
``(g, k, m, m)``, the last one padded with zeros: inverses and products then cost ``1 / k²`` and
``1 / k`` of those of a whole one.
"""

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor


def pieces(size: int, most: int) -> int:
    """How many blocks of at most ``most`` rows a factor has.

    >>> pieces(4097, 2048), pieces(2048, 2048)
    (3, 1)
    """
    return max(1, ceil(size / most))


def padded_size(size: int, most: int) -> int:
    """The rows of a factor in blocks of at most ``most`` rows.

    >>> padded_size(4097, 2048), padded_size(5, 8)
    (4098, 5)
    """
    count = pieces(size, most)
    return count * ceil(size / count)


def kept_entries(size: int, most: int) -> int:
    """The entries of the blocks.

    >>> kept_entries(4, 2), kept_entries(4, 4)
    (8, 16)
    """
    count = pieces(size, most)
    return int(count * ceil(size / count) ** 2)


def cut(
    factor: Tensor,  # (g, a, a)
    most: int,
) -> Tensor:
    """Its diagonal blocks ``(g, k, m, m)``, or the factor itself where it is small enough.

    >>> cut(torch.ones(1, 5, 5), 2)[0, 2]
    tensor([[1., 0.],
            [0., 0.]])
    """
    size = factor.shape[-1]
    count = pieces(size, most)
    if count == 1:
        return factor
    each = ceil(size / count)
    padded = F.pad(factor, (0, count * each - size) * 2)
    split = padded.reshape(len(factor), count, each, count, each)
    return split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()


def from_right(
    rows: Tensor,  # (g, d, a), or (..., g, d, a)
    factor: Tensor,
) -> Tensor:
    """``Σ_a rows[g, d, a] F[g, a, a']``, in the padded size where there are blocks."""
    if factor.dim() == 3:
        return rows @ factor
    count, each = factor.shape[1:3]
    padded = F.pad(rows, (0, count * each - rows.shape[-1]))
    split = padded.reshape(*rows.shape[:-1], count, each).transpose(-2, -3)  # (..., g, k, d, m)
    return torch.matmul(split, factor).transpose(-2, -3).flatten(-2)


def from_left(
    factor: Tensor,
    rows: Tensor,  # (..., g, d, a)
) -> Tensor:
    """``Σ_d' F[g, d, d'] rows[g, d', a]``."""
    return factor @ rows if factor.dim() == 3 else from_right(rows.mT, factor.mT).mT


def sizes(factor: Tensor) -> int:
    """How many rows it has, with padding."""
    return factor.shape[-1] if factor.dim() == 3 else factor.shape[1] * factor.shape[2]
