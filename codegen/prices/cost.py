"""What a kernel costs: seconds from a few physical coefficients.

Only ratios between kernels matter for a choice. The coefficients are a table of the device: the
kernels below read the one in use.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise

from tnconv.codegen.prices.native_shapes import whole
from tnconv.codegen.prices.onednn import NARROW

ITEM = 4  # bytes per entry; the choice of kernels hardly depends on it


@dataclass(frozen=True)
class Coefficients:
    """What a device can do; the defaults were measured on x86 servers, torch 2.13, float32."""

    launch: float = 4e-6  # seconds per call
    primitive: float = 4e-5  # seconds per call of a native convolution that is no matrix product
    turn: float = 2e-5  # seconds per turn of a loop
    gemm: float = 1.05e11  # flop/s of a large matrix product
    dots: float = 2e10  # at least, where both factors lie along the summed entries
    written: float = 1e10  # bytes/s of the result of a matrix product ...
    written_in_blocks: float = 1e11  # ... and of one that is computed in blocks of rows
    unaligned: float = 7e-10  # seconds per entry of results whose rows are no whole vectors
    conflicting: float = 5.5e-10  # seconds per entry of a factor whose columns conflict in caches
    convolution: float = 1.25e11  # flop/s by whole vectors of channels, also of input gradients ...
    weight_gradient: float = 1.05e11  # ... and of weight gradients
    grouped_output: float = 2.6e9  # for each output channel of groups that are no whole vectors
    depthwise: float = 8e10
    depthwise_entry: float = 4.2e-10  # seconds per entry that a depthwise kernel reads or writes
    depthwise_input_gradient: float = 0.9  # of the convolution's speed
    depthwise_weight_gradient: float = 1.1  # ... which as a convolution is one of large kernels
    depthwise_by_entries: float = 2.9e9  # what kernels by vectors cannot do ...
    large_depthwise_weight_gradient: float = 2e9  # ... and weight gradients of more than 3x3 taps
    bandwidth: float = 3e10  # bytes/s, read plus written
    fresh: float = 6e9  # bytes/s into newly mapped pages, which large results need
    total: float = 7e-9  # seconds per row of a sum
    outer: float = 2e-10  # seconds per entry of a large sum over other than the last dimensions
    row: float = 1.5e-9  # seconds per row of a copy: its innermost loop
    loop: float = 2.5e-8  # seconds per loop over rows of a copy
    near: float = 3e-10  # seconds per entry that a copy reads in small steps ...
    far: float = 7e-10  # ... in steps beyond a cache line ...
    conflict: float = 2.2e-9  # ... and in steps that conflict in caches
    folded: float = 1e-9  # seconds per entry that torch's fold reads
    weight_entry: float = 1e-9  # seconds per entry of weights that gradients bring in order


FRESH_FROM = int(os.environ.get("MALLOC_MMAP_THRESHOLD_", 2**25))  # bytes, as in glibc
LINE = 64  # bytes of a cache line
CACHED = 10 * 2**20  # bytes that stay near the core; beyond, depthwise kernels take twice as long
VECTOR = 16  # bytes, the least that matrix products write at a time
CONFLICT = 2048  # bytes; entries multiples of it apart compete for the same places of a cache ...
PLACES = 16  # ... which are so many
COLUMNS = 16  # that matrix products compute at a time; a rest takes up to three times as long
CHANNELS = 16  # of a vector, of which convolutions write a multiple, but for weight gradients
LARGE = 9  # taps; larger depthwise kernels have slow weight gradients
SHIPPED = Coefficients()
_in_use: ContextVar[Coefficients] = ContextVar("coefficients", default=SHIPPED)
_item: ContextVar[int] = ContextVar("item", default=ITEM)


def now() -> Coefficients:
    """The coefficients in use."""
    return _in_use.get()


def item() -> int:
    """Bytes per entry of the tensors in use, for what kernels hold. Times are those of float32."""
    return _item.get()


@contextmanager
def using(coefficients: Coefficients, item: int = ITEM) -> Iterator[None]:
    """Price kernels with these coefficients, in this thread and context alone."""
    tokens = _in_use.set(coefficients), _item.set(item)
    try:
        yield
    finally:
        _in_use.reset(tokens[0])
        _item.reset(tokens[1])


@dataclass(frozen=True)
class Kernel:
    """One call into torch: its kind, the multiply-adds' flops, bytes moved, and time.

    ``scratch`` is how many bytes beside its result the kernel holds while it runs.
    """

    kind: str
    flops: int
    bytes: int
    seconds: float
    scratch: int = 0


def matmul(
    batch: int,
    m: int,
    n: int,
    k: int,
    in_blocks: bool = False,
    along: bool = False,
    conflict: bool = False,
) -> Kernel:
    """``(batch, m, k) @ (batch, k, n)``: full speed needs all three sizes, and whole vectors of n.

    A single product may be computed ``in_blocks`` of rows, which are a batch for torch. Where both
    factors lie ``along`` the summed entries, few rows and columns are dot products. Columns of the
    first factor may ``conflict`` in caches.
    """
    flops = 2 * batch * m * n * k
    speed = now().gemm * _saturation(m, 12) * _saturation(n, 12) * _saturation(k, 12)
    speed *= _filled(n) if m >= COLUMNS else 1.0
    speed = max(speed, now().dots * _saturation(k, 20)) if along else speed
    entries = batch * (m * k + k * n + m * n)
    moved, written = ITEM * entries, ITEM * batch * m * n
    writing = written / (now().written_in_blocks if in_blocks else now().written)
    seconds = now().launch + max(flops / speed, moved / now().bandwidth) + writing
    seconds += _fresh(written) + batch * 3e-8
    seconds += batch * m * k * now().conflicting if conflict else 0.0
    if m > 1 and n >= COLUMNS and n * ITEM % VECTOR:
        seconds += batch * m * n * now().unaligned
    return Kernel("matmul", flops, moved, seconds)


def gram(batch: int, m: int, k: int, blocks: int) -> Kernel:
    """``(batch, m, k) @ (batch, k, m)`` of mirrored halves, in rows of blocks, half of them copied.

    A block row is ``m / blocks`` rows of the result, without what the rows before have mirrored.
    """
    starts = [m * at // blocks for at in range(blocks + 1)]
    kernels = [matmul(batch, stop - start, m - start, k) for start, stop in pairwise(starts)]
    entries = batch * m * m // 2
    kernels += [copy(entries, m // blocks), copy(entries, m // blocks, m)]
    return Kernel(
        "symmetric matmul",
        sum(kernel.flops for kernel in kernels),
        sum(kernel.bytes for kernel in kernels),
        sum(kernel.seconds for kernel in kernels) + 2 * blocks * now().launch,
        2 * item() * batch * (starts[2] - starts[1]) * m,
    )


def convolution(
    kind: str,
    flops: int,
    channels: tuple[int, int],
    groups: int,
    taps: int,
    moved: int,
    new: int,
    by_vectors: bool = True,
    few: bool = False,
) -> Kernel:
    """A native convolution or gradient kernel with (summed, kept) channels per group.

    Operands and result are arranged in vectors of channels, whose rest is computed as well;
    ``few`` summed ones are read as they are. A single tap is a matrix product. Depthwise
    kernels take a time for each entry. Kernels that cannot do it ``by_vectors`` are slow, and so
    are weight gradients of large depthwise ones.
    """
    summed, kept = channels
    to_weight = kind == "weight gradient"
    if groups > 1 and summed == kept == 1:
        return _depthwise(kind, flops, groups, taps, moved, new, by_vectors)
    arranged = 2 * ITEM * moved / now().bandwidth
    if taps == 1 and by_vectors:
        positions = flops // (2 * groups * summed * kept or 1)
        rows, columns = sorted(channels)
        sizes = (rows, columns, positions) if to_weight else (kept, positions, summed)
        seconds = matmul(groups, *sizes).seconds + arranged
        return Kernel(f"pointwise {kind}", flops, ITEM * moved, seconds)
    vectors = summed if few else whole(summed, NARROW)
    vectors *= whole(kept, NARROW if to_weight else CHANNELS)
    speed = now().weight_gradient if to_weight else now().convolution
    speed *= summed * kept / vectors if vectors else 1.0
    if groups > 1 and not by_vectors:
        outputs = summed if kind == "input gradient" else kept
        slow = now().grouped_output * outputs * (0.7 if kind == "input gradient" else 1.0)
        speed = min(speed, slow)
    seconds = now().launch + flops / speed + arranged + _fresh(ITEM * new)
    return Kernel(kind, flops, ITEM * moved, seconds)


def _depthwise(
    kind: str, flops: int, groups: int, taps: int, moved: int, new: int, by_vectors: bool
) -> Kernel:
    """By vectors of groups, with a time for each entry."""
    speed = now().depthwise if by_vectors else now().depthwise_by_entries
    longer = whole(groups, CHANNELS) / groups
    if kind == "weight gradient" and (taps > LARGE or not by_vectors):
        speed = now().large_depthwise_weight_gradient
    elif kind == "weight gradient":
        longer /= now().depthwise_weight_gradient
    elif kind == "input gradient":
        longer /= now().depthwise_input_gradient
    entry = now().depthwise_entry * (2 if ITEM * moved > CACHED else 1)
    seconds = now().launch + longer * (flops / speed + moved * entry)
    return Kernel(kind, flops, ITEM * moved, seconds + _fresh(ITEM * new))


def copy(
    entries: int,
    row: int,
    step: int = 1,
    rows: int | None = None,
    competing: int = 1,
    read: int | None = None,
) -> Kernel:
    """Write ``entries``, gathered by `gathering` from as many, or ``read``."""
    moved = ITEM * (entries + (entries if read is None else read))
    seconds = _moving(moved) + _fresh(ITEM * entries)
    seconds += gathering(entries, row, step, rows, competing)
    return Kernel("copy", 0, moved, seconds)


def elementwise(entries: int, read: int) -> Kernel:
    """One operation per entry of the result, or of what a reduction reads."""
    moved = ITEM * (entries + read)
    seconds = _moving(moved) + _fresh(ITEM * entries)
    return Kernel("elementwise", max(entries, read), moved, seconds)


def reduction(read: int, written: int, row: int, step: int = 1, outer: bool = False) -> Kernel:
    """A sum; short rows cost a start each, and large sums that keep the last dimension jump.

    Of cache lines that are read in steps, all entries are moved.
    """
    moved = ITEM * (read * min(max(1, step), LINE // ITEM) + written)
    seconds = _moving(moved) + read * (_stepping(step) + now().total / max(1, row))
    seconds += read * now().outer if outer and moved > CACHED else 0.0
    return Kernel("sum", read, moved, seconds)


def fold(read: int, written: int) -> Kernel:
    """Torch's fold, entry by entry."""
    seconds = now().launch + read * now().folded + _fresh(ITEM * written)
    return Kernel("fold", read, ITEM * (read + written), seconds)


