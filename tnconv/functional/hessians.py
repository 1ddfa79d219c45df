"""Hessians of a layer's output, diagonal or full, pulled back to its input or weight.

Layers as in `tnconv.functional.derivatives`.
"""

from collections.abc import Sequence

import torch

from tnconv import diagrams
from tnconv.diagrams import Expression, TensorNetwork
from tnconv.diagrams.hyperparameters import IntOrTuple, Padding
from tnconv.functional.lookup import of_layer


def input_diagonal_vjp(
    input_shape: Sequence[int],  # (n, g·c, *i) or (g·c, *i)
    weight: torch.Tensor,  # (g·d, c, *k)
    diagonal: torch.Tensor,  # (n, g·d, *o) or (g·d, *o)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
) -> torch.Tensor:
    """``h[n, gc, i] = Σ_{d,k,o} w[gd, c, k]² Π[k, o, i] h[n, gd, o]``: ``Jᵀ diag(h) J``'s diagonal.

    The recursion of Becker & LeCun 1989 and HesScale; exact for a diagonal Hessian of the output.

    >>> input_diagonal_vjp((8, 3, 9), torch.rand(4, 3, 3), torch.rand(8, 4, 7)).shape
    torch.Size([8, 3, 9])

    Args:
        input_shape: The shape of the layer's input.
        weight: The layer's weight.
        diagonal: The diagonal of a matrix over the layer's outputs.
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
    return _input_diagonal_vjp((diagonal, weight), input_shape, weight.shape, h)


def weight_diagonal_vjp(
    x: torch.Tensor,  # (n, g·c, *i) or (g·c, *i)
    weight_shape: Sequence[int],  # (g·d, c, *k)
    diagonal: torch.Tensor,  # (n, g·d, *o) or (g·d, *o)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
) -> torch.Tensor:
    """``h[gd, c, k] = Σ_{n,o,i} x[n, gc, i]² Π[k, o, i] h[n, gd, o]``, for the weight.

    >>> weight_diagonal_vjp(torch.rand(8, 3, 9), (4, 3, 3), torch.rand(8, 4, 7)).shape
    torch.Size([4, 3, 3])

    Args:
        x: The layer's input.
        weight_shape: The shape of the layer's weight.
        diagonal: The diagonal of a matrix over the layer's outputs.
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
    return _weight_diagonal_vjp((x, diagonal), x.shape, weight_shape, h)


def input_hessian_vjp(
    input_shape: Sequence[int],  # (g·c, *i)
    weight: torch.Tensor,  # (g·d, c, *k)
    hessian: torch.Tensor,  # (g·d, *o, g·d, *o)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
) -> torch.Tensor:
    """``Jᵀ B J`` for ``J = ∂y / ∂x`` and a Hessian B of the output: shape ``(*x, *x)``.

    For one sample, or averaged over the batch as in KFRA (Botev et al. 2017).

    >>> input_hessian_vjp((3, 9), torch.rand(4, 3, 3), torch.rand(4, 7, 4, 7)).shape
    torch.Size([3, 9, 3, 9])

    Args:
        input_shape: The shape of the layer's input.
        weight: The layer's weight.
        hessian: A matrix over the layer's outputs, for each sample.
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
    return _input_hessian_vjp((weight, hessian), input_shape, weight.shape, h)


def weight_hessian_vjp(
    x: torch.Tensor,  # (g·c, *i)
    weight_shape: Sequence[int],  # (g·d, c, *k)
    hessian: torch.Tensor,  # (g·d, *o, g·d, *o)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
) -> torch.Tensor:
    """``Jᵀ B J`` for ``J = ∂y / ∂w`` and a Hessian B of the output: shape ``(*weight, *weight)``.

    >>> weight_hessian_vjp(torch.rand(3, 9), (4, 3, 3), torch.rand(4, 7, 4, 7)).shape
    torch.Size([4, 3, 3, 4, 3, 3])

    Args:
        x: The layer's input.
        weight_shape: The shape of the layer's weight.
        hessian: A matrix over the layer's outputs, for each sample.
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
    return _weight_hessian_vjp((x, hessian), x.shape, weight_shape, h)


@of_layer
def _input_diagonal_vjp(layer: TensorNetwork) -> Expression:
    return diagrams.diagonal_vjp(layer, "x")


@of_layer
def _weight_diagonal_vjp(layer: TensorNetwork) -> Expression:
    return diagrams.diagonal_vjp(layer, "weight")


@of_layer
def _input_hessian_vjp(layer: TensorNetwork) -> Expression:
    return diagrams.hessian_vjp(layer, "x")


@of_layer
def _weight_hessian_vjp(layer: TensorNetwork) -> Expression:
    return diagrams.hessian_vjp(layer, "weight")
