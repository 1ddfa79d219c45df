"""What layers compute: convolutions, linear layers, patches and pooling."""

from collections.abc import Sequence

import torch

from tnconv.diagrams import pool_counts, reciprocal_counts
from tnconv.diagrams.geometry import IntOrTuple, Padding
from tnconv.functional.lookup import run


def conv(
    x: torch.Tensor,  # (n, g·c, *i) or (g·c, *i)
    weight: torch.Tensor,  # (g·d, c, *k)
    bias: torch.Tensor | None = None,  # (g·d,)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> torch.Tensor:
    """``y[n, gd, o] = Σ_{c,k,i} x[n, gc, i] Π[k, o, i] w[gd, c, k] + b[gd]``, in any dimension.

    >>> conv(torch.rand(8, 3, 32, 32), torch.rand(16, 3, 3, 3), padding="same").shape
    torch.Size([8, 16, 32, 32])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    settings = (x.shape, weight.shape, stride, padding, dilation, groups)
    if bias is None:
        return run("conv", settings, x, weight)
    return run("conv_bias", settings, x, weight, bias)


def conv_transpose(
    x: torch.Tensor,  # (n, g·c, *i) or (g·c, *i)
    weight: torch.Tensor,  # (g·c, d, *k)
    bias: torch.Tensor | None = None,  # (g·d,)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    output_padding: IntOrTuple = 0,
    groups: int = 1,
    dilation: IntOrTuple = 1,
) -> torch.Tensor:
    """``y[n, gd, o] = Σ_{c,k,i} x[n, gc, i] Π[k, i, o] w[gc, d, k] + b[gd]``, in any dimension.

    >>> conv_transpose(torch.rand(8, 3, 16, 16), torch.rand(3, 4, 2, 2), stride=2).shape
    torch.Size([8, 4, 32, 32])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    settings = (x.shape, weight.shape, stride, padding, output_padding, groups, dilation)
    if bias is None:
        return run("conv_transpose", settings, x, weight)
    return run("conv_transpose_bias", settings, x, weight, bias)


def linear(
    x: torch.Tensor,  # (n, *o, c) or (c,)
    weight: torch.Tensor,  # (d, c)
    bias: torch.Tensor | None = None,  # (d,)
) -> torch.Tensor:
    """``y[n, o, d] = Σ_c x[n, o, c] w[d, c] + b[d]``.

    >>> linear(torch.rand(8, 3), torch.rand(4, 3), torch.rand(4)).shape
    torch.Size([8, 4])

    Raises:
        ValueError: shapes that do not fit together.
    """
    if bias is None:
        return run("linear", (x.shape, weight.shape), x, weight)
    return run("linear_bias", (x.shape, weight.shape), x, weight, bias)


def unfold(
    x: torch.Tensor,  # (n, c, *i) or (c, *i)
    kernel_size: IntOrTuple,
    dilation: IntOrTuple = 1,
    padding: Padding = 0,
    stride: IntOrTuple = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
) -> torch.Tensor:
    """The unfolded input ``U[n, ck, o] = Σ_i x[n, c, i] Π[k, o, i]`` (im2col), in any dimension.

    With ``transposed=True`` the patches that a transposed convolution sees: i and o exchanged in Π.

    >>> unfold(torch.rand(8, 3, 32, 32), 5).shape
    torch.Size([8, 75, 784])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    settings = (x.shape, kernel_size, dilation, padding, stride, transposed, output_padding)
    return run("unfold", settings, x)


def fold(
    x: torch.Tensor,  # (n, c·K, O) or (c·K, O)
    output_size: Sequence[int],
    kernel_size: IntOrTuple,
    dilation: IntOrTuple = 1,
    padding: Padding = 0,
    stride: IntOrTuple = 1,
) -> torch.Tensor:
    """The folded input ``y[n, c, i] = Σ_{k,o} x[n, ck, o] Π[k, o, i]`` (col2im), in any dimension.

    >>> fold(torch.rand(8, 75, 784), (32, 32), 5).shape
    torch.Size([8, 3, 32, 32])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together.
    """
    return run("fold", (x.shape, output_size, kernel_size, dilation, padding, stride), x)


def avg_pool(
    x: torch.Tensor,  # (n, c, *i) or (c, *i)
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = None,
    padding: Padding = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:
    """``y[n, c, o] = 1/K[o] Σ_{k,i} x[n, c, i] Π[k, o, i]``, in any dimension.

    >>> avg_pool(torch.rand(8, 3, 32, 32), 3, 2, 1, count_include_pad=False).shape
    torch.Size([8, 3, 16, 16])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    shape = tuple(x.shape)
    settings = (shape, kernel_size, stride, padding, divisor_override, ceil_mode, count_include_pad)
    operands = [x]
    alike = not ceil_mode and (count_include_pad or padding in (0, "valid"))
    if divisor_override is None and not alike:
        modes = {"ceil_mode": ceil_mode, "count_include_pad": count_include_pad}
        counts = pool_counts(shape, kernel_size, stride, padding, **modes)
        if any(len(set(each)) > 1 for each in counts):
            operands.append(reciprocal_counts(counts, x.dtype, x.device))
    return run("avg_pool", settings, *operands)


def unfolded_kernel(
    input_shape: Sequence[int],  # (g·c, *i)
    weight: torch.Tensor,  # (g·d, c, *k)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> torch.Tensor:
    """A convolution's matrix ``T[gdo, gci] = Σ_k Π[k, o, i] w[gd, c, k]``, Toeplitz by blocks.

    >>> unfolded_kernel((3, 32), torch.rand(4, 3, 3)).shape
    torch.Size([120, 96])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit, or an input shape with a batch.
    """
    settings = (input_shape, weight.shape, stride, padding, dilation, groups)
    return run("unfolded_kernel", settings, weight)
