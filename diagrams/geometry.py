"""The sizes of a convolution: its hyper-parameters and shapes, checked once and fitted together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from tnconv.diagrams.affine import Leg, Pattern, index_pattern
from tnconv.diagrams.hyperparameters import (
    Hyperparameters,
    IntOrTuple,
    checked_shape,
    paddings,
    per_dimension,
)


@dataclass(frozen=True)
class Window:
    """One spatial dimension: ``Π[k, o, i] = [i = s·o + d·k - p]`` and the sizes of its legs."""

    input: int
    kernel: int
    output: int
    stride: int
    dilation: int
    padding: int

    def pattern(self, k: Leg, o: Leg, i: Leg) -> Pattern:
        return index_pattern(k, o, i, self.stride, self.dilation, self.padding)


@dataclass(frozen=True)
class Geometry:
    """A convolution's sizes. Channels are per group; ``batch`` is None for unbatched input.

    Legs: n batch, g group, c in-channel, d out-channel, and i1.., o1.., k1.. per dimension. If
    ``transposed``, input and output positions exchange their roles in the windows' patterns.
    """

    batch: int | None
    groups: int
    in_channels: int
    windows: tuple[Window, ...]
    out_channels: int = 1
    transposed: bool = False

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
        narrow, wide = ("i", "o") if self.transposed else ("o", "i")
        return tuple(
            w.pattern(f"k{at}", f"{narrow}{at}", f"{wide}{at}")
            for at, w in enumerate(self.windows, 1)
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
    input_shape: Sequence[int], kernel_size: IntOrTuple, h: Hyperparameters | None = None
) -> Geometry:
    """The sizes of a convolution of an input of shape ``(n, g·c, *i)`` or ``(g·c, *i)``.

    A tuple ``kernel_size`` has one entry per spatial dimension; with an int all dimensions of
    ``input_shape`` after batch and channels are spatial.

    Raises:
        ValueError: sizes that do not fit together or that give no output.
        TypeError: a hyper-parameter that is no int, tuple or (for padding) string.
    """
    h = h or Hyperparameters()
    batch, channels, spatial, kernels = _sizes(input_shape, kernel_size, h.groups)
    if h.transposed and isinstance(h.padding, str):
        raise ValueError(f"padding is {h.padding!r}; expected ints or pairs when transposed")
    dims = len(kernels)
    strides = per_dimension("stride", h.stride, dims, 1)
    dilations = per_dimension("dilation", h.dilation, dims, 1)
    pads = paddings(h.padding, kernels, strides, dilations)
    extra = per_dimension("output_padding", h.output_padding, dims, 0)
    if any(extra) and not h.transposed:
        raise ValueError(f"output_padding is {h.output_padding!r}; expected 0 unless transposed")
    more = extra if h.transposed else [None] * dims
    each = zip(range(1, dims + 1), spatial, kernels, strides, dilations, pads, more, strict=True)
    windows = tuple(_window(*settings) for settings in each)
    return Geometry(batch, h.groups, channels, windows, transposed=h.transposed)


def layer_geometry(
    input_shape: Sequence[int], weight_shape: Sequence[int], h: Hyperparameters | None = None
) -> Geometry:
    """`geometry` with the kernel of a weight of shape ``(g·d, c, *k)``.

    If transposed, of shape ``(g·c, d, *k)``.

    Raises:
        ValueError: as `geometry`, or a weight that does not fit the input or the groups.
    """
    h = h or Hyperparameters()
    weight = checked_shape("weight", weight_shape)
    if len(weight) < 2:
        expected = "(in, out / groups" if h.transposed else "(out, in / groups"
        raise ValueError(f"weight has shape {weight}; expected {expected}, *kernel_size)")
    found = geometry(input_shape, weight[2:], h)
    if h.transposed:
        place, channels = 0, h.groups * found.in_channels
    else:
        place, channels = 1, found.in_channels
    if weight[place] != channels:
        raise ValueError(
            f"weight has shape {weight}; expected {channels} channels in dimension {place} for "
            f"input {tuple(input_shape)} and groups={h.groups}"
        )
    if not h.transposed and weight[0] % h.groups:
        raise ValueError(f"groups={h.groups} does not divide the {weight[0]} output channels")
    return replace(found, out_channels=weight[1] if h.transposed else weight[0] // h.groups)


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


def _window(
    dim: int,
    size: int,
    kernel: int,
    stride: int,
    dilation: int,
    pad: tuple[int, int],
    extra: int | None,
) -> Window:
    """One dimension's sizes; with ``extra`` outputs on the right if it is a transposed one's."""
    span = dilation * (kernel - 1) + 1
    if extra is None:
        output = (size + sum(pad) - span) // stride + 1
    elif extra < max(stride, dilation):
        output = (size - 1) * stride - sum(pad) + span + extra
    else:
        raise ValueError(
            f"dimension {dim} has output_padding {extra}, stride {stride} and dilation {dilation}; "
            "expected an output_padding smaller than one of the others"
        )
    if output < 1:
        raise ValueError(
            f"dimension {dim} has input size {size}, padding {pad} and a kernel of span {span}, "
            f"which gives output size {output}; expected at least 1"
        )
    return Window(size, kernel, output, stride, dilation, pad[0])
