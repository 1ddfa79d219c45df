"""Pixel Gram: two tensors multiplied before their patterns, which become shifted sums."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from tnconv.codegen.lowering.covers import Cover
from tnconv.codegen.lowering.pairs import pair
from tnconv.codegen.lowering.strided import Strided
from tnconv.codegen.lowering.values import Value
from tnconv.codegen.lowering.writer import ADD, Writer
from tnconv.codegen.prices import cost
from tnconv.codegen.routes.window import window_on
from tnconv.diagrams.affine import Leg, Sizes

MOST_TAPS = 16  # shifted parts to add, one line of source for each
MOST_ENTRIES = 2**26  # of the Gram matrix of pixels


@dataclass(frozen=True)
class Window:
    """``i = start + step·o + tap·k`` with step, tap > 0, of the tensor node ``holder``."""

    at: int
    holder: int
    i: Leg
    o: Leg
    k: Leg
    start: int
    step: int
    tap: int


def pixel_gram(cover: Cover) -> Iterator[Cover]:
    """``A[o, o'] = Σ_{k,i,i',c} x[c, i] Π[k, o, i] x'[c, i'] Π'[k, o', i']``, pixels first.

    ``Q[i, i'] = Σ_c x[c, i] x'[c, i']`` is one matrix product; ``A[o, o'] = Σ_k Q[i(o, k),
    i'(o', k)]`` adds K shifted parts of it in each dimension. Few pixels, many channels: cheaper by
    a factor of the kernel's size than unfolding both.
    """
    if (pairs := _pairs(cover)) is None:
        return
    first, second = pairs[0][0].holder, pairs[0][1].holder
    covered = (first, second, *(window.at for windows in pairs for window in windows))
    cover, a = cover.value(first)
    cover, b = cover.value(second)
    kept = {window.i for windows in pairs for window in windows}
    kept |= {leg for value in (a, b) for leg in value.legs if cover.needed(leg, *covered)}
    size = dict(zip(a.legs + b.legs, a.array.shape + b.array.shape, strict=True))
    if prod(size[leg] for leg in kept if leg in size) > MOST_ENTRIES:
        return
    writer, value = pair(cover.writer, a, b, kept, a.legs + b.legs)
    for windows in pairs:
        writer, value = _shifted(writer, value, windows, cover.network.sizes)
    yield cover.put(writer, covered, value, "pixel gram")


def _pairs(cover: Cover) -> list[tuple[Window, Window]] | None:
    """Pairs of patterns that share a summed leg, all between the first pattern's two tensors."""
    found: list[tuple[Window, Window]] = []
    taken: set[int] = set()
    for at, pattern in cover.network.patterns:
        for k in pattern.legs if at not in taken else ():
            if (windows := _pair(cover, at, k)) is not None:
                if not found or _holders(windows) == _holders(found[0]):
                    found.append(windows)
                    taken |= {window.at for window in windows}
                    break
        if not found:
            return None
    return found


def _holders(windows: tuple[Window, Window]) -> tuple[int, int]:
    return windows[0].holder, windows[1].holder


def _pair(cover: Cover, at: int, k: Leg) -> tuple[Window, Window] | None:
    """The two patterns that alone hold k, the first at ``at``, as windows of two tensors."""
    tn = cover.network
    held = tn.holders[k]
    if k in tn.open_legs or len(held) != 2 or held[0] != at or tn.sizes[k] > MOST_TAPS:
        return None
    one, other = (_window(cover, p, k) for p in held)
    if one is None or other is None or one.holder == other.holder or one.o == other.o:
        return None
    return one, other


def _window(cover: Cover, at: int, k: Leg) -> Window | None:
    found = window_on(cover.network, at)
    if found is None or k not in found[2]:
        return None
    holder, i, steps, padding = found
    (o,) = (leg for leg in steps if leg != k)
    if o in cover.network.nodes[holder].legs:
        return None
    return Window(at, holder, i, o, k, -padding, steps[o], steps[k])


def _shifted(
    writer: Writer, value: Value, windows: tuple[Window, Window], sizes: Sizes
) -> tuple[Writer, Value]:
    """``Σ_k`` of the parts of ``value`` at i(o, k) and i'(o', k): legs o and o' for i and i'."""
    dims = [value.legs.index(window.i) for window in windows]
    pads, taps = [(0, 0)] * len(value.legs), sizes[windows[0].k]
    for dim, window in zip(dims, windows, strict=True):
        end = window.start + window.step * (sizes[window.o] - 1) + window.tap * (taps - 1)
        pads[dim] = (max(0, -window.start), max(0, end + 1 - value.array.shape[dim]))
    writer, whole = writer.pad(value.array, pads)
    total: Strided | None = None
    for k in range(taps):
        part = whole
        for dim, window in zip(dims, windows, strict=True):
            first = window.start + pads[dim][0] + window.tap * k
            part = part.narrow(dim, first, sizes[window.o], window.step)
        if total is None:
            total = part
        else:
            kernel = cost.copy(part.size, *part.innermost, read=2 * part.size)
            comment = f"shifted by {windows[0].k}"
            writer, total = writer.run(ADD, [total, part], part.shape, kernel, comment)
    assert total is not None
    names = {window.i: window.o for window in windows}
    return writer, Value(total, tuple(names.get(leg, leg) for leg in value.legs))
