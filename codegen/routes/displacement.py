"""Displacement: Gram networks of two unfolded halves, with the products that tap pairs share.

``A[c, k, c', k'] = Σ_{n,o} x[n, c, s·o + d·k] x'[n, c', s·o + d·k']``: pairs of taps of equal
difference d·(k' - k), and equal d·k mod s, multiply the same pairs of positions, over windows that
overlap almost everywhere. The common core is multiplied once per difference, and each pair adds the
border strips beside it; displaced in two dimensions, the inner one's sum is of all windows, of
which each pair subtracts what it has not. Of two equal halves only the pairs k <= k' are computed.
Stride 1 needs about (2K - 1)^D / 2 products of channels instead of K^2D, and no unfolded input.
"""

from collections.abc import Iterator, Sequence
from math import prod

from tnconv.codegen.lowering.covers import Cover
from tnconv.codegen.lowering.strided import Strided
from tnconv.codegen.lowering.values import Value
from tnconv.codegen.lowering.writer import Writer
from tnconv.codegen.routes.displaced_bounds import least_seconds
from tnconv.codegen.routes.displaced_products import (
    Known,
    block_rows,
    flattened,
    laid_out,
    stacked,
    unfolded_taps,
)
from tnconv.codegen.routes.shared_windows import shared_dimension
from tnconv.codegen.routes.spectra import lag_products, period
from tnconv.codegen.routes.tap_pairs import Dimension
from tnconv.diagrams.affine import Leg
from tnconv.diagrams.network import TensorNetwork

MOST_PRODUCTS = 512  # of displacements in two dimensions
MOST_TAPS = 32  # per dimension: each pair of taps is part of a line of source
AS_FAST = 1.0  # times the seconds of one displaced dimension that two may take (0024)
ENOUGH = 1.5  # times the seconds of spectra that products of all displacements may take (0024)


def displacement(cover: Cover) -> Iterator[Cover]:
    """The two tensors whose patterns share the first pattern's output leg, and all such patterns.

    Offers to displace the first dimension, or the first two, and unfold the others into channels.
    """
    first = cover.pattern
    assert first is not None
    if (found := shared_dimension(cover, first)) is None:
        return
    others = [shared_dimension(cover, at) for at, _ in cover.network.patterns if at > first]
    tensors = found[0]
    dimensions = [found[1], *(other[1] for other in others if other and other[0] == tensors)]
    if any(x.taps == 1 for x in dimensions):
        return  # nothing to share; form N has no such dimension
    if all(x.taps <= MOST_TAPS and x.outputs for x in dimensions) and _meet(dimensions[0]):
        most, ways = cover.most, [(1, False)]
        if len(dimensions) > 1 and _worthwhile(dimensions[0], dimensions[1]):
            ways = [(2, True), (1, False), (2, False)]
        for count, spectral in ways:
            if way := _covered(cover, tensors, dimensions, count, most, spectral):
                yield way
                most = min(most, (AS_FAST if count == 1 else ENOUGH) * way.writer.seconds)


def _meet(x: Dimension) -> bool:
    """Whether all windows have something in common: else hardly any products are shared."""
    return x.furthest < x.outputs


def _worthwhile(first: Dimension, second: Dimension) -> bool:
    """Whether products in both dimensions are shared, and few."""
    products = len(first.pairs(symmetric=True)) * len(second.pairs(symmetric=False))
    return _meet(second) and products <= MOST_PRODUCTS


def _covered(
    cover: Cover,
    tensors: tuple[int, int],
    dimensions: Sequence[Dimension],
    count: int,
    most: float = float("inf"),
    spectral: bool = False,
) -> Cover | None:
    """Displace ``count`` dimensions, unfold the others; unless that takes ``most`` seconds.

    The sums over all positions of two dimensions may be ``spectral``.
    """
    if spectral and any(x.stride > 1 for x in dimensions[:2]):
        return None
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
        if count == 2 and not spectral:
            lengths[1] = _gapped(dimensions[1], value.array.shape[value.legs.index(inputs[1])])
        places = list(zip(inputs, dimensions, lengths, strict=True))
        writer, array = _arranged(writer, value, places, (group, summed, kept))
        halves.append(array)
        channels.append([*(x.k[side] for x in unfolded), *kept])
    if spectral and halves[0] != halves[1]:
        return None
    least = least_seconds(halves, displaced, unfolded, spectral)
    if writer.seconds + sum(least) >= most:
        return None
    for side in (0, 1):
        writer, array = unfolded_taps(writer, halves[side], 1 + count, unfolded)
        if count == 2:
            writer, array = laid_out(writer, array) if spectral else flattened(writer, array)
        halves[side] = array
    known = None
    if spectral:
        writer, known = _all_lags(writer, halves[0], *displaced)
    if (written := block_rows(writer, halves[0], halves[1], displaced, least, known, most)) is None:
        return None
    writer, rows = written
    taps = [x.k[side] for side in (0, 1) for x in displaced]
    legs = [*group, *taps, *channels[0], *channels[1]]
    writer, value = _joined(writer, rows, legs, taps[0], network)
    return cover.put(writer, covered, value, "spectra" if spectral else "displacement")


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
    writer, array = stacked(writer, parts, order.index(tap), "all pairs of taps")
    return writer, Value(array, tuple(order))


def _all_lags(
    writer: Writer, half: Strided, first: Dimension, second: Dimension
) -> tuple[Writer, Known]:
    """The products of all positions with displaced ones."""
    lags = [
        (outer.shift, inner.shift)
        for outer in first.pairs(symmetric=True)
        for inner in second.pairs(symmetric=outer.shift == 0)
    ]
    for dim, x in enumerate((first, second), 1):  # padding has no part in sums
        start, stop = max(0, x.padding), min(x.span, x.padding + x.inputs)
        half = half.narrow(dim, start, stop - start) if start < stop else half
    periods = period(first), period(second)
    return lag_products(writer, half, list(dict.fromkeys(lags)), periods)


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
