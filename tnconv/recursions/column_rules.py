"""How several vectors go backwards through operations together, one rule per kind."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from tnconv.recursions.column_step import At, register_columns, register_columns_of_two
from tnconv.recursions.entrywise import ENTRYWISE
from tnconv.recursions.step import shape_of

aten = torch.ops.aten
Found = Sequence[Tensor | None]
VIEWS = "View UnsafeView Reshape ReshapeAlias Squeeze Unsqueeze Alias Clone Contiguous".split()
"""Entries stay in order."""
SLOPES = (
    "Tanh Sigmoid Silu Gelu Softplus Elu LeakyRelu RreluWithNoise Hardsigmoid Hardtanh Hardshrink"
    " Softshrink Clamp ClampMin ClampMax Abs Neg NativeDropout"
).split()
"""Functions of single entries, whose slopes are what the vector of ones becomes."""
BY_SAMPLE = (
    "AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D ConstantPadNd ReflectionPad1D"
    " ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D"
    " UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleLinear1D UpsampleBilinear2D"
    " UpsampleBicubic2D UpsampleTrilinear3D"
).split()
"""Operations on the last dimensions, of one tensor."""


def _shape(node: Any, at: int | None = None) -> tuple[int, ...]:
    """The shape of an input, or that of the result."""
    if at is None:
        return tuple(node._input_metadata[0].shape)
    return shape_of(*node.next_functions[at])


def as_large(node: Any, wants: Sequence[bool]) -> bool:
    """Whether nothing was broadcast."""
    return all(_shape(node, at) == _shape(node) for at, want in enumerate(wants) if want)


def has_channels(node: Any, wants: Sequence[bool]) -> bool:
    """Whether dimension 0 is no position."""
    return wants[0] and not any(wants[1:]) and len(_shape(node)) > 2


@register_columns(*VIEWS)
def viewed(at: At, v: Tensor) -> Found:
    """As many entries of every sample as before."""
    return (v.reshape(v.shape[0], *at.shape()),)


@register_columns("Relu")
def relu(at: At, v: Tensor) -> Found:
    """``v [y > 0]``."""
    y = at.saved("result")
    if at.mine:
        return (aten.threshold_backward.grad_input(v, y, 0, grad_input=v),)
    return (aten.threshold_backward(v, y, 0),)


@register_columns(*ENTRYWISE, *SLOPES, fits=lambda node, wants: wants[0] and not any(wants[1:]))
def sloped(at: At, v: Tensor) -> Found:
    """``f' v``."""
    ones = torch.ones(_shape(at.node), dtype=v.dtype, device=v.device)
    return (v * at.rows.of(at.pulled(ones)),)


@register_columns("Add", "Sub", fits=as_large)
def add(at: At, v: Tensor) -> Found:
    """``a ± α b``."""
    alpha = at.node._saved_alpha
    minus = -1 if at.node.name().startswith("Sub") else 1
    factors = (1, minus * alpha)
    return [
        None if not want else (v if factor == 1 else factor * v)
        for want, factor in zip(at.wants, factors, strict=False)
    ]


@register_columns("Mul", fits=as_large)
def mul(at: At, v: Tensor) -> Found:
    """``a b``; the other one can have fewer dimensions, or be a number."""
    return [
        v * at.broadcast(f"_saved_{other}") if want else None
        for want, other in zip(at.wants, ("other", "self"), strict=False)
    ]


@register_columns("Div", fits=lambda node, wants: as_large(node, wants) and not any(wants[1:]))
def div(at: At, v: Tensor) -> Found:
    """``a / b``."""
    return (v / at.broadcast("_saved_other"),)


@register_columns("ToCopy")
def cast(at: At, v: Tensor) -> Found:
    """Another dtype or device."""
    node, nr = at.node.next_functions[0]
    before = node._input_metadata[nr]
    return (v.to(before.device, before.dtype),)


@register_columns("Addmm", fits=lambda node, wants: wants == (False, True, False))
def addmm(at: At, v: Tensor) -> Found:
    """``β b + α x w``."""
    found = v @ at.node._saved_mat2.t()
    alpha = at.node._saved_alpha
    return (None, found if alpha == 1 else alpha * found, None)


