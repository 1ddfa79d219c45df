"""What is made of per-sample gradients: dot products, norms, the Gauss-Newton or Fisher matrix.

``J[m, n, θ]`` is the gradient of sample n in the weight θ, for one cotangent or for several, m:
columns of the loss Hessian's root (Gauss-Newton, Fisher) or of the network's Jacobian (neural
tangent kernel). Layers as in `tnconv.functional.derivatives`.
"""

from collections.abc import Sequence

import torch

from tnconv import diagrams
from tnconv.diagrams import Expression, Hyperparameters, TensorNetwork
from tnconv.diagrams.hyperparameters import IntOrTuple, Padding, Values
from tnconv.diagrams.layer_networks import layer
from tnconv.functional.lookup import Shape, of_layer, operation, several


def gradient_dots(
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
    """``G[m, n, m', n'] = Σ_θ J[m, n, θ] J[m', n', θ]``: dot products of all gradients.

    The Gram matrix of the Gauss-Newton (Dangel et al. 2022, ViViT), and the layer's block of the
    empirical neural tangent kernel. Shape (n, n) for one cotangent.

    >>> gradient_dots(torch.rand(8, 3, 9), (4, 3, 3), torch.rand(2, 8, 4, 7)).shape
    torch.Size([2, 8, 2, 8])

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
    return _gradient_dots((x, grad_output), x.shape, weight_shape, h, vectors)


def ntk_block(
    x: torch.Tensor,  # (n, g·c, *i)
    weight_shape: Sequence[int],  # (g·d, c, *k)
    grad_output: torch.Tensor,  # (n, g·d, *o) or (m, n, g·d, *o)
    other_x: torch.Tensor,  # (n', g·c, *i')
    other_grad_output: torch.Tensor,  # (n', g·d, *o') or (m', n', g·d, *o')
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
) -> torch.Tensor:
    """``G[m, n, m', n'] = Σ_θ J[m, n, θ] J'[m', n', θ]``: `gradient_dots` between two batches.

    The layer's block of the empirical neural tangent kernel (Jacot et al. 2018), between a batch
    and another one, whose inputs may have another size. Without m or m' where there is one
    cotangent.

    >>> x, v = torch.rand(8, 3, 9), torch.rand(2, 8, 4, 7)
    >>> ntk_block(x, (4, 3, 3), v, torch.rand(5, 3, 6), torch.rand(5, 4, 4)).shape
    torch.Size([2, 8, 5])

    Args:
        x: The layer's input.
        weight_shape: The shape of the layer's weight.
        grad_output: Cotangents of the layer's output, such as the loss's gradient.
        other_x: The input of the other batch.
        other_grad_output: Cotangents of the other batch's output.
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
    vectors = several(grad_output, x.dim()), several(other_grad_output, other_x.dim())
    operands = (x, grad_output, other_x, other_grad_output)
    return _ntk_block(operands, x.shape, other_x.shape, weight_shape, h, *vectors)


def gradient_norms(
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
    """``s[m, n] = Σ_θ J[m, n, θ]²``: squared norms of per-sample gradients, or ``s[n]``.

    >>> gradient_norms(torch.rand(8, 3, 9), (4, 3, 3), torch.rand(8, 4, 7)).shape
    torch.Size([8])

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
    return _gradient_norms(
        (x, grad_output), x.shape, weight_shape, h, several(grad_output, x.dim())
    )


def ggn_diagonal(
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
    """``d[gd, c, k] = Σ_{m,n} J[m, n, gdck]²``: the diagonal of the Gauss-Newton or Fisher.

    >>> ggn_diagonal(torch.rand(8, 3, 9), (4, 3, 3), torch.rand(2, 8, 4, 7)).shape
    torch.Size([4, 3, 3])

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
    return _ggn_diagonal((x, grad_output), x.shape, weight_shape, h, vectors)


def per_sample_ggn_diagonal(
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
    """``d[n, gd, c, k] = Σ_m J[m, n, gdck]²``: `ggn_diagonal` of every sample.

    >>> per_sample_ggn_diagonal(torch.rand(8, 3, 9), (4, 3, 3), torch.rand(8, 4, 7)).shape
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
    return _per_sample_ggn_diagonal(
        (x, grad_output), x.shape, weight_shape, h, several(grad_output, x.dim())
    )


def ggn_block(
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
    """``B[θ, θ'] = Σ_{m,n} J[m, n, θ] J[m, n, θ']``, of shape ``(*weight, *weight)``.

    >>> ggn_block(torch.rand(8, 3, 9), (4, 3, 3), torch.rand(2, 8, 4, 7)).shape
    torch.Size([4, 3, 3, 4, 3, 3])

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
    return _ggn_block((x, grad_output), x.shape, weight_shape, h, vectors)


def ggn_vector_product(
    x: torch.Tensor,  # (n, g·c, *i)
    weight_shape: Sequence[int],  # (g·d, c, *k)
    grad_output: torch.Tensor,  # (n, g·d, *o) or (m, n, g·d, *o)
    vector: torch.Tensor,  # (g·d, c, *k)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
) -> torch.Tensor:
    """``p[θ] = Σ_{m,n,θ'} J[m, n, θ] J[m, n, θ'] u[θ']``: `ggn_block` times a vector.

    >>> u, v = torch.rand(4, 3, 3), torch.rand(2, 8, 4, 7)
    >>> ggn_vector_product(torch.rand(8, 3, 9), u.shape, v, u).shape
    torch.Size([4, 3, 3])

    Args:
        x: The layer's input.
        weight_shape: The shape of the layer's weight.
        grad_output: Cotangents of the layer's output, such as the loss's gradient.
        vector: A vector of the weight's shape.
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
    return _ggn_vector_product(
        (x, grad_output, vector), x.shape, weight_shape, h, several(grad_output, x.dim())
    )


@of_layer
def _gradient_dots(layer: TensorNetwork, vectors: int | None) -> Expression:
    return diagrams.gradient_dots(layer, vectors=vectors)


@of_layer
def _gradient_norms(layer: TensorNetwork, vectors: int | None) -> Expression:
    return diagrams.gradient_norms(layer, vectors=vectors)


@of_layer
def _ggn_diagonal(layer: TensorNetwork, vectors: int | None) -> Expression:
    return diagrams.ggn_diagonal(layer, vectors=vectors)


@of_layer
def _per_sample_ggn_diagonal(layer: TensorNetwork, vectors: int | None) -> Expression:
    return diagrams.ggn_diagonal(layer, vectors=vectors, per_sample=True)


@of_layer
def _ggn_block(layer: TensorNetwork, vectors: int | None) -> Expression:
    return diagrams.ggn_block(layer, vectors=vectors)


@of_layer
def _ggn_vector_product(layer: TensorNetwork, vectors: int | None) -> Expression:
    return diagrams.ggn_vector_product(layer, vectors=vectors)


@operation
def _ntk_block(
    shape: Shape,
    other_shape: Shape,
    weight_shape: Shape,
    h: Values,
    vectors: int | None,
    other_vectors: int | None,
) -> Expression:
    settings = Hyperparameters(*h)
    first, other = (layer(each, weight_shape, settings) for each in (shape, other_shape))
    return diagrams.ntk_block(first, other, vectors=vectors, other_vectors=other_vectors)
