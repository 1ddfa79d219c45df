"""Average pooling: the patches of an input, summed over their taps, and how many entries count."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import prod

import torch

from tnconv.diagrams.affine import Tensor, View
from tnconv.diagrams.geometry import Geometry, geometry
from tnconv.diagrams.hyperparameters import (
    Hyperparameters,
    IntOrTuple,
    Padding,
    checked_shape,
    paddings,
    per_dimension,
)
from tnconv.diagrams.layer_networks import patches
from tnconv.diagrams.network import TensorNetwork

Counts = tuple[tuple[int, ...], ...]


def avg_pool(
    input_shape: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = None,
    padding: Padding = 0,
    divisor_override: int | None = None,
    *,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> TensorNetwork:
    """``y[n, c, o] = 1/K[o] Σ_{k,i} x[n, c, i] Π[k, o, i]``: the patches, summed over their taps.

    Operand ``x`` of shape ``(n, c, *i)`` or ``(c, *i)``; hyper-parameters as in
    ``torch.nn.functional.avg_pool2d``, for any number of dimensions. The scale 1/K is exact where
    all windows count alike (always with ``divisor_override``); elsewhere it is the operand
    ``reciprocal_counts`` of shape ``(*o)``, which `reciprocal_counts` computes of `pool_counts`.

    >>> avg_pool((8, 3, 32, 32), 2).shape
    (8, 3, 16, 16)
    >>> avg_pool((8, 3, 32, 32), 3, 2, 1, count_include_pad=False).operands["reciprocal_counts"]
    (16, 16)

    Args:
        input_shape: of operand ``x``, with or without batch.
        kernel_size: taps of a window: an int, or one for each spatial dimension.
        stride: distance of neighbouring windows, by default the kernel size.
        padding: zeros around the input: ints, (left, right) pairs, "same" or "valid".
        divisor_override: what sums are divided by instead of the number of entries.
        ceil_mode: whether a last window may end outside of the input.
        count_include_pad: whether padding counts in the means.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    h, counts = _pooling(input_shape, kernel_size, stride, padding, ceil_mode, count_include_pad)
    if divisor_override == 0:
        raise ValueError("divisor_override is 0; expected another int, or None")
    pooled = patches(h).marginal(*h.legs("k"))
    pooled = pooled.with_(result=View.of(h.sizes, *h.samples, ("g", "c"), *h.legs("o")))
    if divisor_override is not None:
        return pooled.scaled(Fraction(1, divisor_override))
    if all(len(set(each)) == 1 for each in counts):
        entries = prod(each[0] for each in counts)
        return pooled.scaled(Fraction(1, entries) if entries else 0)
    weights = Tensor("reciprocal_counts", View.of(h.sizes, *h.legs("o")))
    return pooled.with_((*pooled.nodes, weights))


def pool_counts(
    input_shape: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = None,
    padding: Padding = 0,
    *,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Counts:
    """How many entries each window of `avg_pool` counts, per dimension: K is their product.

    >>> pool_counts((3, 5), (3,), 2, 1, count_include_pad=False)
    ((2, 3, 2),)

    Args:
        input_shape: of operand ``x``, with or without batch.
        kernel_size: taps of a window: an int, or one for each spatial dimension.
        stride: distance of neighbouring windows, by default the kernel size.
        padding: zeros around the input: ints, (left, right) pairs, "same" or "valid".
        ceil_mode: whether a last window may end outside of the input.
        count_include_pad: whether padding counts in the means.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    return _pooling(input_shape, kernel_size, stride, padding, ceil_mode, count_include_pad)[1]


def reciprocal_counts(
    counts: Counts, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> torch.Tensor:
    """``1 / K[o]`` of shape ``(*o)``, for the operand of `avg_pool`; 0 for windows without entries.

    >>> reciprocal_counts(pool_counts((3, 5), (3,), 2, 1, count_include_pad=False)) * 6
    tensor([3., 2., 3.])
    """
    total = torch.ones((), dtype=torch.float64)
    for each in counts:
        total = total.unsqueeze(-1) * torch.tensor(each, dtype=torch.float64)
    value = torch.where(total > 0, 1 / total, 0.0)
    return value.to(dtype=dtype or torch.get_default_dtype(), device=device)


def _pooling(
    input_shape: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None,
    padding: Padding,
    ceil_mode: bool,
    count_include_pad: bool,
) -> tuple[Geometry, Counts]:
    """The geometry and the counts per dimension.

    With ``ceil_mode`` a last window may begin inside the input or its left padding and end outside;
    what lies outside of the right padding never counts.
    """
    shape = checked_shape("input", input_shape)
    dims = len(kernel_size) if isinstance(kernel_size, Sequence) else len(shape) - 2
    kernels = per_dimension("kernel_size", kernel_size, dims, 1)
    strides = per_dimension("stride", kernels if stride is None else stride, dims, 1)
    pads = paddings(padding, kernels, strides, (1,) * dims)
    wide = [
        (left, right + (s - 1 if ceil_mode else 0))
        for (left, right), s in zip(pads, strides, strict=True)
    ]
    h = geometry(shape, kernels, Hyperparameters(strides, wide))
    windows = tuple(
        replace(w, output=min(w.output, -(-(w.input + w.padding) // w.stride))) if ceil_mode else w
        for w in h.windows
    )
    counts: list[tuple[int, ...]] = []
    for w, (left, right) in zip(windows, pads, strict=True):
        low, high = (-left, w.input + right) if count_include_pad else (0, w.input)
        starts = range(-left, w.stride * w.output - left, w.stride)
        ends = [(max(low, start), min(high, start + w.kernel)) for start in starts]
        counts.append(tuple(max(0, stop - start) for start, stop in ends))
    return replace(h, windows=windows), tuple(counts)
