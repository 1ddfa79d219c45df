"""Kronecker factors: second moments of a layer's patches and of its output gradients.

Factors of patches are a convolution's; with ``transposed=True`` a transposed convolution's; with
``kernel_size=()`` a linear layer's, and x has shape (n, *o, c). ``joint=True`` ends every patch
with an entry 1, ``per_group=False`` replaces the factors of all groups by their mean, and ``scale``
is a convention of `tnconv.diagrams.kronecker`, "ggn" or "kfc", or the number before the plain sum.
"""

import torch

from tnconv import diagrams
from tnconv.diagrams import Expression
from tnconv.diagrams.hyperparameters import IntOrTuple, Padding, Values
from tnconv.diagrams.kronecker import Convention
from tnconv.functional.lookup import Shape, operation
from tnconv.functional.scales import Number, Ratio, exact, ratio

Scale = Convention | Number


def kfac_expand(
    x: torch.Tensor,  # (n, g·c, *i), or (n, *o, c) with kernel_size=()
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
    joint: bool = False,
    per_group: bool = True,
    scale: Scale = "ggn",
) -> torch.Tensor:
    """The input-based KFAC-expand factor ``A[g, ck, c'k'] = 1/(N·O) Σ_{n,o} U U'``.

    >>> kfac_expand(torch.rand(8, 4, 32, 32), 3, groups=2).shape
    torch.Size([2, 18, 18])
    >>> kfac_expand(torch.rand(8, 5, 3), (), joint=True).shape  # a linear layer's
    torch.Size([1, 4, 4])

    Args:
        x: The layer's input.
        kernel_size: The taps of a window, for all dimensions or for each.
        stride: The distance of neighbouring windows, for all dimensions or for each.
        padding: Zeros around the input: a number, one or a pair per dimension, "same" or "valid".
        dilation: The distance of neighbouring taps of a window, for all dimensions or for each.
        groups: How many groups of channels there are, each with a kernel of its own.
        transposed: Whether the layer is a transposed convolution.
        output_padding: Outputs that a transposed convolution adds at the end of dimensions.
        joint: Whether patches end with an entry 1, for the factor of weight and bias.
        per_group: Whether each group has a factor of its own, or all have their mean.
        scale: The factor's normalisation: "ggn", "kfc" for the papers', or a number.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    h = (stride, padding, dilation, groups, transposed, output_padding)
    return _kfac_expand((x,), x.shape, kernel_size, h, joint, per_group, ratio(scale))


def kfac_reduce(
    x: torch.Tensor,  # (n, g·c, *i), or (n, *o, c) with kernel_size=()
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
    joint: bool = False,
    per_group: bool = True,
    scale: Scale = "ggn",
) -> torch.Tensor:
    """The input-based KFAC-reduce factor ``A[g, ck, c'k'] = 1/(N·O²) Σ_n (Σ_o U)(Σ_o' U')``.

    >>> kfac_reduce(torch.rand(8, 4, 32, 32), 3, groups=2).shape
    torch.Size([2, 18, 18])

    Args:
        x: The layer's input.
        kernel_size: The taps of a window, for all dimensions or for each.
        stride: The distance of neighbouring windows, for all dimensions or for each.
        padding: Zeros around the input: a number, one or a pair per dimension, "same" or "valid".
        dilation: The distance of neighbouring taps of a window, for all dimensions or for each.
        groups: How many groups of channels there are, each with a kernel of its own.
        transposed: Whether the layer is a transposed convolution.
        output_padding: Outputs that a transposed convolution adds at the end of dimensions.
        joint: Whether patches end with an entry 1, for the factor of weight and bias.
        per_group: Whether each group has a factor of its own, or all have their mean.
        scale: The factor's normalisation: "ggn", "kfc" for the papers', or a number.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    h = (stride, padding, dilation, groups, transposed, output_padding)
    return _kfac_reduce((x,), x.shape, kernel_size, h, joint, per_group, ratio(scale))


