"""Hyper-parameters of a convolution: parsed and checked once, then carried as one value."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from tnconv.diagrams.affine import Leg, Pattern, index_pattern

IntOrTuple = int | Sequence[int]
Padding = int | str | Sequence[int] | Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Window:
    """One spatial dimension: ``Π[k, o, i] = [i = s·o + d·k - p]`` and the sizes of its legs.

    A transposed convolution has i and o in exchanged roles: ``[o = s·i + d·k - p]``.
    """

    input: int
    kernel: int
    output: int
    stride: int
    dilation: int
    padding: int
    transposed: bool = False

    def pattern(self, k: Leg, o: Leg, i: Leg) -> Pattern:
        wide, narrow = (o, i) if self.transposed else (i, o)
        return index_pattern(k, narrow, wide, self.stride, self.dilation, self.padding)


@dataclass(frozen=True)
class Geometry:
    """A convolution's sizes. Channels are per group; ``batch`` is None for unbatched input.

    Legs: n batch, g group, c in-channel, d out-channel, and i1.., o1.., k1.. per dimension.
    """

    batch: int | None
    groups: int
    in_channels: int
    windows: tuple[Window, ...]
    out_channels: int = 1

    @property
    def sizes(self) -> dict[Leg, int]:
        """The sizes of all legs but d."""
        sizes = {} if self.batch is None else {"n": self.batch}
        sizes |= {"g": self.groups, "c": self.in_channels}
        for at, w in enumerate(self.windows, 1):
            sizes |= {f"i{at}": w.input, f"o{at}": w.output, f"k{at}": w.kernel}
        return sizes

    @property
    def samples(self) -> tuple[Leg, ...]:
        """The batch leg, if there is one."""
        return () if self.batch is None else ("n",)

    def legs(self, letter: str) -> tuple[Leg, ...]:
        """The legs of one letter: ``legs("o")`` is ``("o1", "o2", ...)``."""
        return tuple(f"{letter}{at}" for at in range(1, len(self.windows) + 1))

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """One index pattern per spatial dimension."""
        return tuple(
            w.pattern(f"k{at}", f"o{at}", f"i{at}") for at, w in enumerate(self.windows, 1)
        )

    @property
    def patch(self) -> int:
        """The number of entries of one group's patch: channels times kernel positions."""
        return self.in_channels * prod(w.kernel for w in self.windows)

    @property
    def positions(self) -> int:
        """The number of output positions."""
        return prod(w.output for w in self.windows)


