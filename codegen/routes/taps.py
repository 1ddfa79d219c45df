"""Tap sums: bands on one tensor, as sums over windows that share their core."""

from collections.abc import Iterator, Sequence
from functools import partial
from math import prod

from tnconv.codegen.lowering.covers import Cover
from tnconv.codegen.lowering.pairs import sum_out
from tnconv.codegen.lowering.strided import Strided
from tnconv.codegen.lowering.values import Value
from tnconv.codegen.lowering.writer import ADD, STACK, Writer, cheapest
from tnconv.codegen.prices import cost
from tnconv.diagrams.affine import Leg, Pattern, Tensor
from tnconv.diagrams.network import TensorNetwork
from tnconv.simplify.progressions import clip

MOST_TAPS = 128  # of a band: each is a line of source, or several
Band = tuple[Leg, Leg, int]  # summed leg i, tap leg k, the tensor that holds i


def taps(cover: Cover) -> Iterator[Cover]:
    """``R[.., k] = Σ_i x[.., i] [i - d·k ∈ band]``: every band on the first band's tensor.

    Taps of one residue class sum windows that overlap almost everywhere: the common core is summed
    once, and each tap adds its border strips. No unfolded input, one reading of x. Legs of x that
    nothing else holds are summed before, and of the orders of the bands the cheaper one is taken.
    """
    first = cover.pattern
    assert first is not None
    if (band := _band(cover, first)) is None:
        return
    tensor, network = band[2], cover.network
    bands = [(at, found) for at, _ in network.patterns if (found := _band(cover, at)) is not None]
    bands = [(at, found) for at, found in bands if found[2] == tensor]
    cover, value = cover.value(tensor)
    needed = [leg for leg in value.legs if cover.needed(leg, tensor)]
    writer, value = sum_out(cover.writer, value, needed)
    ways = [partial(_summed, network, value, order) for order in (bands, bands[::-1])]
    writer, value, covered = cheapest("taps", writer, ways)
    yield cover.put(writer, (tensor, *covered), value, "taps")


def _summed(
    network: TensorNetwork, value: Value, bands: Sequence[tuple[int, Band]], writer: Writer
) -> tuple[Writer, Value, list[int]]:
    """The sums over bands of ``value``, one after the other, and where those that fit are."""
    covered = []
    for at, (i, k, _) in bands:
        if i in value.legs and k not in value.legs:
            windows = [_window(network.nodes[at], i, k, t) for t in range(network.sizes[k])]
            clipped = [clip(window, 0, network.sizes[i] - 1) for window in windows]
            writer, value = _tap_sums(writer, value, i, k, clipped)
            covered.append(at)
    return writer, value, covered


def _band(cover: Cover, at: int) -> Band | None:
    """The band that a two-leg pattern is, if one tensor holds i and not k."""
    tn, pattern = cover.network, cover.network.nodes[at]
    assert isinstance(pattern, Pattern)
    if len(pattern.terms) != 2 or len(pattern.values) == 1:
        return None
    for (i, a), (k, _) in (pattern.terms, pattern.terms[::-1]):
        others = [other for other in tn.holders[i] if other != at]
        if abs(a) == 1 and len(others) == 1 and i not in tn.open_legs:
            tensor = tn.nodes[others[0]]
            few = tn.sizes[k] <= MOST_TAPS
            if isinstance(tensor, Tensor) and k not in tensor.legs and few:
                return i, k, others[0]
    return None


def _window(pattern: object, i: Leg, k: Leg, tap: int) -> range:
    """The positions of i that the tap meets."""
    assert isinstance(pattern, Pattern)
    a, b, v = dict(pattern.terms)[i], dict(pattern.terms)[k], pattern.values
    window = range(v.start - b * tap, v.stop - b * tap, v.step)
    return window if a == 1 else range(-window[-1], 1 - window[0], window.step)


def _tap_sums(
    writer: Writer, value: Value, i: Leg, k: Leg, windows: list[range]
) -> tuple[Writer, Value]:
    """The sums over each window of i, stacked along a new dimension k in its place."""
    dim = value.legs.index(i)
    array = value.array
    sums: list[Strided] = []
    cores = _cores(windows)
    for window in windows:
        low, high = cores[window[0] % window.step] if window else (0, -1)
        core = range(low, high + 1, window.step)
        pieces = [core] if len(core) else [window]
        if len(core):
            pieces += [range(window[0], low, window.step)]
            pieces += [range(high + window.step, window[-1] + 1, window.step)]
        total: Strided | None = None
        for piece in pieces:
            if total is None or len(piece):
                writer, part = _piece(writer, array, dim, piece)
                writer, total = _plus(writer, total, part)
        assert total is not None
        sums.append(total)
    shape = (*array.shape[:dim], len(windows), *array.shape[dim + 1 :])
    kernel = cost.copy(prod(shape), prod(shape[dim:]))
    writer, stacked = writer.run(STACK, sums, shape, kernel, f"sums over {i} for each {k}", (dim,))
    legs = tuple(k if leg == i else leg for leg in value.legs)
    return writer, Value(stacked, legs)


def _cores(windows: Sequence[range]) -> dict[int, tuple[int, int]]:
    """Of every residue class the first and the last position that all its windows share."""
    cores: dict[int, tuple[int, int]] = {}
    for window in windows:
        if window:
            residue = window[0] % window.step
            low, high = cores.get(residue, (window[0], window[-1]))
            cores[residue] = max(low, window[0]), min(high, window[-1])
    return cores


def _piece(writer: Writer, array: Strided, dim: int, window: range) -> tuple[Writer, Strided]:
    """The sum over one window; a single position is a view."""
    if len(window) == 1:
        return writer, array.select(dim, window[0])
    start = window[0] if len(window) else 0
    part = array.narrow(dim, start, len(window), window.step if len(window) else 1)
    return writer.sum(part, [dim])


def _plus(writer: Writer, total: Strided | None, part: Strided) -> tuple[Writer, Strided]:
    if total is None:
        return writer, part
    kernel = cost.elementwise(part.size, 2 * part.size)
    return writer.run(ADD, [total, part], part.shape, kernel, "border strip")
