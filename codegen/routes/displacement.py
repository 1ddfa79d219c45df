"""Displacement: Gram networks of two unfolded halves, with the products that tap pairs share.

``A[c, k, c', k'] = Σ_{n,o} x[n, c, s·o + d·k] x'[n, c', s·o + d·k']``: pairs of taps of equal
difference d·(k' - k), and equal d·k mod s, multiply the same pairs of positions, over windows that
overlap almost everywhere. The common core is multiplied once per difference, and each pair adds the
border strips beside it; displaced in two dimensions, the inner one's sum is of all windows, of
which each pair subtracts what it has not. Of two equal halves only the pairs k <= k' are computed.
Stride 1 needs about (2K - 1)^D / 2 products of channels instead of K^2D, and no unfolded input.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

from tnconv.codegen.lowering.covers import Cover
from tnconv.codegen.lowering.strided import Operation, Strided
from tnconv.codegen.lowering.values import Value
from tnconv.codegen.lowering.writer import (
    ADD,
    CONCATENATE,
    CONTIGUOUS,
    MATMUL,
    STACK,
    SUBTRACT,
    Writer,
)
from tnconv.codegen.prices import cost
from tnconv.codegen.routes.tap_pairs import Dimension, Shared
from tnconv.codegen.routes.window import window_on
from tnconv.diagrams.affine import Leg
from tnconv.diagrams.network import TensorNetwork

MOST_PRODUCTS = 512  # of displacements in two dimensions
MOST_TAPS = 32  # per dimension: each pair of taps is part of a line of source


def displacement(cover: Cover) -> Iterator[Cover]:
    """The two tensors whose patterns share the first pattern's output leg, and all such patterns.

    Offers to displace the first dimension, or the first two, and unfold the others into channels.
    """
    first = cover.pattern
    assert first is not None
    if (found := _dimension(cover, first)) is None:
        return
    others = [_dimension(cover, at) for at, _ in cover.network.patterns if at > first]
    tensors = found[0]
    dimensions = [found[1], *(other[1] for other in others if other and other[0] == tensors)]
    if any(x.taps == 1 for x in dimensions):
        return  # nothing to share; form N has no such dimension
    if all(x.taps <= MOST_TAPS and x.outputs for x in dimensions) and _meet(dimensions[0]):
        one = _covered(cover, tensors, dimensions, 1)
        assert one is not None
        yield one
        if len(dimensions) > 1 and _worthwhile(dimensions[0], dimensions[1]):
            two = _covered(cover, tensors, dimensions, 2, one.writer.seconds)
            yield from [two] if two else []


def _meet(x: Dimension) -> bool:
    """Whether all windows have something in common: else hardly any products are shared."""
    return x.furthest < x.outputs


def _worthwhile(first: Dimension, second: Dimension) -> bool:
    """Whether products in both dimensions are shared, and few."""
    products = len(first.pairs(symmetric=True)) * len(second.pairs(symmetric=False))
    return _meet(second) and products <= MOST_PRODUCTS


def _dimension(cover: Cover, at: int) -> tuple[tuple[int, int], Dimension] | None:
    """The tensors that a pattern and its mirror image join, for the first of the two patterns."""
    tn = cover.network
    if (here := window_on(cover.network, at)) is None:
        return None
    tensor, i, steps, padding = here
    for o, k in (tuple(steps), tuple(steps)[::-1]):
        mirrors = [other for other in tn.holders[o] if other != at]
        if o in tn.open_legs or len(mirrors) != 1 or mirrors[0] < at:
            continue
        there = window_on(cover.network, mirrors[0])
        if there is None or there[1] == o or there[0] == tensor:
            continue
        (twin,) = (leg for leg in there[2] if leg != o)
        alike = (steps[o], steps[k], padding, tn.sizes[k])
        if twin != k and alike == (there[2][o], there[2][twin], there[3], tn.sizes[twin]):
            if not {tensor, there[0]} & {*tn.holders[k], *tn.holders[twin]}:
                numbers = (tn.sizes[o], tn.sizes[k], steps[o], steps[k], padding)
                places = ((at, mirrors[0]), (i, there[1]), (k, twin))
                return (tensor, there[0]), Dimension(*places, *numbers)
    return None


def _covered(
    cover: Cover,
    tensors: tuple[int, int],
    dimensions: Sequence[Dimension],
    count: int,
    most: float = float("inf"),
) -> Cover | None:
    """Displace ``count`` dimensions, unfold the others; unless that takes ``most`` seconds."""
    covered = (*tensors, *(at for x in dimensions for at in x.at))
    cover, a = cover.value(tensors[0])
    cover, b = cover.value(tensors[1])
    network, writer = cover.network, cover.writer
    shared = [leg for leg in a.legs if leg in b.legs]
    group = [leg for leg in shared if cover.needed(leg, *covered)]
    displaced, unfolded = dimensions[:count], dimensions[count:]
    halves, channels = [], []
    for side, value in enumerate((a, b)):
        inputs = [x.i[side] for x in dimensions]
        own = [leg for leg in value.legs if leg not in (*shared, *inputs)]
        kept = [leg for leg in own if cover.needed(leg, *covered)]
        writer, array = writer.sum(value.array, [value.legs.index(x) for x in own if x not in kept])
        value = Value(array, tuple(leg for leg in value.legs if leg not in own or leg in kept))
        summed = [leg for leg in shared if leg not in group]
        lengths = [x.span for x in dimensions]
        if count == 2:
            lengths[1] = _gapped(dimensions[1], value.array.shape[value.legs.index(inputs[1])])
        places = list(zip(inputs, dimensions, lengths, strict=True))
        writer, array = _arranged(writer, value, places, (group, summed, kept))
        halves.append(array)
        channels.append([*(x.k[side] for x in unfolded), *kept])
    if count == 2 and writer.seconds + _least_seconds(halves, *displaced) >= most:
        return None
    for side in (0, 1):
        writer, array = _unfolded(writer, halves[side], 1 + count, unfolded)
        writer, halves[side] = _flat(writer, array) if count == 2 else (writer, array)
    writer, rows = _rows(writer, halves[0], halves[1], displaced)
    taps = [x.k[side] for side in (0, 1) for x in displaced]
    legs = [*group, *taps, *channels[0], *channels[1]]
    writer, value = _joined(writer, rows, legs, taps[0], network)
    return cover.put(writer, covered, value, "displacement")


def _joined(
    writer: Writer, rows: Sequence[Strided], legs: Sequence[Leg], tap: Leg, network: TensorNetwork
) -> tuple[Writer, Value]:
    """The rows, one for each position of ``tap``, as one tensor in the order of the result."""
    order = sorted(legs, key=[*network.result.legs, *legs].index)
    left = tuple(leg for leg in legs if leg != tap)
    parts = []
    for row in rows:
        writer, array = writer.reshape(row, [network.sizes[leg] for leg in left])
        parts.append(Value(array, left).arranged([leg for leg in order if leg != tap]))
    writer, array = _stack(writer, parts, order.index(tap), "all pairs of taps")
    return writer, Value(array, tuple(order))


def _least_seconds(halves: Sequence[Strided], first: Dimension, second: Dimension) -> float:
    """The products of two displaced dimensions alone, over what windows have in common."""
    (groups, *_, rows, m), n = halves[0].shape, halves[1].shape[-1]
    inner = {same: len(second.pairs(symmetric=same)) for same in (True, False)}
    return sum(
        inner[outer.shift == 0]
        * cost.matmul(groups, m, n, outer.core[1] * second.outputs * rows).seconds
        for outer in first.pairs(symmetric=True)
    )


def _gapped(x: Dimension, size: int) -> int:
    """A length with so many zeros behind the span that shifted rows meet no other row's entries."""
    zeros = max(0, x.padding) + max(0, x.span - x.padding - size) if x.stride == 1 else 0
    return x.stride * (x.outputs + x.furthest + max(0, x.furthest - zeros))


