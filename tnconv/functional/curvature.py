"""Kronecker factors."""

import torch

from tnconv.diagrams.geometry import IntOrTuple, Padding
from tnconv.functional.programs import run


def kfac_expand(
    x: torch.Tensor,  # (n, g·c, *i)
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> torch.Tensor:
    """The input-based KFAC-expand factor ``A[g, ck, c'k'] = 1/N Σ_{n,o} U U'``.

    With ``kernel_size=()`` and ``x`` of shape (n, c): the factor of a linear layer.

    >>> kfac_expand(torch.rand(8, 4, 32, 32), 3, groups=2).shape
    torch.Size([2, 18, 18])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    settings = (x.shape, kernel_size, stride, padding, dilation, groups)
    return run("kfac_expand", settings, x)


def kfac_reduce(
    x: torch.Tensor,  # (n, g·c, *i)
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> torch.Tensor:
    """The input-based KFAC-reduce factor ``A[g, ck, c'k'] = 1/(N O²) Σ_n (Σ_o U)(Σ_o' U')``.

    >>> kfac_reduce(torch.rand(8, 4, 32, 32), 3, groups=2).shape
    torch.Size([2, 18, 18])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    settings = (x.shape, kernel_size, stride, padding, dilation, groups)
    return run("kfac_reduce", settings, x)
