"""Vector-Jacobian products of layers: gradients of inputs, weights and biases.

The layer is a convolution; with ``transposed=True`` it is a transposed one, whose weight has shape
(g·c, d, *k); with a weight of shape (d, c) it is linear, and x has shape (n, *o, c). A leading
dimension m of a cotangent or tangent means several at once, and leads the result, too.
"""

from collections.abc import Sequence

import torch

from tnconv import diagrams
from tnconv.diagrams import Expression, TensorNetwork
from tnconv.diagrams.hyperparameters import IntOrTuple, Padding
from tnconv.functional.lookup import Shape, legs, of_layer, operation, several


def weight_vjp(
    x: torch.Tensor,  # (n, g·c, *i) or (g·c, *i)
    weight_shape: Sequence[int],  # (g·d, c, *k)
    grad_output: torch.Tensor,  # (n, g·d, *o) or (m, n, g·d, *o)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
) -> torch.Tensor:
    """``dw[gd, c, k] = Σ_{n,o,i} x[n, gc, i] Π[k, o, i] v[n, gd, o]``, or ``dw[m, ...]``.

    With x a tangent of the input: the mixed second derivative ``∂²(v·y) / ∂w ∂x`` times it.

    >>> weight_vjp(torch.rand(8, 3, 32, 32), (4, 3, 3, 3), torch.rand(8, 4, 30, 30)).shape
    torch.Size([4, 3, 3, 3])

    Args:
        x: The layer's input.
        weight_shape: The shape of the layer's weight.
        grad_output: Cotangents of the layer's output, such as the loss's gradient.
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
    vectors = several(grad_output, x.dim())
    return _weight_vjp((x, grad_output), x.shape, weight_shape, h, vectors)


def per_sample_weight_grad(
    x: torch.Tensor,  # (n, g·c, *i)
    weight_shape: Sequence[int],  # (g·d, c, *k)
    grad_output: torch.Tensor,  # (n, g·d, *o) or (m, n, g·d, *o)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
) -> torch.Tensor:
    """``dw[n, gd, c, k] = Σ_{o,i} x[n, gc, i] Π[k, o, i] v[n, gd, o]``, or ``dw[m, n, ...]``.

    >>> per_sample_weight_grad(torch.rand(8, 3, 9), (4, 3, 3), torch.rand(8, 4, 7)).shape
    torch.Size([8, 4, 3, 3])

    Args:
        x: The layer's input.
        weight_shape: The shape of the layer's weight.
        grad_output: Cotangents of the layer's output, such as the loss's gradient.
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
    return _per_sample_weight_grad(
        (x, grad_output), x.shape, weight_shape, h, several(grad_output, x.dim())
    )


def input_vjp(
    input_shape: Sequence[int],  # (n, g·c, *i) or (g·c, *i)
    weight: torch.Tensor,  # (g·d, c, *k)
    grad_output: torch.Tensor,  # (n, g·d, *o) or (m, n, g·d, *o)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
) -> torch.Tensor:
    """``dx[n, gc, i] = Σ_{d,k,o} w[gd, c, k] Π[k, o, i] v[n, gd, o]``, or ``dx[m, ...]``.

    With a tangent for the weight: the mixed second derivative ``∂²(v·y) / ∂x ∂w`` times it.

    >>> input_vjp((8, 3, 32, 32), torch.rand(4, 3, 3, 3), torch.rand(8, 4, 30, 30)).shape
    torch.Size([8, 3, 32, 32])

    Args:
        input_shape: The shape of the layer's input.
        weight: The layer's weight.
        grad_output: Cotangents of the layer's output, such as the loss's gradient.
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
    return _input_vjp(
        (grad_output, weight), input_shape, weight.shape, h, several(grad_output, len(input_shape))
    )


def bias_vjp(
    output_shape: Sequence[int],  # (n, g·d, *o)
    grad_output: torch.Tensor,  # (n, g·d, *o) or (m, n, g·d, *o)
) -> torch.Tensor:
    """``db[gd] = Σ_{n,o} v[n, gd, o]``, or ``db[m, gd]``, for every layer with a bias.

    >>> bias_vjp((8, 4, 30, 30), torch.rand(8, 4, 30, 30)).shape
    torch.Size([4])

    Raises:
        ValueError: an output without batch and channels, or a cotangent that does not fit it.
    """
    vectors = several(grad_output, len(output_shape))
    return _bias_vjp((grad_output,), output_shape, vectors)


def per_sample_bias_grad(
    output_shape: Sequence[int],  # (n, g·d, *o)
    grad_output: torch.Tensor,  # (n, g·d, *o) or (m, n, g·d, *o)
) -> torch.Tensor:
    """``db[n, gd] = Σ_o v[n, gd, o]``, or ``db[m, n, gd]``, for every layer with a bias.

    >>> per_sample_bias_grad((8, 4, 30, 30), torch.rand(8, 4, 30, 30)).shape
    torch.Size([8, 4])

    Raises:
        ValueError: an output without batch and channels, or a cotangent that does not fit it.
    """
    vectors = several(grad_output, len(output_shape))
    return _per_sample_bias_grad((grad_output,), output_shape, vectors)


@of_layer
def _weight_vjp(layer: TensorNetwork, vectors: int | None) -> Expression:
    return layer.vjp("weight", extra=legs(vectors))


@of_layer
def _per_sample_weight_grad(layer: TensorNetwork, vectors: int | None) -> Expression:
    return layer.vjp("weight", extra=legs(vectors), per_sample=True)


@of_layer
def _input_vjp(layer: TensorNetwork, vectors: int | None) -> Expression:
    return layer.vjp("x", extra=legs(vectors))


@operation
def _bias_vjp(output_shape: Shape, vectors: int | None) -> Expression:
    return bias_of(output_shape).vjp("bias", extra=legs(vectors))


@operation
def _per_sample_bias_grad(output_shape: Shape, vectors: int | None) -> Expression:
    return bias_of(output_shape).vjp("bias", extra=legs(vectors), per_sample=True)


def bias_of(output_shape: Shape) -> TensorNetwork:
    """The bias of any layer with this output.

    Raises:
        ValueError: an output without batch and channels.
    """
    if len(output_shape) < 2:
        shape = tuple(output_shape)
        raise ValueError(f"output has shape {shape}; expected (batch, channels, *positions)")
    return diagrams.bias(output_shape, output_shape[1:2])