def geometry(
    input_shape: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> Geometry:
    """Parse torch's hyper-parameters for an input of shape ``(n, g·c, *i)`` or ``(g·c, *i)``.

    A tuple ``kernel_size`` has one entry per spatial dimension; with an int all dimensions of
    ``input_shape`` after batch and channels are spatial.

    Raises:
        ValueError: sizes that do not fit together or that give no output.
        TypeError: a hyper-parameter that is no int, tuple or (for padding) string.
    """
    batch, channels, spatial, kernels = _sizes(input_shape, kernel_size, groups)
    strides, dilations = _steps(stride, dilation, len(kernels))
    pads = paddings(padding, kernels, strides, dilations)
    each = (spatial, kernels, strides, dilations, pads, range(1, len(kernels) + 1))
    return Geometry(batch, groups, channels, tuple(map(_window, *each)))


def transposed_geometry(
    input_shape: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    output_padding: IntOrTuple = 0,
) -> Geometry:
    """`geometry` of a transposed convolution; ``output_padding`` extends the output to the right.

    Raises:
        ValueError: sizes that do not fit together or that give no output.
        TypeError: a hyper-parameter that is no int or tuple.
    """
    if isinstance(padding, str):
        raise ValueError(f"padding is {padding!r}; expected ints or pairs when transposed")
    batch, channels, spatial, kernels = _sizes(input_shape, kernel_size, groups)
    strides, dilations = _steps(stride, dilation, len(kernels))
    pads = paddings(padding, kernels, strides, dilations)
    extra = per_dimension("output_padding", output_padding, len(kernels), 0)
    each = (spatial, kernels, strides, dilations, pads, extra, range(1, len(kernels) + 1))
    return Geometry(batch, groups, channels, tuple(map(_transposed_window, *each)))


def _sizes(
    input_shape: Sequence[int], kernel_size: IntOrTuple, groups: int
) -> tuple[int | None, int, tuple[int, ...], tuple[int, ...]]:
    """Batch, channels per group, spatial sizes and kernel sizes."""
    shape = checked_shape("input", input_shape)
    dims = len(kernel_size) if isinstance(kernel_size, Sequence) else len(shape) - 2
    if len(shape) not in (dims + 1, dims + 2) or dims < 0:
        raise ValueError(
            f"input has shape {shape}; expected (batch, channels) or (channels,), then {dims} "
            f"spatial sizes"
        )
    batch, (channels, *spatial) = (None, shape) if len(shape) == dims + 1 else (shape[0], shape[1:])
    if not isinstance(groups, int):
        raise TypeError(f"groups is {groups!r}; expected an int")
    if groups < 1 or channels % groups:
        raise ValueError(f"groups={groups} does not divide the {channels} input channels")
    kernels = per_dimension("kernel_size", kernel_size, dims, 1)
    return batch, channels // groups, tuple(spatial), kernels


def _steps(
    stride: IntOrTuple, dilation: IntOrTuple, dims: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return per_dimension("stride", stride, dims, 1), per_dimension("dilation", dilation, dims, 1)


def layer_geometry(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> Geometry:
    """`geometry` with the kernel of a weight of shape ``(g·d, c, *k)``.

    Raises:
        ValueError: as `geometry`, or a weight that does not fit the input or the groups.
    """
    weight = _checked_weight("(out, in / groups, *kernel_size)", weight_shape)
    h = geometry(input_shape, weight[2:], stride, padding, dilation, groups)
    if weight[1] != h.in_channels:
        raise ValueError(
            f"weight has shape {weight}; expected {h.in_channels} channels in dimension 1 for "
            f"input {tuple(input_shape)} and groups={groups}"
        )
    if weight[0] % groups:
        raise ValueError(f"groups={groups} does not divide the {weight[0]} output channels")
    return replace(h, out_channels=weight[0] // groups)


def transposed_layer_geometry(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    output_padding: IntOrTuple = 0,
) -> Geometry:
    """`transposed_geometry` with the kernel of a weight of shape ``(g·c, d, *k)``.

    Raises:
        ValueError: as `transposed_geometry`, or a weight that does not fit the input.
    """
    weight = _checked_weight("(in, out / groups, *kernel_size)", weight_shape)
    h = transposed_geometry(
        input_shape, weight[2:], stride, padding, dilation, groups, output_padding
    )
    if weight[0] != groups * h.in_channels:
        raise ValueError(
            f"weight has shape {weight}; expected {groups * h.in_channels} channels in dimension "
            f"0 for input {tuple(input_shape)}"
        )
    return replace(h, out_channels=weight[1])


def _checked_weight(expected: str, weight_shape: Sequence[int]) -> tuple[int, ...]:
    weight = checked_shape("weight", weight_shape)
    if len(weight) < 2:
        raise ValueError(f"weight has shape {weight}; expected {expected}")
    return weight


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


def _window(
    size: int, kernel: int, stride: int, dilation: int, pad: tuple[int, int], dim: int
) -> Window:
    left, right = pad
    span = dilation * (kernel - 1) + 1
    if size + left + right < span:
        raise ValueError(
            f"dimension {dim} has input size {size}, padding {pad} and a kernel of span {span}; "
            "expected a padded input that the kernel fits in"
        )
    output = (size + left + right - span) // stride + 1
    return Window(size, kernel, output, stride, dilation, left)


def _transposed_window(
    size: int,
    kernel: int,
    stride: int,
    dilation: int,
    pad: tuple[int, int],
    extra: int,
    dim: int,
) -> Window:
    if extra >= max(stride, dilation):
        raise ValueError(
            f"dimension {dim} has output_padding {extra}, stride {stride} and dilation {dilation}; "
            "expected an output_padding smaller than one of the others"
        )
    output = (size - 1) * stride - sum(pad) + dilation * (kernel - 1) + extra + 1
    if output < 1:
        raise ValueError(
            f"dimension {dim} has input size {size}, kernel {kernel} and padding {pad}, which "
            f"gives output size {output}; expected at least 1"
        )
    return Window(size, kernel, output, stride, dilation, pad[0], transposed=True)
