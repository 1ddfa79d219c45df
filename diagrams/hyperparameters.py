"""The hyper-parameters of a convolution: one value inside, torch's keywords outside."""

from collections.abc import Sequence
from typing import NamedTuple

IntOrTuple = int | Sequence[int]
Padding = int | str | Sequence[int] | Sequence[tuple[int, int]]


class Hyperparameters(NamedTuple):
    """Everything about a convolution but its sizes, as torch's keywords give it.

    Which values are legal depends on the number of dimensions: `tnconv.diagrams.geometry`
    checks them against the shapes.

    Args:
        stride: distance between windows; of output positions if transposed.
        padding: zeros on both sides, as an int, one int or (left, right) pair for each dimension,
            or "same" or "valid".
        dilation: distance between taps.
        groups: number of groups of channels that see nothing of each other.
        transposed: whether input and output positions exchange their roles.
        output_padding: further outputs on the right of a transposed convolution.
    """

    stride: IntOrTuple = 1
    padding: Padding = 0
    dilation: IntOrTuple = 1
    groups: int = 1
    transposed: bool = False
    output_padding: IntOrTuple = 0


Values = tuple[IntOrTuple, Padding, IntOrTuple, int, bool, IntOrTuple]
"""The fields of `Hyperparameters` as a plain tuple, by which calls look their programs up: making
an object at every call takes 1.3 microseconds after a kernel has emptied the caches."""


def checked_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """``shape`` as a tuple; a tensor in its place is refused without showing its contents.

    Raises:
        TypeError: no sequence of ints.
    """
    if not isinstance(shape, Sequence):
        raise TypeError(f"{name} shape is a {type(shape).__name__}; expected a tuple of ints")
    for size in shape:
        if not isinstance(size, int):
            raise TypeError(f"{name} shape has a {type(size).__name__} in it; expected ints")
    return tuple(shape)


def per_dimension(name: str, value: IntOrTuple, dims: int, least: int) -> tuple[int, ...]:
    """An int (or a sequence of one) for all dimensions, or one int for each; at least ``least``.

    Args:
        name: the argument's name, for messages.
        value: what was given.
        dims: the number of dimensions.
        least: the smallest value that is allowed.

    Raises:
        ValueError: another number of entries, or an entry that is too small.
        TypeError: no int or sequence of ints.
    """
    values = (value,) * dims if isinstance(value, int) else value
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} is {value!r}; expected an int or {dims} ints")
    if not all(isinstance(v, int) for v in values):
        raise TypeError(f"{name} is {value!r}; expected an int or {dims} ints")
    values = tuple(values) * dims if len(values) == 1 else values  # as in torch
    if len(values) != dims or any(v < least for v in values):
        raise ValueError(f"{name} is {value!r}; expected an int or {dims} ints, at least {least}")
    return tuple(values)


def paddings(
    padding: Padding, kernels: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[tuple[int, int]]:
    """Left and right padding per dimension; 'same' puts an odd rest to the right, as torch does.

    Args:
        padding: in any form that `Hyperparameters` takes.
        kernels: the kernel's size in each dimension.
        strides: one for each dimension.
        dilations: one for each dimension.

    Raises:
        ValueError: another string, a negative padding, or not one for each dimension.
        TypeError: a padding that is no int, sequence or string.
    """
    dims = len(kernels)
    if padding == "valid":
        return [(0, 0)] * dims
    if padding == "same":
        if any(s != 1 for s in strides):
            raise ValueError(f"padding='same' has stride {tuple(strides)}; expected stride 1")
        totals = [d * (k - 1) for k, d in zip(kernels, dilations, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    if isinstance(padding, str):
        raise ValueError(f"padding is {padding!r}; expected 'same', 'valid', ints or pairs")
    if isinstance(padding, Sequence) and padding and not isinstance(padding[0], int):
        pairs = [per_dimension("padding", pair, 2, 0) for pair in padding]  # type: ignore[arg-type]
        if len(pairs) != dims:
            raise ValueError(f"padding is {padding!r}; expected {dims} (left, right) pairs")
        return [(left, right) for left, right in pairs]
    return [(p, p) for p in per_dimension("padding", padding, dims, 0)]  # type: ignore[arg-type]