def shifted(entries: int, written: int, parts: int, row: int, step: int, rows: int) -> Kernel:
    """Parts of so many entries in all that are added into zeros, from and to rows.

    They lie far apart: twice the time of copies, with rows on both sides.
    """
    zeros, moved = elementwise(written, 0), copy(entries, row, step, rows, read=2 * entries)
    adding = 2 * (moved.seconds + gathering(entries, row, 1, rows))
    seconds = zeros.seconds + adding + 2 * (parts - 1) * now().launch
    return Kernel("sum of shifted parts", entries, zeros.bytes + moved.bytes, seconds)


def _moving(moved: int) -> float:
    return now().launch + moved / now().bandwidth


def gathering(
    entries: int, row: int, step: int, rows: int | None = None, competing: int = 1
) -> float:
    """What loops over ``rows`` of ``row`` entries each, ``step`` apart, take longer than one loop.

    Without ``rows`` they are one loop. So many entries are ``competing`` for a place in the cache
    before the next of a line is read.
    """
    row = max(1, row)
    loops = 0.0 if rows is None else entries / (row * max(1, rows))
    return entries * (_stepping(step, competing) + now().row / row) + now().loop * loops


def conflicts(step: int) -> bool:
    """Whether entries so many apart compete for the same places of a cache."""
    return step * ITEM % CONFLICT == 0


def _stepping(step: int, competing: int = 1) -> float:
    """Seconds per entry that is read in steps."""
    if step <= 1:
        return 0.0
    if competing > PLACES:
        return now().conflict
    return now().near if step * ITEM < LINE else now().far


def _saturation(size: int, half: int) -> float:
    return size / (size + half) if size else 1.0


def _filled(columns: int) -> float:
    """Of a matrix product's time, what it would take if a rest of columns took no longer."""
    whole, rest = divmod(columns, COLUMNS)
    return columns / (COLUMNS * whole + min(3 * rest, 2 * COLUMNS)) if columns else 1.0


def _fresh(written: int) -> float:
    return written / now().fresh if written > FRESH_FROM else 0.0
