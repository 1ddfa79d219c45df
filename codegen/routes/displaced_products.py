"""Products of displaced halves: the core that tap pairs share, and the strips beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf, prod

from tnconv.codegen.lowering.matrices import products
from tnconv.codegen.lowering.operations import Operation
from tnconv.codegen.lowering.strided import Strided
from tnconv.codegen.lowering.writer import (
    ADD,
    CONCATENATE,
    CONTIGUOUS,
    STACK,
    SUBTRACT,
    Writer,
)
from tnconv.codegen.prices import cost
from tnconv.codegen.routes.tap_pairs import Dimension, Shared

Known = Mapping[tuple[int, int], Strided]
"""Products ``(g, c, c')`` of all positions by their displacement, of two equal halves."""


def unfolded_taps(
    writer: Writer, array: Strided, dim: int, dimensions: Sequence[Dimension]
) -> tuple[Writer, Strided]:
    """``(.., i1, i2, .., rows, c)`` to ``(.., o1·o2·..·rows, k1·k2·..·c)`` from ``dim`` on."""
    if not dimensions:
        return writer, array
    last = len(array.shape)
    for at, x in enumerate(dimensions, dim):
        array = array.narrow(at, 0, x.span)
        array = array.unfold(at, (x.taps - 1) * x.dilation + 1, x.stride)
        array = array.narrow(len(array.shape) - 1, 0, x.taps, x.dilation)
    array = array.permute([*range(last - 1), *range(last, len(array.shape)), last - 1])
    flat = [prod(array.shape[dim : last - 1]), prod(array.shape[last - 1 :])]
    return writer.reshape(array, [*array.shape[:dim], *flat])


def flattened(writer: Writer, array: Strided) -> tuple[Writer, Strided]:
    """``(g, t1, t2, rows, c)`` as it lies in memory, for flat rows and for strips of them."""
    shape = array.shape
    writer, flat = writer.reshape(array, [shape[0], prod(shape[1:-1]), shape[-1]])
    array = flat.free_reshape(shape) or array
    return writer, array


def laid_out(writer: Writer, array: Strided) -> tuple[Writer, Strided]:
    """A contiguous array from which many strips are copied."""
    if array.run == array.size:
        return writer, array
    kernel = cost.copy(array.size, *array.innermost)
    return writer.run(CONTIGUOUS, [array], array.shape, kernel, "copy in a new order")


def block_rows(
    writer: Writer,
    left: Strided,
    right: Strided,
    dimensions: Sequence[Dimension],
    least: Sequence[float],
    known: Known | None = None,
    most: float = inf,
) -> tuple[Writer, list[Strided]] | None:
    """For each k1 ``[g, k2, .., k1', k2', .., c, c']`` of halves ``(g, t1, t2, .., rows, c)``.

    Where that is less, or with products that are ``known``, sums are of all windows, of which each
    pair subtracts what it has not. None stands for steps that take ``most`` seconds.

    Args:
        writer: The steps so far.
        left: One half.
        right: The other one.
        dimensions: The dimensions that are displaced.
        least: A lower bound of the seconds for each pair of the first dimension.
        known: Products that are known already.
        most: The seconds of all steps at which no more are written.
    """
    first, *rest = dimensions
    blocks: dict[tuple[int, int], Strided] = {}
    still = sum(least)
    for shared, seconds in zip(first.pairs(symmetric=left == right), least, strict=True):
        if writer.seconds + still >= most:
            return None
        still -= seconds
        writer, halves = _phases(writer, (left, right), 1, shared, first.stride)
        less = known is not None or shared.leaner
        parts = shared.others if less else shared.strips
        writer, core = _core(writer, halves, shared.whole if less else shared, rest, known)
        if parts:
            writer, strips = _strips(writer, halves, shared, parts, rest)
            writer, core = _combined(writer, SUBTRACT if less else ADD, core, strips)
        blocks |= {pair: core.select(1, at if parts else 0) for at, pair in enumerate(shared.pairs)}
    writer, rows = _table(writer, blocks, first.taps, len(rest))
    return None if writer.seconds >= most else (writer, rows)


def _phases(
    writer: Writer, halves: Sequence[Strided], dim: int, shared: Shared, stride: int
) -> tuple[Writer, list[Strided]]:
    """Every ``stride``-th position of a dimension, of each half from its own phase on."""
    found = []
    for array, phase in zip(halves, shared.phases, strict=True):
        if stride > 1:
            count = (array.shape[dim] - phase - 1) // stride + 1
            array = array.narrow(dim, phase, count, stride)
            kernel = cost.copy(array.size, prod(array.shape[dim + 1 :]))
            writer, array = writer.run(CONTIGUOUS, [array], array.shape, kernel, f"phase {phase}")
        found.append(array)
    return writer, found


def _core(
    writer: Writer,
    halves: Sequence[Strided],
    shared: Shared,
    rest: Sequence[Dimension],
    known: Known | None,
) -> tuple[Writer, Strided]:
    """What all pairs have in common: ``[g, 1, *k, *k', c, c']``."""
    if rest:
        writer, rows = _flat_rows(writer, halves, shared, rest[0], known)
        writer, array = stacked(writer, rows, 1, "all pairs of taps")
        return writer, array.unsqueeze(1)
    start, length = shared.core
    parts = []
    for array, shift in zip(halves, (0, shared.shift), strict=True):
        part = array.narrow(1, start + shift, length)
        writer, part = writer.reshape(part, [part.shape[0], prod(part.shape[1:-1]), part.shape[-1]])
        parts.append(part)
    writer, array = _product(writer, parts[0], parts[1])
    return writer, array.unsqueeze(1)


def _flat_rows(
    writer: Writer,
    halves: Sequence[Strided],
    outer: Shared,
    second: Dimension,
    known: Known | None,
) -> tuple[Writer, list[Strided]]:
    """For each k2 ``[g, k2', c, c']``, summed over the core of the first dimension.

    Zeros between the rows make a displacement in both dimensions one offset into the flat array, so
    that every product reads one array, which caches twice as well as two copies. It sums all
    windows, of which each pair subtracts what it has not.
    """
    blocks: dict[tuple[int, int], Strided] = {}
    same = halves[0] == halves[1] and outer.shift == 0
    for shared in second.pairs(symmetric=same):
        writer, pair = _phases(writer, halves, 2, shared, second.stride)
        if known is not None:
            whole = known[outer.shift, shared.shift]
        else:
            writer, whole = _offset_product(writer, pair, outer, shared)
        whole = whole.unsqueeze(1)
        if shared.others:
            writer, others = _others(writer, pair, outer, shared)
            writer, whole = _combined(writer, SUBTRACT, whole, others)
        last = whole.shape[1] - 1
        blocks |= {pair: whole.select(1, min(at, last)) for at, pair in enumerate(shared.pairs)}
    return _table(writer, blocks, second.taps, 0)


def _offset_product(
    writer: Writer, halves: Sequence[Strided], outer: Shared, inner: Shared
) -> tuple[Writer, Strided]:
    start, length = outer.core
    groups, _, width, rows, _ = halves[0].shape
    row = width * rows
    offset = (start + outer.shift) * row + inner.shift * rows
    low, high = max(0, -offset), min(length * row, halves[1].shape[1] * row - offset)
    parts = []
    for array, begin in zip(halves, (start * row, offset), strict=True):
        writer, flat = writer.reshape(array, [groups, array.shape[1] * row, array.shape[-1]])
        parts.append(flat.narrow(1, begin + low, high - low))
    return _product(writer, parts[0], parts[1])


def _others(
    writer: Writer, halves: Sequence[Strided], outer: Shared, inner: Shared
) -> tuple[Writer, Strided]:
    """What each pair's window has not, ``[g, pair, c, c']``."""
    start, length = outer.core
    pairs, parts = len(inner.pairs), []
    for array, over, shift in zip(halves, (0, outer.shift), (0, inner.shift), strict=True):
        groups, _, _, rows, c = array.shape
        core = array.narrow(1, start + over, length)
        pieces = [core.narrow(2, begin + shift, size) for begin, size in inner.others]
        writer, strip = _cat(writer, pieces, 2)
        each = strip.shape[2] // pairs
        split = strip.free_reshape([groups, length, pairs, each, rows, c])
        assert split is not None
        moved = split.permute([0, 2, 1, 3, 4, 5])
        writer, strip = writer.reshape(moved, [groups * pairs, length * each * rows, c])
        parts.append(strip)
    writer, array = _product(writer, parts[0], parts[1])
    split = array.free_reshape([groups, pairs, *array.shape[1:]])
    assert split is not None
    return writer, split


def _combined(
    writer: Writer, operation: Operation, core: Strided, strips: Strided
) -> tuple[Writer, Strided]:
    kernel = cost.elementwise(strips.size, core.size + strips.size)
    return writer.run(operation, [core, strips], strips.shape, kernel, "core and border strips")


def _table(
    writer: Writer, blocks: dict[tuple[int, int], Strided], taps: int, inner: int
) -> tuple[Writer, list[Strided]]:
    """The blocks of pairs ``[g, *k, *k', c, c']`` row by row, the mirrored ones transposed.

    ``inner`` is the number of k, of which the blocks of one row are stacked in front of the k'.
    """
    rows, last = [], 1 + 2 * inner
    mirror = [0, *range(1 + inner, last), *range(1, 1 + inner), last + 1, last]
    for k in range(taps):
        parts = [
            blocks[k, other] if (k, other) in blocks else blocks[other, k].permute(mirror)
            for other in range(taps)
        ]
        writer, row = stacked(writer, parts, 1 + inner, f"tap {k} and all others")
        rows.append(row)
    return writer, rows


def stacked(
    writer: Writer, parts: Sequence[Strided], dim: int, comment: str
) -> tuple[Writer, Strided]:
    like = parts[0]
    shape = (*like.shape[:dim], len(parts), *like.shape[dim:])
    inner = prod(like.shape[dim:])
    copies = [
        cost.copy(like.size, min(row, inner), *others).seconds - cost.launch()
        for row, *others in (part.innermost for part in parts)
    ]
    views = len(parts) * cost.launch()  # before each copy
    kernel = replace(cost.copy(prod(shape), inner), seconds=cost.launch() + views + sum(copies))
    return writer.run(STACK, parts, shape, kernel, comment, (dim,))


def _cat(writer: Writer, parts: Sequence[Strided], dim: int) -> tuple[Writer, Strided]:
    like, length = parts[0], sum(part.shape[dim] for part in parts)
    shape = (*like.shape[:dim], length, *like.shape[dim + 1 :])
    kernel = cost.copy(prod(shape), prod(like.shape[dim + 1 :]))
    kernel = replace(kernel, seconds=kernel.seconds + len(parts) * cost.launch())
    return writer.run(CONCATENATE, parts, shape, kernel, "border strips", (dim,))


def _product(writer: Writer, left: Strided, right: Strided) -> tuple[Writer, Strided]:
    """``(g, rows, c)`` and ``(g, rows, c')`` to ``(g, c, c')``."""
    (groups, rows, m), n = left.shape, right.shape[-1]
    plain, *ways = products(left.mT, right, (groups,))
    plain = plain._replace(kernel=cost.matmul(groups, m, n, rows, across=True))  # single channels
    best = min([plain, *ways], key=lambda way: way.kernel.seconds)
    copied = [half.size for half in (left, right) if groups > 1 and half.run < half.size]
    scratch = best.kernel.scratch + cost.bytes_per_entry() * sum(copied)
    call = best.operation, best.factors, best.shape, replace(best.kernel, scratch=scratch)
    return writer.run(*call, "products", best.attributes)


def _strips(
    writer: Writer,
    halves: Sequence[Strided],
    shared: Shared,
    windows: Sequence[tuple[int, int]],
    rest: Sequence[Dimension],
) -> tuple[Writer, Strided]:
    """What each pair has in ``windows``, ``[g, pair, *k, *k', c, c']``, by unfolding the rest."""
    groups, pairs, parts = halves[0].shape[0], len(shared.pairs), []
    for array, shift in zip(halves, (0, shared.shift), strict=True):
        pieces = [array.narrow(1, start + shift, length) for start, length in windows]
        writer, strip = _cat(writer, pieces, 1)
        writer, strip = unfolded_taps(writer, strip, 2, rest)
        width = strip.shape[-1]
        rows = strip.size // (groups * pairs * width)
        writer, strip = writer.reshape(strip, [groups * pairs, rows, width])
        parts.append(strip)
    writer, array = _product(writer, parts[0], parts[1])
    taps, (c, d) = [x.taps for x in rest], (half.shape[-1] for half in halves)
    split = array.free_reshape([groups, pairs, *taps, c, *taps, d])
    assert split is not None
    inner = len(taps)
    left, right = range(2, 2 + inner), range(3 + inner, 3 + 2 * inner)
    return writer, split.permute([0, 1, *left, *right, 2 + inner, 3 + 2 * inner])