def grad_expand(
    grad_output: torch.Tensor,  # (n, g·d, *o)
    groups: int = 1,
    per_group: bool = True,
    scale: Scale = "ggn",
) -> torch.Tensor:
    """The gradient-based KFAC-expand factor ``B[g, d, d'] = Σ_{n,o} v[n, gd, o] v[n, gd', o]``.

    >>> grad_expand(torch.rand(8, 4, 30, 30), groups=2).shape
    torch.Size([2, 2, 2])

    Args:
        grad_output: Cotangents of the layer's output, such as the loss's gradient.
        groups: How many groups of channels there are, each with a kernel of its own.
        per_group: Whether each group has a factor of its own, or all have their mean.
        scale: The factor's normalisation: "ggn", "kfc" for the papers', or a number.

    Raises:
        ValueError: a tensor without batch and channels, or groups that do not divide them.
    """
    return _grad_expand((grad_output,), grad_output.shape, groups, per_group, ratio(scale))


def grad_reduce(
    grad_output: torch.Tensor,  # (n, g·d, *o)
    groups: int = 1,
    per_group: bool = True,
    scale: Scale = "ggn",
) -> torch.Tensor:
    """The gradient-based KFAC-reduce factor ``B[g, d, d'] = Σ_n (Σ_o v[n, gd, o])(Σ_o' v')``.

    >>> grad_reduce(torch.rand(8, 4, 30, 30), groups=2).shape
    torch.Size([2, 2, 2])

    Args:
        grad_output: Cotangents of the layer's output, such as the loss's gradient.
        groups: How many groups of channels there are, each with a kernel of its own.
        per_group: Whether each group has a factor of its own, or all have their mean.
        scale: The factor's normalisation: "ggn", "kfc" for the papers', or a number.

    Raises:
        ValueError: a tensor without batch and channels, or groups that do not divide them.
    """
    return _grad_reduce((grad_output,), grad_output.shape, groups, per_group, ratio(scale))


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

    Args:
        x: The layer's input.
        kernel_size: The taps of a window, for all dimensions or for each.
        stride: The distance of neighbouring windows, for all dimensions or for each.
        padding: Zeros around the input: a number, one or a pair per dimension, "same" or "valid".
        dilation: The distance of neighbouring taps of a window, for all dimensions or for each.
        groups: How many groups of channels there are, each with a kernel of its own.
        transposed: Whether the layer is a transposed convolution.
        output_padding: Outputs that a transposed convolution adds at the end of dimensions.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    h = (stride, padding, dilation, groups, transposed, output_padding)
    return _mean_patches((x,), x.shape, kernel_size, h)


@operation
def _kfac_expand(
    x_shape: Shape,
    kernel_size: IntOrTuple,
    h: Values,
    joint: bool,
    per_group: bool,
    scale: Convention | Ratio,
) -> Expression:
    return diagrams.kfac_expand(x_shape, kernel_size, *h, joint, per_group, exact(scale))


@operation
def _kfac_reduce(
    x_shape: Shape,
    kernel_size: IntOrTuple,
    h: Values,
    joint: bool,
    per_group: bool,
    scale: Convention | Ratio,
) -> Expression:
    return diagrams.kfac_reduce(x_shape, kernel_size, *h, joint, per_group, exact(scale))


@operation
def _mean_patches(x_shape: Shape, kernel_size: IntOrTuple, h: Values) -> Expression:
    return diagrams.mean_patches(x_shape, kernel_size, *h)


@operation
def _grad_expand(
    output_shape: Shape, groups: int, per_group: bool, scale: Convention | Ratio
) -> Expression:
    return diagrams.grad_expand(output_shape, groups, per_group, exact(scale))


@operation
def _grad_reduce(
    output_shape: Shape, groups: int, per_group: bool, scale: Convention | Ratio
) -> Expression:
    return diagrams.grad_reduce(output_shape, groups, per_group, exact(scale))
