"""Randomised vector-Jacobian products: only some positions of some legs count.

``index`` lists positions for legs of the layer by name: ``n`` (batch), ``g`` (groups), ``c`` and
``d`` (in- and out-channels of a group), ``i1, i2, ...``, ``o1, o2, ...`` and ``k1, k2, ...``
(positions of input, output and kernel). A position counts as often as it is listed; time and
memory fall with the number of positions of the legs that are not spatial.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch

from tnconv.diagrams import Expression, Leg, Sum, TensorNetwork
from tnconv.diagrams.hyperparameters import IntOrTuple, Padding
from tnconv.functional.lookup import legs, of_layer, several
from tnconv.functional.scales import Number, Ratio, exact, ratio

Samples = tuple[tuple[Leg, int], ...]


def sampled_weight_vjp(
    x: torch.Tensor,  # (n, g·c, *i) or (g·c, *i)
    weight_shape: Sequence[int],  # (g·d, c, *k)
    grad_output: torch.Tensor,  # (n, g·d, *o) or (m, n, g·d, *o)
    index: Mapping[Leg, torch.Tensor],  # of shape (r,) and dtype int64 each
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
    scale: Number | None = None,
) -> torch.Tensor:
    """``dw[gd, c, k] = scale · Σ_{r,n,o,i} [index[r] = c] x[n, gc, i] Π[k, o, i] v[n, gd, o]``.

    And so for every leg in ``index``. By default ``scale`` is size over number of positions, for
    each: then the mean over positions drawn uniformly, with or without replacement, is
    `weight_vjp`. If each is kept with probability p, ``scale`` is 1 / p for each leg.

    >>> rows = {"n": torch.tensor([5, 2]), "c": torch.tensor([0])}
    >>> x, v = torch.rand(8, 3, 32, 32), torch.rand(8, 4, 30, 30)
    >>> sampled_weight_vjp(x, (4, 3, 3, 3), v, rows).shape
    torch.Size([4, 3, 3, 3])

    Args:
        x: The layer's input.
        weight_shape: The shape of the layer's weight.
        grad_output: Cotangents of the layer's output, such as the loss's gradient.
        index: For each sampled leg the positions that count.
        stride: The distance of neighbouring windows, for all dimensions or for each.
        padding: Zeros around the input: a number, one or a pair per dimension, "same" or "valid".
        dilation: The distance of neighbouring taps of a window, for all dimensions or for each.
        groups: How many groups of channels there are, each with a kernel of its own.
        transposed: Whether the layer is a transposed convolution.
        output_padding: Outputs that a transposed convolution adds at the end of dimensions.
        scale: What the result is multiplied with; by default size over number, as above.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output, an index
            of a leg that the layer does not have, or that is no vector of integers, or an empty
            one without a scale.
    """
    h = (stride, padding, dilation, groups, transposed, output_padding)
    listed, vectors = _listed(index, scale), several(grad_output, x.dim())
    samples = tuple((leg, positions.shape[0]) for leg, positions in listed.items())
    operands = (x, grad_output, *listed.values())
    number = None if scale is None else ratio(scale)
    return _sampled_weight_vjp(operands, x.shape, weight_shape, h, vectors, samples, number)


def sampled_input_vjp(
    input_shape: Sequence[int],  # (n, g·c, *i) or (g·c, *i)
    weight: torch.Tensor,  # (g·d, c, *k)
    grad_output: torch.Tensor,  # (n, g·d, *o) or (m, n, g·d, *o)
    index: Mapping[Leg, torch.Tensor],  # of shape (r,) and dtype int64 each
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
    scale: Number | None = None,
) -> torch.Tensor:
    """``dx[n, gc, i] = scale · Σ_{r,d,k,o} [index[r] = d] w[gd, c, k] Π[k, o, i] v[n, gd, o]``.

    And so for every leg in ``index``, with ``scale`` as in `sampled_weight_vjp`.

    >>> out_channels = {"d": torch.tensor([3, 1])}
    >>> weight, v = torch.rand(4, 3, 3, 3), torch.rand(8, 4, 30, 30)
    >>> sampled_input_vjp((8, 3, 32, 32), weight, v, out_channels).shape
    torch.Size([8, 3, 32, 32])

    Args:
        input_shape: The shape of the layer's input.
        weight: The layer's weight.
        grad_output: Cotangents of the layer's output, such as the loss's gradient.
        index: For each sampled leg the positions that count.
        stride: The distance of neighbouring windows, for all dimensions or for each.
        padding: Zeros around the input: a number, one or a pair per dimension, "same" or "valid".
        dilation: The distance of neighbouring taps of a window, for all dimensions or for each.
        groups: How many groups of channels there are, each with a kernel of its own.
        transposed: Whether the layer is a transposed convolution.
        output_padding: Outputs that a transposed convolution adds at the end of dimensions.
        scale: What the result is multiplied with; by default size over number, as above.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output, an index
            of a leg that the layer does not have, or that is no vector of integers, or an empty
            one without a scale.
    """
    h = (stride, padding, dilation, groups, transposed, output_padding)
    listed, vectors = _listed(index, scale), several(grad_output, len(input_shape))
    samples = tuple((leg, positions.shape[0]) for leg, positions in listed.items())
    operands = (grad_output, weight, *listed.values())
    number = None if scale is None else ratio(scale)
    return _sampled_input_vjp(operands, input_shape, weight.shape, h, vectors, samples, number)


def _listed(index: Mapping[Leg, torch.Tensor], scale: Number | None) -> dict[Leg, torch.Tensor]:
    """The positions of each leg, checked, in one order."""
    for leg, positions in index.items():
        if positions.dim() != 1 or positions.dtype != torch.int64:
            raise ValueError(
                f"index of {leg!r} has shape {tuple(positions.shape)} and dtype "
                f"{positions.dtype}; expected (r,) and torch.int64"
            )
        if scale is None and positions.shape[0] == 0:
            raise ValueError(f"index of {leg!r} is empty; expected positions, or a scale")
    return {leg: index[leg] for leg in sorted(index)}


@of_layer
def _sampled_weight_vjp(
    layer: TensorNetwork, vectors: int | None, samples: Samples, scale: Ratio | None
) -> Expression:
    return _sampled(layer.vjp("weight", extra=legs(vectors)), layer, samples, scale)


@of_layer
def _sampled_input_vjp(
    layer: TensorNetwork, vectors: int | None, samples: Samples, scale: Ratio | None
) -> Expression:
    return _sampled(layer.vjp("x", extra=legs(vectors)), layer, samples, scale)


def _sampled(product: Sum, layer: TensorNetwork, samples: Samples, scale: Ratio | None) -> Sum:
    """A vector-Jacobian product in which legs count at as many positions as ``samples`` says."""
    unbiased = Fraction(1)
    for leg, length in samples:
        product = product.sampled(leg, length)
        unbiased *= Fraction(layer.sizes[leg], length) if scale is None else 1
    return product.scaled(unbiased if scale is None else exact(scale))
