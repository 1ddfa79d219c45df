"""The shapes of one of torch's convolutions, and the questions that its kernels ask about them."""

from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entries:
    """How many entries the image, the kernel and the output have."""

    x: int
    w: int
    y: int

    @property
    def moved(self) -> int:
        """What a kernel reads and writes."""
        return self.x + self.w + self.y

    def of(self, kind: str) -> int:
        """What a kernel of this kind writes."""
        return {"convolution": self.y, "weight gradient": self.w, "input gradient": self.x}[kind]


@dataclass(frozen=True)
class Convolution:
    """An image ``(n, g·c, *i)``, a kernel ``(g·d, c, *k)`` and an output ``(n, g·d, *o)``.

    With ``channels_last`` all of them are in torch's memory format of this name.
    """

    x: Shape
    w: Shape
    y: Shape
    groups: int
    strides: Shape
    dilations: Shape
    paddings: Shape
    channels_last: bool = False

    @property
    def entries(self) -> Entries:
        return Entries(prod(self.x), prod(self.w), prod(self.y))

    @property
    def samples(self) -> int:
        return self.x[0]

    @property
    def channels(self) -> Shape:
        """Channels of one group, of the image and of the output."""
        return self.w[1], self.w[0] // self.groups

    @property
    def flops(self) -> int:
        """Of any of the three kernels: every channel pair of a group meets at every (o, k)."""
        pairs = self.groups * self.channels[0] * self.channels[1]
        return 2 * self.samples * pairs * prod(self.o) * prod(self.k)

    def pair(self, kind: str) -> Shape:
        """The channels of a group that a kernel sums, and those that it keeps.

        A weight gradient keeps both: those of the image are said first.
        """
        image, output = self.channels
        return (output, image) if kind == "input gradient" else (image, output)

    @property
    def i(self) -> Shape:
        return self.x[2:]

    @property
    def o(self) -> Shape:
        return self.y[2:]

    @property
    def k(self) -> Shape:
        return self.w[2:]

    @property
    def volumes(self) -> bool:
        return len(self.k) == 3

    @property
    def grouped(self) -> bool:
        return self.groups > 1

    @property
    def depthwise(self) -> bool:
        return self.grouped and self.channels == (1, 1)

    @property
    def pointwise(self) -> bool:
        return prod(self.k) == 1 and not any(self.paddings)

    @property
    def strided(self) -> bool:
        return any(stride > 1 for stride in self.strides)

    @property
    def dilated(self) -> bool:
        return any(dilation > 1 for dilation in self.dilations)

    @property
    def misses(self) -> bool:
        """Whether a window can lie in the padding alone."""
        reach = ((k - 1) * d + 1 for k, d in zip(self.k, self.dilations, strict=True))
        return any(size <= pad for size, pad in zip(reach, self.paddings, strict=True))

    @property
    def outgrows(self) -> bool:
        """Whether a window is larger than the image."""
        return any(k > i for k, i in zip(self.k, self.i, strict=True))

    @property
    def overhangs(self) -> bool:
        """Whether more than half of a window can lie in the padding, at either end."""
        spans = zip(self.k, self.i, self.o, self.strides, self.paddings, strict=True)
        return any(2 * max(p, (o - 1) * s + k - i - p) > k for k, i, o, s, p in spans)

    def divisible(self, by: int) -> bool:
        """Whether the channels of a group fill whole blocks of so many SIMD lanes."""
        return all(channels % by == 0 for channels in self.channels)

    def padded(self, width: int) -> Entries:
        """Entries after rounding channels, or depthwise groups, up to blocks of so many SIMD lanes.

        Channels of other groups are not rounded.
        """
        x, w, y = self.x, self.w, self.y
        if self.depthwise:
            g = whole(self.groups, width)
            return Entries(
                *(prod((n, g, *sizes)) for n, sizes in ((x[0], x[2:]), (1, w[2:]), (y[0], y[2:])))
            )
        if self.grouped:
            return self.entries
        c, d = whole(x[1], width), whole(y[1], width)
        return Entries(prod((x[0], c, *x[2:])), prod((d, c, *w[2:])), prod((y[0], d, *y[2:])))


def whole(size: int, width: int) -> int:
    """The size rounded up to a multiple of the width."""
    return -(-size // width) * width