@register_columns("Mm", fits=lambda node, wants: wants == (True, False))
def mm(at: At, v: Tensor) -> Found:
    """``x w``."""
    return (v @ at.node._saved_mat2.t(), None)


@register_columns("Bmm")
def bmm(at: At, v: Tensor) -> Found:
    """``x[b] w[b]``, with b some rows of every sample."""
    x = v @ at.saved("mat2").mT if at.wants[0] else None
    return x, at.saved("self").mT @ v if at.wants[1] else None


@register_columns("Convolution", fits=lambda node, wants: wants == (True, False, False))
def convolution(at: At, v: Tensor) -> Found:
    """The input gradient: as a transposed convolution, where it needs no input, not even a copy."""
    node, flat, shape = at.node, v.flatten(0, 1), at.shape()
    w, groups, dims = node._saved_weight, node._saved_groups, len(shape) - 2
    given = node._saved_stride, node._saved_padding, node._saved_dilation
    stride, padding, dilation = (_by_side(numbers, dims) for numbers in given)
    sizes = zip(shape[2:], v.shape[3:], w.shape[2:], stride, padding, dilation, strict=True)
    missing = [i - ((o - 1) * s - 2 * p + d * (k - 1) + 1) for i, o, k, s, p, d in sizes]
    if not node._saved_transposed and all(
        0 <= more < max(s, d) for more, s, d in zip(missing, stride, dilation, strict=True)
    ):
        how = stride, padding, dilation, True, missing, groups
        found = aten.convolution(flat, w, None, *how)
    else:
        like = v.new_empty(1).expand(len(flat), *shape[1:])
        how = stride, padding, dilation, node._saved_transposed, node._saved_output_padding, groups
        only = [True, False, False]
        found = aten.convolution_backward(flat, like, w, None, *how, only)[0]
    return (found.reshape(v.shape[0], *shape), None, None)


def _by_side(numbers: Sequence[int], dims: int) -> list[int]:
    """A number for each side, where one was given for all."""
    return [*numbers] * dims if len(numbers) == 1 else [*numbers]


@register_columns("MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D",
                  "AdaptiveMaxPool3D", fits=lambda node, wants: len(_shape(node)) > 3)  # fmt: skip
def max_pool(at: At, v: Tensor) -> Found:
    """``v`` at the positions of the maxima, zero elsewhere; of one vector by torch's own kernel."""
    same = v.dtype == at.node._input_metadata[0].dtype
    if len(v) == 1 and at.rows.chosen is None and same:
        return (at.pulled(v[0]).unsqueeze(0),)
    shape = at.shape()
    found = v.new_zeros(v.shape[0], shape[0], shape[1], prod(shape[2:]))
    chosen = _maxima(at).flatten(2).expand(v.shape[0], *[-1] * 3)
    return (found.scatter_add_(3, chosen, v.flatten(3)).reshape(v.shape[0], *shape),)


@register_columns_of_two(max_pool, relu)
def max_pool_of_relu(at: At, v: Tensor) -> Found:
    """``v [y > 0]`` with y the maxima: ReLU's mask at the size after pooling, which is smaller."""
    chosen = _maxima(at)
    y = at.saved("self").flatten(2).gather(2, chosen.flatten(2)).reshape(chosen.shape)
    return max_pool(at, aten.threshold_backward(v, y, 0))


def _maxima(at: At) -> Tensor:
    """The positions of the maxima that max-pooling saved."""
    return at.saved("result1" if hasattr(at.node, "_saved_result1") else "indices")


@register_columns("NativeBatchNorm", fits=lambda node, wants: wants == (True, False, False)
                  and not node._saved_training)  # fmt: skip
def batch_norm(at: At, v: Tensor) -> Found:
    """By constants: a factor for every channel."""
    node = at.node
    factor = (node._saved_running_var + node._saved_eps).rsqrt()
    if node._saved_weight is not None:
        factor = factor * node._saved_weight
    factor = factor.to(v.dtype).reshape(-1, *[1] * (v.dim() - 3))
    return ((v.mul_(factor) if at.mine else v * factor), None, None)


@register_columns("NativeLayerNorm", fits=lambda node, wants: wants == (True, False, False)
                  and len(node._saved_normalized_shape) < len(_shape(node)))  # fmt: skip