def _arranged(
    writer: Writer,
    value: Value,
    places: Sequence[tuple[Leg, Dimension, int]],
    legs: tuple[Sequence[Leg], Sequence[Leg], Sequence[Leg]],
) -> tuple[Writer, Strided]:
    """``(group, *positions, summed, channels)``; positions have (leg, dimension, padded length).

    What windows do not reach is cut off: behind them are zeros.
    """
    pads, array = [(0, 0)] * len(value.legs), value.array
    for leg, x, length in places:
        at = value.legs.index(leg)
        array = array.narrow(at, 0, min(array.shape[at], max(0, x.span - x.padding)))
        pads[at] = (x.padding, length - x.padding - array.shape[at])
    writer, padded = writer.pad(array, pads)
    size = dict(zip(value.legs, padded.shape, strict=True))
    group, summed, own = legs
    array = Value(padded, value.legs).arranged(
        [*group, *(leg for leg, *_ in places), *summed, *own]
    )
    flat = [prod(size[leg] for leg in some) for some in legs]
    return writer.reshape(array, [flat[0], *(length for *_, length in places), *flat[1:]])


def _unfolded(
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


def _flat(writer: Writer, array: Strided) -> tuple[Writer, Strided]:
    """``(g, t1, t2, rows, c)`` as it lies in memory, for flat rows and for strips of them."""
    shape = array.shape
    writer, flat = writer.reshape(array, [shape[0], prod(shape[1:-1]), shape[-1]])
    array = flat.free_reshape(shape) or array
    return writer, array


def _rows(
    writer: Writer, left: Strided, right: Strided, dimensions: Sequence[Dimension]
) -> tuple[Writer, list[Strided]]:
    """For each k1 ``[g, k2, .., k1', k2', .., c, c']`` of halves ``(g, t1, t2, .., rows, c)``."""
    first, *rest = dimensions
    blocks: dict[tuple[int, int], Strided] = {}
    for shared in first.pairs(symmetric=left == right):
        writer, halves = _phases(writer, (left, right), 1, shared, first.stride)
        writer, core = _core(writer, halves, shared, rest)
        if len(shared.pairs) > 1:
            writer, strips = _strips(writer, halves, shared, rest)
            writer, core = _combined(writer, ADD, core, strips)
        blocks |= {pair: core.select(1, at) for at, pair in enumerate(shared.pairs)}
    return _table(writer, blocks, first.taps, len(rest))


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
    writer: Writer, halves: Sequence[Strided], shared: Shared, rest: Sequence[Dimension]
) -> tuple[Writer, Strided]:
    """What all pairs have in common: ``[g, 1, *k, *k', c, c']``."""
    if rest:
        writer, rows = _flat_rows(writer, halves, shared, rest[0])
        writer, array = _stack(writer, rows, 1, "all pairs of taps")
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
    writer: Writer, halves: Sequence[Strided], outer: Shared, second: Dimension
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
        writer, whole = _offset_product(writer, pair, outer, shared)
        whole = whole.unsqueeze(1)
        if len(shared.pairs) > 1:
            writer, others = _others(writer, pair, outer, shared)
            writer, whole = _combined(writer, SUBTRACT, whole, others)
        blocks |= {pair: whole.select(1, at) for at, pair in enumerate(shared.pairs)}
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
        writer, row = _stack(writer, parts, 1 + inner, f"tap {k} and all others")
        rows.append(row)
    return writer, rows


