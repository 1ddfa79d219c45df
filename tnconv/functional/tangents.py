"""Jacobian-vector products of layers, and whole Jacobians.

Layers and leading dimensions m as in `tnconv.functional.derivatives`.
"""

from collections.abc import Sequence

import torch

from tnconv.diagrams import Expression, TensorNetwork
from tnconv.diagrams.hyperparameters import IntOrTuple, Padding
from tnconv.functional.derivatives import bias_of
from tnconv.functional.lookup import Shape, legs, of_layer, operation, several


def input_jvp(
    input_shape: Sequence[int],  # (n, g·c, *i) or (g·c, *i)
    weight: torch.Tensor,  # (g·d, c, *k)
    tangent_x: torch.Tensor,  # (n, g·c, *i) or (m, n, g·c, *i)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
) -> torch.Tensor:
    """``dy[n, gd, o] = Σ_{c,k,i} dx[n, gc, i] Π[k, o, i] w[gd, c, k]``, or ``dy[m, ...]``.

    >>> input_jvp((8, 3, 9), torch.rand(4, 3, 3), torch.rand(5, 8, 3, 9)).shape
    torch.Size([5, 8, 4, 7])

    Args:
        input_shape: The shape of the layer's input.
        weight: The layer's weight.
        tangent_x: Directions of the input.
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
    return _input_jvp(
        (tangent_x, weight), input_shape, weight.shape, h, several(tangent_x, len(input_shape))
    )


def weight_jvp(
    x: torch.Tensor,  # (n, g·c, *i) or (g·c, *i)
    weight_shape: Sequence[int],  # (g·d, c, *k)
    tangent_weight: torch.Tensor,  # (g·d, c, *k) or (m, g·d, c, *k)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
) -> torch.Tensor:
    """``dy[n, gd, o] = Σ_{c,k,i} x[n, gc, i] Π[k, o, i] dw[gd, c, k]``, or ``dy[m, ...]``.

    >>> weight_jvp(torch.rand(8, 3, 9), (4, 3, 3), torch.rand(4, 3, 3)).shape
    torch.Size([8, 4, 7])

    Args:
        x: The layer's input.
        weight_shape: The shape of the layer's weight.
        tangent_weight: Directions of the weight.
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
    return _weight_jvp(
        (x, tangent_weight), x.shape, weight_shape, h, several(tangent_weight, len(weight_shape))
    )


def per_sample_weight_jvp(
    x: torch.Tensor,  # (n, g·c, *i)
    weight_shape: Sequence[int],  # (g·d, c, *k)
    tangent_weight: torch.Tensor,  # (n, g·d, c, *k) or (m, n, g·d, c, *k)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
) -> torch.Tensor:
    """``dy[n, gd, o] = Σ_{c,k,i} x[n, gc, i] Π[k, o, i] dw[n, gd, c, k]``: a tangent per sample.

    >>> per_sample_weight_jvp(torch.rand(8, 3, 9), (4, 3, 3), torch.rand(8, 4, 3, 3)).shape
    torch.Size([8, 4, 7])

    Args:
        x: The layer's input.
        weight_shape: The shape of the layer's weight.
        tangent_weight: Directions of the weight.
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
    return _per_sample_weight_jvp(
        (x, tangent_weight),
        x.shape,
        weight_shape,
        h,
        several(tangent_weight, len(weight_shape) + 1),
    )


def bias_jvp(
    output_shape: Sequence[int],  # (n, g·d, *o)
    tangent_bias: torch.Tensor,  # (g·d,) or (m, g·d)
) -> torch.Tensor:
    """``dy[n, gd, o] = db[gd]``, or ``dy[m, ...]``, for every layer with a bias.

    >>> bias_jvp((8, 4, 30, 30), torch.rand(4)).shape
    torch.Size([8, 4, 30, 30])

    Raises:
        ValueError: an output without batch and channels, or a tangent that does not fit it.
    """
    vectors = several(tangent_bias, 1)
    return _bias_jvp((tangent_bias,), output_shape, vectors)


def input_jacobian(
    input_shape: Sequence[int],  # (n, g·c, *i) or (g·c, *i)
    weight: torch.Tensor,  # (g·d, c, *k)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
) -> torch.Tensor:
    """``J[n, gd, o, n', g'c, i] = δ[n, n'] δ[g, g'] Σ_k Π[k, o, i] w[gd, c, k]``, dense.

    For input without batch and as a matrix it is the `unfolded_kernel`.

    >>> input_jacobian((3, 9), torch.rand(4, 3, 3)).shape
    torch.Size([4, 7, 3, 9])

    Args:
        input_shape: The shape of the layer's input.
        weight: The layer's weight.
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
    return _input_jacobian((weight,), input_shape, weight.shape, h)


def weight_jacobian(
    x: torch.Tensor,  # (n, g·c, *i) or (g·c, *i)
    weight_shape: Sequence[int],  # (g·d, c, *k)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
) -> torch.Tensor:
    """``J[n, gd, o, g'd', c, k] = δ[g, g'] δ[d, d'] Σ_i x[n, gc, i] Π[k, o, i]``, dense.

    >>> weight_jacobian(torch.rand(8, 3, 9), (4, 3, 3)).shape
    torch.Size([8, 4, 7, 4, 3, 3])

    Args:
        x: The layer's input.
        weight_shape: The shape of the layer's weight.
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
    return _weight_jacobian((x,), x.shape, weight_shape, h)


@of_layer
def _input_jvp(layer: TensorNetwork, vectors: int | None) -> Expression:
    return layer.jvp("x", extra=legs(vectors))


@of_layer
def _weight_jvp(layer: TensorNetwork, vectors: int | None) -> Expression:
    return layer.jvp("weight", extra=legs(vectors))


@of_layer
def _per_sample_weight_jvp(layer: TensorNetwork, vectors: int | None) -> Expression:
    return layer.jvp("weight", extra=legs(vectors), per_sample=True)


@operation
def _bias_jvp(output_shape: Shape, vectors: int | None) -> Expression:
    return bias_of(output_shape).jvp("bias", extra=legs(vectors))


@of_layer
def _input_jacobian(layer: TensorNetwork) -> Expression:
    return layer.jacobian("x")


@of_layer
def _weight_jacobian(layer: TensorNetwork) -> Expression:
    return layer.jacobian("weight")
