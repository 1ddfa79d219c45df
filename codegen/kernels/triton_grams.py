"""The Triton kernels of `patch_gram`: tiles of the upper triangle, and sums of their parts.

The entry r = (c, k) of the patch at m = (n, o) lies in memory at ``left(r) + right(m)``, where
``left = c·stride_c + Σ (d·k - p)·stride`` and ``right = n·stride_n + Σ s·o·stride``. What takes
divisions is so computed once per row of a tile and once per position, never per entry: an entry
takes one addition, and for each dimension in which windows leave the image one more and a
comparison. Where channels are innermost in memory, rows are ordered (k, c) and tiles are loaded
along them, in vectors; otherwise tiles are loaded along positions, and the rows of a channel read
the same cache lines.

Importing this module imports Triton: only a call on a device does.
"""

# mypy: ignore-errors
# Triton compiles these functions, and its annotations are not types.

import torch
import triton
import triton.language as tl

dtypes = {torch.float32: tl.float32, torch.float64: tl.float64}
COUNTS = ("total", "per_split", "splits", "tiles", "side")
"""Numbers whose divisors make no better code: one kernel is for all batches."""


@triton.jit(do_not_specialize=COUNTS)
def patch_gram_tiles(
    x,
    result,
    rows,
    channels,
    total,
    per_split,
    splits,
    tiles,
    side,
    taps0,
    taps1,
    taps2,
    outputs1,
    outputs2,
    positions,
    size0,
    size1,
    size2,
    step0,
    step1,
    step2,
    dilation0,
    dilation1,
    dilation2,
    padding0,
    padding1,
    padding2,
    stride_n,
    stride_c,
    stride0,
    stride1,
    stride2,
    DIMS: tl.constexpr,
    MASKED: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    TOTAL: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One tile of one group, summed over one part of all positions.

    Consecutive programs compute the tiles of the same positions, which they share in the L2 cache.
    """
    program = tl.program_id(0)
    tile, rest = program % tiles, program // tiles
    part, group = rest % splits, rest // splits
    if WIDE:
        part = part.to(tl.int64)
    block, other = _upper(tile, side)
    x += group.to(tl.int64) * channels * stride_c
    taps = (taps0, taps1, taps2)
    dilations, paddings = (dilation0, dilation1, dilation2), (padding0, padding1, padding2)
    strides, sizes = (stride0, stride1, stride2), (size0, size1, size2)
    how = (rows, channels, taps, dilations, paddings, stride_c, strides)
    left = _rows(block, how, BLOCK, LAST, WIDE)
    right = _rows(other, how, BLOCK, LAST, WIDE)
    sums = tl.zeros((BLOCK, BLOCK), dtype=TOTAL)
    first = part * per_split
    stop = tl.minimum(first + per_split, total)
    for start in range(first, stop, DEPTH):
        at = start + tl.arange(0, DEPTH)
        inside = at < stop
        sample = at // positions
        if DIMS == 1:
            to2 = (at - sample * positions) * step2
            to0, to1 = to2 * 0, to2 * 0
        else:
            line = at // outputs2
            to2 = (at - line * outputs2) * step2
            if DIMS == 2:
                to1 = (line - sample * outputs1) * step1
                to0 = to1 * 0
            else:
                plane = line // outputs1
                to1 = (line - plane * outputs1) * step1
                to0 = (plane - sample * (positions // (outputs1 * outputs2))) * step0
        if WIDE:
            offset = sample.to(tl.int64) * stride_n + to0.to(tl.int64) * stride0
            offset += to1.to(tl.int64) * stride1 + to2.to(tl.int64) * stride2
            to0, to1, to2 = to0.to(tl.int32), to1.to(tl.int32), to2.to(tl.int32)
        else:
            offset = sample * stride_n + to0 * stride0 + to1 * stride1 + to2 * stride2
        where = (offset, to0, to1, to2, inside)
        a = _entries(x, left, where, sizes, LAST, MASKED)
        b = _entries(x, right, where, sizes, LAST, MASKED)
        sums = tl.dot(a, tl.trans(b), sums, input_precision=PRECISION, out_dtype=TOTAL)
    if SPLIT:
        place = part.to(tl.int64) * (tl.num_programs(0) // splits) + group * tiles + tile
        entry = tl.arange(0, BLOCK)
        inner = entry[:, None] * BLOCK + entry[None, :]
        tl.store(result + place * (BLOCK * BLOCK) + inner, sums)
    else:
        _write(result, sums, block, other, group, rows, channels, BLOCK, LAST)


@triton.jit(do_not_specialize=COUNTS)
def patch_gram_total(
    parts,
    result,
    rows,
    channels,
    splits,
    tiles,
    side,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile as the sum of its parts, always in the same order."""
    program = tl.program_id(0)
    tile, group = program % tiles, program // tiles
    block, other = _upper(tile, side)
    entry = tl.arange(0, BLOCK)
    inner = entry[:, None] * BLOCK + entry[None, :]
    here = parts + program.to(tl.int64) * (BLOCK * BLOCK) + inner
    step = tl.num_programs(0).to(tl.int64) * (BLOCK * BLOCK)
    sums = tl.load(here)
    for _ in range(1, splits):
        here += step
        sums += tl.load(here)
    _write(result, sums, block, other, group, rows, channels, BLOCK, LAST)


@triton.jit
def _upper(tile, side):
    """Row and column of a tile on or above the diagonal of a square of ``side`` tiles.

    Rows a and side - a - even of the triangle make one line of the same length for each a.
    """
    even = 1 - side % 2
    line, at = tile // (side + even), tile % (side + even)
    first = at < side - line
    return tl.where(first, line, side - line - even), tl.where(first, line + at, at - even)


@triton.jit
def _rows(block, how, BLOCK: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr):
    """Of a block of rows: the offset in memory, and the inputs in three dimensions."""
    rows, channels, taps, dilations, paddings, stride_c, strides = how
    channel, tap = _patch_entry(block * BLOCK + tl.arange(0, BLOCK), channels, rows, LAST)
    if LAST:  # rows beyond the last repeat others, and are not written; vectors stay whole
        tap = tl.minimum(tap, rows // channels - 1)
    else:
        channel = tl.minimum(channel, channels - 1)
    line = tap // taps[2]
    at2 = (tap - line * taps[2]) * dilations[2] - paddings[2]
    at1 = (line % taps[1]) * dilations[1] - paddings[1]
    at0 = (line // taps[1]) * dilations[0] - paddings[0]
    if WIDE:
        offset = channel.to(tl.int64) * stride_c + at0.to(tl.int64) * strides[0]
        offset += at1.to(tl.int64) * strides[1] + at2.to(tl.int64) * strides[2]
    else:
        offset = channel * stride_c + at0 * strides[0] + at1 * strides[1] + at2 * strides[2]
    return offset, at0, at1, at2


@triton.jit
def _patch_entry(row, channels, rows, LAST: tl.constexpr):
    """Channel and tap of a row."""
    if LAST:
        tap = row // channels
        channel = row - tap * channels
    else:
        taps = rows // channels
        channel = row // taps
        tap = row - channel * taps
    return channel, tap


@triton.jit
def _entries(x, left, right, sizes, LAST: tl.constexpr, MASKED: tl.constexpr):
    """The tile (rows, positions) of the unfolded input."""
    offset, at0, at1, at2 = left
    start, to0, to1, to2, inside = right
    if LAST:
        mask = inside[:, None]
        if MASKED & 1:
            mask &= _within(to0[:, None] + at0[None, :], sizes[0])
        if MASKED & 2:
            mask &= _within(to1[:, None] + at1[None, :], sizes[1])
        if MASKED & 4:
            mask &= _within(to2[:, None] + at2[None, :], sizes[2])
        tile = tl.trans(tl.load(x + (start[:, None] + offset[None, :]), mask, other=0.0))
    else:
        mask = inside[None, :]
        if MASKED & 1:
            mask &= _within(at0[:, None] + to0[None, :], sizes[0])
        if MASKED & 2:
            mask &= _within(at1[:, None] + to1[None, :], sizes[1])
        if MASKED & 4:
            mask &= _within(at2[:, None] + to2[None, :], sizes[2])
        tile = tl.load(x + (offset[:, None] + start[None, :]), mask, other=0.0)
    return tile


@triton.jit
def _within(at, size):
    """Whether 0 <= at < size: as unsigned numbers, those below zero are beyond every size."""
    return at.to(tl.uint32, bitcast=True) < size


@triton.jit
def _write(
    result, sums, block, other, group, rows, channels, BLOCK: tl.constexpr, LAST: tl.constexpr
):
    """Entries on and above the diagonal, and the same numbers below it."""
    entry = tl.arange(0, BLOCK)
    one, two = block * BLOCK + entry, other * BLOCK + entry
    upper = (one[:, None] <= two[None, :]) & (two < rows)[None, :]
    if LAST:
        taps = rows // channels
        channel, tap = _patch_entry(one, channels, rows, LAST)
        one = channel * taps + tap
        channel, tap = _patch_entry(two, channels, rows, LAST)
        two = channel * taps + tap
    one, two = one.to(tl.int64), two.to(tl.int64)
    result += group.to(tl.int64) * rows * rows
    sums = sums.to(result.dtype.element_ty)
    tl.store(result + one[:, None] * rows + two[None, :], sums, upper)
    tl.store(result + two[None, :] * rows + one[:, None], sums, upper)
