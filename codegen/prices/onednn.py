"""Memory of oneDNN's convolution kernels, as torch's allocations on x86 processors show it.

oneDNN wants operands in blocked layouts, with channels in blocks of SIMD lanes: torch reorders
them, and the result back. There are several implementations: blocked ones, blocked ones that read
the few channels of a first layer as they are, and im2col with GEMM for what these cannot do. Each
function yields the entries that every implementation which may be chosen holds at its worst
moments, result included.
"""

from collections.abc import Callable, Iterator
from math import prod

from tnconv.codegen.prices.native_shapes import Convolution, whole

WIDE, NARROW, NARROWEST = 16, 8, 4  # SIMD lanes in float32; which are used depends on the processor
FIRST = 3  # the most channels of the image of a first layer
MARGIN = 6  # the most columns of padding in SIMD depthwise kernels (four without AVX-512)
PAGE, LINE = 1024, 64  # entries to which allocations of kernels are aligned
Held = Callable[[Convolution, int], Iterator[int]]
"""Entries that a convolution holds at its worst moments, on so many threads."""


def forward(c: Convolution, threads: int) -> Iterator[int]:
    plain, wide, few = c.entries, c.padded(WIDE), c.channels[0] < WIDE
    last_channels = c.depthwise and c.volumes
    if c.misses or (c.grouped and not c.depthwise) or (last_channels and c.dilated):
        yield from (plain.y + threads * _unfolded(c), 2 * plain.y)
    if last_channels and not c.dilated:
        yield from (plain.x + wide.w + plain.y, 3 * plain.y)
    if c.misses or last_channels:
        return
    if c.grouped and not c.depthwise:
        yield wide.w + wide.y + (wide.x if c.divisible(NARROWEST) else 0)
        return
    yield wide.y + plain.y
    if c.depthwise or c.pointwise or not few:
        yield wide.x + wide.w + wide.y + threads * _picked(c)
    else:
        narrow = c.padded(NARROW)
        yield wide.w + wide.y
        yield narrow.w + narrow.y + (narrow.x if c.channels[0] >= NARROW else 0)


def weight_gradient(c: Convolution, threads: int) -> Iterator[int]:
    """Every thread accumulates into a tensor of its own."""
    plain, wide, narrow = c.entries, c.padded(WIDE), c.padded(NARROW)
    aside = 0 if threads == 1 else 3 * PAGE
    apart = c.dilated and not c.pointwise
    if c.misses or apart or c.grouped or c.volumes or c.outgrows:
        yield plain.w + threads * (_unfolded(c) + 4 * plain.w + LINE)
    yield 2 * plain.w
    if c.misses or not has_simd("weight gradient", c):
        return
    if c.grouped or c.pointwise or c.channels[0] >= WIDE:
        yield wide.x + threads * wide.w + wide.y + threads * _picked(c) + aside
    elif c.channels[0] <= FIRST:
        yield threads * wide.w + wide.y + aside
    yield wide.w + plain.w
    if not c.grouped and c.channels[0] < WIDE:
        yield from (narrow.x + threads * narrow.w + narrow.y + aside, narrow.w + plain.w)


def has_simd(kind: str, c: Convolution) -> bool:
    """Whether a SIMD implementation exists: always without groups, and for most groups."""
    if not c.grouped:
        return True
    if kind == "weight gradient":
        if c.depthwise:
            return not (c.volumes or c.dilated or c.overhangs or c.k[-1] > 3)
        return c.divisible(WIDE if c.dilated else NARROW)
    if not c.depthwise:
        return c.divisible(NARROWEST)
    if kind == "input gradient":
        return not (c.volumes or c.dilated)
    return c.volumes or c.paddings[-1] <= MARGIN


def few_as_they_are(kind: str, c: Convolution) -> bool:
    """Whether the image of a first layer is read as it is, not in blocks of channels."""
    return c.channels[0] <= FIRST and not c.grouped and kind != "input gradient"


def input_gradient(c: Convolution, threads: int) -> Iterator[int]:
    """Strided kernels work on channels-last tensors; bringing them back takes two more copies."""
    plain, wide = c.entries, c.padded(WIDE)
    steps = c.strided and not c.dilated and not c.depthwise
    unfolds = c.dilated or (c.volumes if c.depthwise else c.grouped or (c.misses and not steps))
    if unfolds:
        yield from (plain.x + threads * _unfolded(c), 2 * plain.x)
    if steps:
        kernel = plain.w // c.channels[0] * _turned(c.channels[0])
        yield from (plain.x + kernel + plain.y + threads * _stepping(c), 3 * plain.x)
    if c.depthwise:
        vectors = has_simd("input gradient", c)
    elif c.grouped:
        vectors = not c.misses and c.divisible(NARROWEST)
    else:
        vectors = not c.misses and not steps
    if vectors:
        yield from (wide.x + wide.w + wide.y + threads * _picked(c), wide.x + plain.x)


def _unfolded(c: Convolution) -> int:
    """The im2col matrix of one group of a sample; of a single slice for volumes."""
    return c.channels[0] * prod(c.k) * prod(c.o[-2:]) + LINE


def _picked(c: Convolution) -> int:
    """The strided part of a sample that a kernel of one tap gathers first."""
    if not (c.pointwise and c.strided):
        return 0
    return whole(c.channels[0], WIDE) * (prod(c.o) + 2) + LINE


def _turned(channels: int) -> int:
    """Channels of a channels-last tensor, rounded up to one or two blocks."""
    return whole(channels, WIDE if channels <= WIDE else 2 * WIDE)


def _stepping(c: Convolution) -> int:
    """A zero-padded sample of the cotangent, accumulators of rows, and tables, in whole pages."""
    spans = zip(c.i, c.o, c.k, c.dilations, c.strides, strict=True)
    sizes = (max(o, (i - 1 + (k - 1) * d) // s + 2) for i, o, k, d, s in spans)
    cotangent = c.groups * whole(c.channels[1], WIDE) * prod(sizes)
    row = max(2 * LINE, c.i[-1] * c.strides[-1] if c.grouped else 0)
    sums = c.groups * row * whole(min(c.channels[0], 4 * WIDE), NARROW)
    return cotangent + sums + 18 * PAGE
