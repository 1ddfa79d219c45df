"""Layouts: the strides of tensors, as torch chooses them, and the loops of a copy."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile
from math import prod
from typing import Literal

from tnconv.codegen.prices import cost

Ints = tuple[int, ...]
Layout = Literal["any", "contiguous", "channels last"]
"""Of a result: the strides of the last two are those of torch's memory formats of these names."""
KEPT = 2**14  # answers in memory: a search asks for the same ones over and over


def contiguous(shape: Sequence[int]) -> Ints:
    """The strides of a contiguous tensor.

    >>> contiguous((2, 3, 4))
    (12, 4, 1)
    """
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= size
    return tuple(reversed(strides))


def channels_last(shape: Sequence[int]) -> Ints:
    """The strides of a tensor whose channels, dimension 1, lie innermost in memory.

    >>> channels_last((2, 3, 4, 5))
    (60, 1, 15, 3)
    """
    strides = contiguous([shape[dim] for dim in channels_moved(len(shape))])
    return (strides[0], strides[-1], *strides[1:-1])


def channels_moved(dims: int) -> Ints:
    """The order of dimensions that has channels, dimension 1, last."""
    return (0, *range(2, dims), 1)


def is_channels_last(shape: Ints, strides: Ints) -> bool:
    """Whether torch's kernels for images and volumes take a tensor as channels last.

    They then write their results so. As in torch's ``suggest_memory_format``, entries may lie
    apart.
    """
    if len(shape) not in (4, 5) or strides[1] == 0 or 0 in shape:
        return False
    least = 0
    for dim in reversed(channels_moved(len(shape))):
        if strides[dim] < least or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim] * (shape[dim] if shape[dim] > 1 else 1)
    return True


def run(shape: Ints, strides: Ints) -> int:
    """The length of the contiguous runs in which a copy reads."""
    length = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != length:
            return length
        length *= size
    return length


@cost.remembered
def innermost(shape: Ints, strides: Ints) -> tuple[int, int, int, int]:
    """The inner loops of a copy: entries of a row, their step, and rows.

    The last number counts the entries that are read in turn and fall into one cache set.
    """
    loops: list[tuple[int, int]] = []
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1:
            length, step = loops[-1] if loops else (1, stride)
            if stride == length * step:
                loops[-1:] = [(length * size, step)]
            else:
                loops.append((size, stride))
    (row, step), (rows, _) = (*loops, (1, 1), (1, 1))[:2]
    competing = takewhile(lambda loop: cost.conflicts(loop[1]), loops)
    return row, step, rows, prod(size for size, _ in competing)


@lru_cache(KEPT)
def of_a_view(shape: Ints, strides: Ints, new: Ints) -> Ints | None:
    """The strides of ``reshape(new)`` where it needs no copy."""
    if 0 in shape:
        return contiguous(new)
    chunks: list[tuple[int, int]] = []  # (size, innermost stride) of runs that merge
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if chunks and chunks[-1][1] == size * stride:
            chunks[-1] = (chunks[-1][0] * size, stride)
        else:
            chunks.append((size, stride))
    result: list[int] = []
    left, inner = 1, 1
    for size in reversed(new):
        if size == 1:
            result.append(inner)
            continue
        if left == 1:
            left, inner = chunks.pop()
        if left % size:
            return None
        result.append(inner)
        left, inner = left // size, inner * size
    return tuple(reversed(result))


def of_entries(shape: Sequence[int], operands: Sequence[Ints]) -> Ints:
    """The strides of what torch computes entry by entry, from operands that broadcast.

    Torch takes the dimensions from the last on, and exchanges each with those before it that lie
    further out: so it keeps the order of a single operand.

    Args:
        shape: The shape of the result.
        operands: The strides of each operand, 0 in dimensions in which it is repeated.
    """
    order = list(reversed(range(len(shape))))  # innermost first
    for last in range(1, len(order)):
        here = last
        for before in reversed(range(last)):
            further = _further_out(shape, order[before], order[here], operands)
            if further is None:
                continue
            if not further:
                break
            order[before], order[here] = order[here], order[before]
            here = before
    order.reverse()
    strides = dict(zip(order, contiguous([shape[dim] for dim in order]), strict=True))
    return tuple(strides[dim] for dim in range(len(order)))


def _further_out(
    shape: Sequence[int], dim: int, other: int, operands: Sequence[Ints]
) -> bool | None:
    """Whether the first operand that has both dimensions has ``dim`` outside, if one has."""
    for strides in operands:
        if strides[dim] and strides[other] and strides[dim] != strides[other]:
            return strides[dim] > strides[other]
        if strides[dim] and strides[other] and shape[dim] > shape[other]:
            return True
    return None
