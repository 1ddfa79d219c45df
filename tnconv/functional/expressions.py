"""What each operation computes: from its settings, in the order of its arguments, to a diagram."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial

from tnconv import diagrams
from tnconv.diagrams import Expression, Leg, Sum, TensorNetwork
from tnconv.diagrams.geometry import IntOrTuple, Padding

Setting = int | float | str | None | tuple["Setting", ...]
Scale = float | Fraction
Ratio = float | tuple[int, int]


def layer(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
) -> TensorNetwork:
    """A convolution, a transposed one, or a linear layer with positions before the channels."""
    if transposed:
        return diagrams.conv_transpose(
            input_shape, weight_shape, stride, padding, output_padding, groups, dilation
        )
    _check_output_padding(output_padding)
    if len(weight_shape) == 2 < len(input_shape):
        if groups != 1:
            raise ValueError(f"groups is {groups} for a linear layer; expected 1")
        return diagrams.linear(input_shape, weight_shape)
    return diagrams.conv(input_shape, weight_shape, stride, padding, dilation, groups)


def _check_output_padding(output_padding: IntOrTuple) -> None:
    extra = (output_padding,) if isinstance(output_padding, int) else output_padding
    if any(extra):
        raise ValueError(f"output_padding is {output_padding!r}; expected 0 unless transposed")


def _biased(output_shape: Sequence[int]) -> Expression:
    """Any layer with this output and a bias."""
    if len(output_shape) < 2:
        shape = tuple(output_shape)
        raise ValueError(f"output has shape {shape}; expected (batch, channels, *positions)")
    _, channels, *positions = output_shape
    weight_shape = (channels, 1, *(1 for _ in positions))
    return diagrams.with_bias(diagrams.conv(output_shape, weight_shape, groups=channels))


def _legs(vectors: int | None) -> dict[str, int]:
    """The leg of several cotangents or tangents."""
    return {} if vectors is None else {"m": vectors}


def _vjp(operand: str, per_sample: bool = False) -> Callable[..., Expression]:
    return lambda vectors, *settings: layer(*settings).vjp(
        operand, extra=_legs(vectors), per_sample=per_sample
    )


def _jvp(operand: str, per_sample: bool = False) -> Callable[..., Expression]:
    return lambda vectors, *settings: layer(*settings).jvp(
        operand, extra=_legs(vectors), per_sample=per_sample
    )


def _sampled_vjp(operand: str) -> Callable[..., Expression]:
    return lambda vectors, samples, scale, *settings: _sampled(
        layer(*settings), operand, vectors, samples, scale
    )


def _sampled(
    network: TensorNetwork,
    operand: str,
    vectors: int | None,
    samples: tuple[tuple[Leg, int], ...],
    scale: Ratio | None,
) -> Sum:
    """A product with the Jacobian of which each leg in ``samples`` has so many positions."""
    product = network.vjp(operand, extra=_legs(vectors))
    unbiased = Fraction(1)
    for leg, length in samples:
        product = product.sampled(leg, length)
        unbiased *= Fraction(network.sizes[leg], length) if scale is None else 1
    return product.scaled(unbiased if scale is None else _fraction(scale))


def _of_gradients(
    quantity: Callable[..., TensorNetwork], **options: bool
) -> Callable[..., Expression]:
    return lambda vectors, *settings: quantity(layer(*settings), vectors=vectors, **options)


def _unfolded(
    input_shape: Sequence[int],
    kernel_size: IntOrTuple,
    dilation: IntOrTuple,
    padding: Padding,
    stride: IntOrTuple,
    transposed: bool,
    output_padding: IntOrTuple,
) -> TensorNetwork:
    settings = (input_shape, kernel_size, dilation, padding, stride)
    if transposed:
        return diagrams.unfold_transpose(*settings, output_padding)
    _check_output_padding(output_padding)
    return diagrams.unfold(*settings)


def _of_patches(
    quantity: Callable[..., TensorNetwork],
    of_transposed: Callable[..., TensorNetwork],
    input_shape: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple,
    padding: Padding,
    dilation: IntOrTuple,
    groups: int,
    transposed: bool,
    output_padding: IntOrTuple,
    **scale: Fraction | None,
) -> TensorNetwork:
    """A quantity of the patches of a convolution or of a transposed one."""
    settings = (input_shape, kernel_size, stride, padding)
    if transposed:
        return of_transposed(*settings, output_padding, groups, dilation, **scale)
    _check_output_padding(output_padding)
    return quantity(*settings, dilation, groups, **scale)


def _input_factor(
    quantity: Callable[..., TensorNetwork],
    of_transposed: Callable[..., TensorNetwork],
    bias: bool,
    group_average: bool,
    scale: Ratio | None,
    *settings: Setting,
) -> Expression:
    of_patches: Callable[..., TensorNetwork] = partial(_of_patches, quantity, of_transposed)
    factor = of_patches(*settings, scale=None if scale is None else _fraction(scale))
    network: Expression = diagrams.with_ones(factor) if bias else factor
    return _group_average(network) if group_average else network


def _fraction(scale: Ratio) -> Fraction:
    return Fraction(*scale) if isinstance(scale, tuple) else Fraction(scale)


def _grad_factor(
    quantity: Callable[..., TensorNetwork],
    output_shape: Sequence[int],
    groups: int,
    group_average: bool,
    scale: Ratio,
) -> Expression:
    factor = quantity(output_shape, groups, _fraction(scale))
    return _group_average(factor) if group_average else factor


def _group_average(factor: Expression) -> Expression:
    return Sum(tuple(map(diagrams.group_average, factor.terms)))


EXPRESSIONS: dict[str, Callable[..., Expression]] = {
    "conv": diagrams.conv,
    "conv_bias": lambda *settings: diagrams.with_bias(diagrams.conv(*settings)),
    "conv_transpose": diagrams.conv_transpose,
    "conv_transpose_bias": lambda *s: diagrams.with_bias(diagrams.conv_transpose(*s)),
    "linear": diagrams.linear,
    "linear_bias": lambda *settings: diagrams.with_bias(diagrams.linear(*settings)),
    "unfold": _unfolded,
    "fold": diagrams.fold,
    "avg_pool": lambda *settings: diagrams.avg_pool(
        *settings[:-2], ceil_mode=settings[-2], count_include_pad=settings[-1]
    ),
    "unfolded_kernel": diagrams.unfolded_kernel,
    "weight_vjp": _vjp("weight"),
    "per_sample_weight_grad": _vjp("weight", per_sample=True),
    "input_vjp": _vjp("x"),
    "sampled_weight_vjp": _sampled_vjp("weight"),
    "sampled_input_vjp": _sampled_vjp("x"),
    "bias_vjp": lambda m, shape: _biased(shape).vjp("bias", extra=_legs(m)),
    "per_sample_bias_grad": lambda m, shape: _biased(shape).vjp("bias", ("n",), _legs(m)),
    "input_jvp": _jvp("x"),
    "weight_jvp": _jvp("weight"),
    "per_sample_weight_jvp": _jvp("weight", per_sample=True),
    "bias_jvp": lambda m, shape: _biased(shape).jvp("bias", extra=_legs(m)),
    "input_jacobian": lambda *settings: layer(*settings).jacobian("x"),
    "weight_jacobian": lambda *settings: layer(*settings).jacobian("weight"),
    "kfac_expand": partial(_input_factor, diagrams.kfac_expand, diagrams.kfac_expand_transpose),
    "kfac_reduce": partial(_input_factor, diagrams.kfac_reduce, diagrams.kfac_reduce_transpose),
    "mean_patches": partial(_of_patches, diagrams.mean_patches, diagrams.mean_patches_transpose),
    "grad_expand": partial(_grad_factor, diagrams.grad_expand),
    "grad_reduce": partial(_grad_factor, diagrams.grad_reduce),
    "gradient_dots": _of_gradients(diagrams.gradient_dots),
    "ntk_block": lambda m, other_m, shape, other_shape, *settings: diagrams.ntk_block(
        layer(shape, *settings),
        layer(other_shape, *settings),
        vectors=m,
        other_vectors=other_m,
    ),
    "gradient_norms": _of_gradients(diagrams.gradient_norms),
    "ggn_diagonal": _of_gradients(diagrams.ggn_diagonal),
    "per_sample_ggn_diagonal": _of_gradients(diagrams.ggn_diagonal, per_sample=True),
    "ggn_block": _of_gradients(diagrams.ggn_block),
    "ggn_vector_product": _of_gradients(diagrams.ggn_vector_product),
    "input_diagonal_vjp": lambda *settings: diagrams.diagonal_vjp(layer(*settings), "x"),
    "weight_diagonal_vjp": lambda *settings: diagrams.diagonal_vjp(layer(*settings), "weight"),
    "input_hessian_vjp": lambda *settings: diagrams.hessian_vjp(layer(*settings), "x"),
    "weight_hessian_vjp": lambda *settings: diagrams.hessian_vjp(layer(*settings), "weight"),
}
