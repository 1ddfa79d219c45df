"""Kronecker factors: second moments of a layer's patches and of its output gradients.

Factors of patches are a convolution's; with ``transposed=True`` a transposed convolution's; with
``kernel_size=()`` a linear layer's, and x has shape (n, *o, c). ``bias=True`` ends every patch with
an entry 1, ``group_average=True`` replaces the factors of all groups by their mean, and ``scale``
replaces the factor before the sum.
"""

import torch

from tnconv.diagrams.geometry import IntOrTuple, Padding
from tnconv.functional.expressions import Scale
from tnconv.functional.lookup import ratio, run


def kfac_expand(
    x: torch.Tensor,  # (n, g·c, *i), or (n, *o, c) with kernel_size=()
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
    bias: bool = False,
    group_average: bool = False,
    scale: Scale | None = None,
) -> torch.Tensor:
    """The input-based KFAC-expand factor ``A[g, ck, c'k'] = 1/N Σ_{n,o} U U'``.

    >>> kfac_expand(torch.rand(8, 4, 32, 32), 3, groups=2).shape
    torch.Size([2, 18, 18])
    >>> kfac_expand(torch.rand(8, 5, 3), (), bias=True).shape  # a linear layer's
    torch.Size([1, 4, 4])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    x, kernel_size = _channels_first(x, kernel_size)
    settings = (stride, padding, dilation, groups, transposed, output_padding)
    return run(
        "kfac_expand", (bias, group_average, ratio(scale), x.shape, kernel_size, *settings), x
    )


def kfac_reduce(
    x: torch.Tensor,  # (n, g·c, *i), or (n, *o, c) with kernel_size=()
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
    bias: bool = False,
    group_average: bool = False,
    scale: Scale | None = None,
) -> torch.Tensor:
    """The input-based KFAC-reduce factor ``A[g, ck, c'k'] = 1/(N O²) Σ_n (Σ_o U)(Σ_o' U')``.

    >>> kfac_reduce(torch.rand(8, 4, 32, 32), 3, groups=2).shape
    torch.Size([2, 18, 18])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    x, kernel_size = _channels_first(x, kernel_size)
    settings = (stride, padding, dilation, groups, transposed, output_padding)
    return run(
        "kfac_reduce", (bias, group_average, ratio(scale), x.shape, kernel_size, *settings), x
    )


def grad_expand(
    grad_output: torch.Tensor,  # (n, g·d, *o)
    groups: int = 1,
    group_average: bool = False,
    scale: Scale = 1,
) -> torch.Tensor:
    """The gradient-based KFAC-expand factor ``B[g, d, d'] = Σ_{n,o} v[n, gd, o] v[n, gd', o]``.

    >>> grad_expand(torch.rand(8, 4, 30, 30), groups=2).shape
    torch.Size([2, 2, 2])

    Raises:
        ValueError: a tensor without batch and channels, or groups that do not divide them.
    """
    return run("grad_expand", (grad_output.shape, groups, group_average, ratio(scale)), grad_output)


def grad_reduce(
    grad_output: torch.Tensor,  # (n, g·d, *o)
    groups: int = 1,
    group_average: bool = False,
    scale: Scale = 1,
) -> torch.Tensor:
    """The gradient-based KFAC-reduce factor ``B[g, d, d'] = Σ_n (Σ_o v[n, gd, o])(Σ_o' v')``.

    >>> grad_reduce(torch.rand(8, 4, 30, 30), groups=2).shape
    torch.Size([2, 2, 2])

    Raises:
        ValueError: a tensor without batch and channels, or groups that do not divide them.
    """
    return run("grad_reduce", (grad_output.shape, groups, group_average, ratio(scale)), grad_output)


def mean_patches(
    x: torch.Tensor,  # (n, g·c, *i) or (g·c, *i), or (n, *o, c) with kernel_size=()
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
) -> torch.Tensor:
    """``m[n, g, ck] = 1/O Σ_o U[n, g, c, k, o]``: averaged patches, half of `kfac_reduce`.

    >>> mean_patches(torch.rand(8, 4, 32, 32), 3, groups=2).shape
    torch.Size([8, 2, 18])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    x, kernel_size = _channels_first(x, kernel_size)
    settings = (x.shape, kernel_size, stride, padding, dilation, groups)
    return run("mean_patches", (*settings, transposed, output_padding), x)


def _channels_first(x: torch.Tensor, kernel_size: IntOrTuple) -> tuple[torch.Tensor, IntOrTuple]:
    """A linear layer's positions between batch and channels as those of a kernel of ones."""
    if isinstance(kernel_size, int) or len(kernel_size) or x.dim() <= 2:
        return x, kernel_size
    return x.movedim(-1, 1), (1,) * (x.dim() - 2)