def layer_norm(at: At, v: Tensor) -> Found:
    """``(u - mean u - y mean(u y)) / σ`` with ``u = w v`` and y normalised."""
    node = at.node
    dims = tuple(range(-len(node._saved_normalized_shape), 0))
    x, mean, rstd = at.saved("input"), at.saved("result1"), at.saved("result2")
    y = (x - mean) * rstd
    u = v if node._saved_weight is None else v * node._saved_weight
    along = (u * y).mean(dims, keepdim=True)
    return ((u - u.mean(dims, keepdim=True) - y * along) * rstd, None, None)


@register_columns("Softmax", "SafeSoftmax", fits=lambda node, wants: _dim(node) > 0)
def softmax(at: At, v: Tensor) -> Found:
    """``y (v - Σ v y)``."""
    y, dim = at.saved("result"), _dim(at.node)
    return (y * (v - (v * y).sum(dim + 1, keepdim=True)),)


@register_columns("LogSoftmax", fits=lambda node, wants: _dim(node) > 0)
def log_softmax(at: At, v: Tensor) -> Found:
    """``v - exp(y) Σ v``."""
    return (v - at.saved("result").exp() * v.sum(_dim(at.node) + 1, keepdim=True),)


@register_columns("Transpose", fits=lambda node, wants: 0 not in _swapped(node))
def transpose(at: At, v: Tensor) -> Found:
    """Dimension 0 stays."""
    one, two = _swapped(at.node)
    return (v.transpose(one + 1, two + 1),)


@register_columns("Permute", fits=lambda node, wants: _order(node)[0] == 0)
def permute(at: At, v: Tensor) -> Found:
    """Dimension 0 stays."""
    order = _order(at.node)
    return (v.permute(0, *[order.index(dim) + 1 for dim in range(len(order))]),)


@register_columns("Cat", fits=lambda node, wants: _dim(node) > 0
                  and all(end is not None for end, _ in node.next_functions))  # fmt: skip
def cat(at: At, v: Tensor) -> Found:
    """Parts of a dimension that is not the batch."""
    dim = _dim(at.node)
    sizes = [_shape(at.node, k)[dim] for k in range(len(at.wants))]
    return [p if w else None for w, p in zip(at.wants, torch.split(v, sizes, dim + 1), strict=True)]


@register_columns("Expand", fits=lambda node, wants: len(_shape(node, 0)) == len(_shape(node))
                  and _shape(node, 0)[0] == _shape(node)[0])  # fmt: skip
def expanded(at: At, v: Tensor) -> Found:
    """Sums over what was broadcast, which was not the batch."""
    return (v.sum_to_size(v.shape[0], *at.shape()),)


@register_columns("Mean", "Sum", fits=lambda node, wants: _keeps_first(node))
def reduced(at: At, v: Tensor) -> Found:
    """Every entry of a sum has the same vector."""
    node, shape = at.node, at.shape()
    dims = sorted(d % len(shape) for d in _signed(node._saved_dim))
    if not node._saved_keepdim:
        for dim in dims:
            v = v.unsqueeze(dim + 1)
    if node.name().startswith("Mean"):
        v = v / prod(shape[dim] for dim in dims)
    return (v.expand(v.shape[0], *shape),)


@register_columns(*BY_SAMPLE, fits=has_channels)
def by_sample(at: At, v: Tensor) -> Found:
    """Every vector by itself."""
    return at.each(v)


def _dim(node: Any) -> int:
    (dim,) = _signed([node._saved_dim])
    return dim % len(_shape(node))


def _swapped(node: Any) -> tuple[int, int]:
    one, two = _signed([node._saved_dim0, node._saved_dim1])
    dims = len(_shape(node))
    return one % dims, two % dims


def _order(node: Any) -> list[int]:
    dims = len(_shape(node))
    return [dim % dims for dim in _signed(node._saved_dims)]


def _signed(dims: Sequence[int]) -> list[int]:
    """What torch gives as numbers without a sign."""
    return [dim if dim < 2**63 else dim - 2**64 for dim in dims]


def _keeps_first(node: Any) -> bool:
    if not hasattr(node, "_saved_dim") or not node._saved_dim:
        return False
    before = len(_shape(node, 0))
    return all(dim % before for dim in _signed(node._saved_dim))
