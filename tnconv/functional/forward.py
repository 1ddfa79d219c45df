"""What layers compute: convolutions, linear layers, patches and pooling."""

from collections.abc import Sequence

import torch

from tnconv import diagrams
from tnconv.diagrams import (
    Expression,
    Hyperparameters,
    layer_networks,
    pool_counts,
    reciprocal_counts,
)
from tnconv.diagrams.hyperparameters import IntOrTuple, Padding, Values
from tnconv.functional.lookup import Shape, operation


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

    Args:
        x: The layer's input.
        weight: The layer's weight.
        bias: What is added to every output channel, if anything.
        stride: The distance of neighbouring windows, for all dimensions or for each.
        padding: Zeros around the input: a number, one or a pair per dimension, "same" or "valid".
        dilation: The distance of neighbouring taps of a window, for all dimensions or for each.
        groups: How many groups of channels there are, each with a kernel of its own.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    h = (stride, padding, dilation, groups, False, 0)
    if bias is None:
        return _convolution((x, weight), x.shape, weight.shape, h)
    return _convolution_bias((x, weight, bias), x.shape, weight.shape, h)


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

    Args:
        x: The layer's input.
        weight: The layer's weight.
        bias: What is added to every output channel, if anything.
        stride: The distance of neighbouring windows, for all dimensions or for each.
        padding: Zeros around the input: a number, one or a pair per dimension, "same" or "valid".
        output_padding: Outputs that a transposed convolution adds at the end of dimensions.
        groups: How many groups of channels there are, each with a kernel of its own.
        dilation: The distance of neighbouring taps of a window, for all dimensions or for each.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    h = (stride, padding, dilation, groups, True, output_padding)
    if bias is None:
        return _convolution((x, weight), x.shape, weight.shape, h)
    return _convolution_bias((x, weight, bias), x.shape, weight.shape, h)


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
        return _linear((x, weight), x.shape, weight.shape)
    return _linear_bias((x, weight, bias), x.shape, weight.shape)


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

    Args:
        x: The layer's input.
        kernel_size: The taps of a window, for all dimensions or for each.
        dilation: The distance of neighbouring taps of a window, for all dimensions or for each.
        padding: Zeros around the input: a number, one or a pair per dimension, "same" or "valid".
        stride: The distance of neighbouring windows, for all dimensions or for each.
        transposed: Whether the layer is a transposed convolution.
        output_padding: Outputs that a transposed convolution adds at the end of dimensions.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    settings = (dilation, padding, stride, transposed, output_padding)
    return _unfold((x,), x.shape, kernel_size, *settings)


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

    Args:
        x: The layer's input.
        output_size: The spatial sizes of the result.
        kernel_size: The taps of a window, for all dimensions or for each.
        dilation: The distance of neighbouring taps of a window, for all dimensions or for each.
        padding: Zeros around the input: a number, one or a pair per dimension, "same" or "valid".
        stride: The distance of neighbouring windows, for all dimensions or for each.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together.
    """
    return _fold((x,), x.shape, output_size, kernel_size, dilation, padding, stride)


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

    Args:
        x: The layer's input.
        kernel_size: The taps of a window, for all dimensions or for each.
        stride: The distance of neighbouring windows; by default the kernel size.
        padding: Zeros around the input: a number, one or a pair per dimension, "same" or "valid".
        ceil_mode: Whether windows may begin inside and end outside of the input.
        count_include_pad: Whether padding counts in the means.
        divisor_override: What sums are divided by instead of the window's size.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    shape = tuple(x.shape)
    operands: tuple[torch.Tensor, ...] = (x,)
    alike = not ceil_mode and (count_include_pad or padding in (0, "valid"))
    if divisor_override is None and not alike:
        modes = {"ceil_mode": ceil_mode, "count_include_pad": count_include_pad}
        counts = pool_counts(shape, kernel_size, stride, padding, **modes)
        if any(len(set(each)) > 1 for each in counts):
            operands = (x, reciprocal_counts(counts, x.dtype, x.device))
    settings = (kernel_size, stride, padding, divisor_override, ceil_mode, count_include_pad)
    return _avg_pool(operands, shape, *settings)


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

    Args:
        input_shape: The shape of the layer's input.
        weight: The layer's weight.
        stride: The distance of neighbouring windows, for all dimensions or for each.
        padding: Zeros around the input: a number, one or a pair per dimension, "same" or "valid".
        dilation: The distance of neighbouring taps of a window, for all dimensions or for each.
        groups: How many groups of channels there are, each with a kernel of its own.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit, or an input shape with a batch.
    """
    settings = (stride, padding, dilation, groups)
    return _unfolded_kernel((weight,), input_shape, weight.shape, *settings)


@operation
def _convolution(x_shape: Shape, weight_shape: Shape, h: Values) -> Expression:
    return layer_networks.convolution(x_shape, weight_shape, Hyperparameters(*h))


@operation
def _convolution_bias(x_shape: Shape, weight_shape: Shape, h: Values) -> Expression:
    layer = layer_networks.convolution(x_shape, weight_shape, Hyperparameters(*h))
    return diagrams.with_bias(layer)


@operation
def _linear(x_shape: Shape, weight_shape: Shape) -> Expression:
    return diagrams.linear(x_shape, weight_shape)


@operation
def _linear_bias(x_shape: Shape, weight_shape: Shape) -> Expression:
    return diagrams.with_bias(diagrams.linear(x_shape, weight_shape))


@operation
def _unfold(
    x_shape: Shape,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple,
    padding: Padding,
    stride: IntOrTuple,
    transposed: bool,
    output_padding: IntOrTuple,
) -> Expression:
    settings = (dilation, padding, stride, transposed, output_padding)
    return diagrams.unfold(x_shape, kernel_size, *settings)


@operation
def _fold(
    x_shape: Shape,
    output_size: Shape,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple,
    padding: Padding,
    stride: IntOrTuple,
) -> Expression:
    return diagrams.fold(x_shape, output_size, kernel_size, dilation, padding, stride)


@operation
def _avg_pool(
    x_shape: Shape,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None,
    padding: Padding,
    divisor_override: int | None,
    ceil_mode: bool,
    count_include_pad: bool,
) -> Expression:
    modes = {"ceil_mode": ceil_mode, "count_include_pad": count_include_pad}
    return diagrams.avg_pool(x_shape, kernel_size, stride, padding, divisor_override, **modes)


@operation
def _unfolded_kernel(
    x_shape: Shape,
    weight_shape: Shape,
    stride: IntOrTuple,
    padding: Padding,
    dilation: IntOrTuple,
    groups: int,
) -> Expression:
    return diagrams.unfolded_kernel(x_shape, weight_shape, stride, padding, dilation, groups)