def _stack(
    writer: Writer, parts: Sequence[Strided], dim: int, comment: str
) -> tuple[Writer, Strided]:
    like = parts[0]
    shape = (*like.shape[:dim], len(parts), *like.shape[dim:])
    inner = prod(like.shape[dim:])
    copies = [
        cost.copy(like.size, min(row, inner), *others).seconds - cost.launch()
        for row, *others in (part.innermost for part in parts)
    ]
    kernel = replace(cost.copy(prod(shape), inner), seconds=cost.launch() + sum(copies))
    return writer.run(STACK, parts, shape, kernel, comment, (dim,))


def _cat(writer: Writer, parts: Sequence[Strided], dim: int) -> tuple[Writer, Strided]:
    like, length = parts[0], sum(part.shape[dim] for part in parts)
    shape = (*like.shape[:dim], length, *like.shape[dim + 1 :])
    kernel = cost.copy(prod(shape), prod(like.shape[dim + 1 :]))
    return writer.run(CONCATENATE, parts, shape, kernel, "border strips", (dim,))


def _product(writer: Writer, left: Strided, right: Strided) -> tuple[Writer, Strided]:
    """``(g, rows, c)`` and ``(g, rows, c')`` to ``(g, c, c')``."""
    (groups, rows, m), n = left.shape, right.shape[-1]
    copied = [half.size for half in (left, right) if groups > 1 and half.run < half.size]
    kernel = replace(cost.matmul(groups, m, n, rows), scratch=cost.bytes_per_entry() * sum(copied))
    return writer.run(MATMUL, [left.mT, right], (groups, m, n), kernel, "products")


def _strips(
    writer: Writer, halves: Sequence[Strided], shared: Shared, rest: Sequence[Dimension]
) -> tuple[Writer, Strided]:
    """What each pair has beside the core, ``[g, pair, *k, *k', c, c']``, by unfolding the rest."""
    groups, pairs, parts = halves[0].shape[0], len(shared.pairs), []
    for array, shift in zip(halves, (0, shared.shift), strict=True):
        pieces = [array.narrow(1, start + shift, length) for start, length in shared.strips]
        writer, strip = _cat(writer, pieces, 1)
        writer, strip = _unfolded(writer, strip, 2, rest)
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
