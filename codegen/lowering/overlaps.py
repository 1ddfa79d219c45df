"""Writing windows that overlap: shift and accumulate, or torch's fold."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

from tnconv.codegen.lowering.operations import Operation
from tnconv.codegen.lowering.strided import Strided
from tnconv.codegen.lowering.writer import Writer, cheapest
from tnconv.codegen.prices import cost

OVERLAP_ADD = '''def overlap_add(x, sizes, starts, steps, taps):
    """The sum over k of x[.., k, o] at starts + taps * k + steps * o, as far as that is in sizes.

    There is a start and a step for each of the last dimensions o, and for each of those before, k,
    a pair: the dimension to which it belongs, and its step.
    """
    first = x.dim() - len(sizes) - len(taps)
    y = x.new_zeros(*x.shape[:first], *sizes)
    for k in itertools.product(*map(range, x.shape[first : first + len(taps)])):
        part, into = x, y
        for position in k:
            part = part.select(first, position)
        for dim, (size, start, step) in enumerate(zip(sizes, starts, steps)):
            start += sum(tap * at for at, (of, tap) in zip(k, taps) if of == dim)
            low = max(0, -(start // step))
            count = min(part.shape[first + dim], (size - 1 - start) // step + 1) - low
            if count > 0:
                span = slice(start + low * step, start + (low + count - 1) * step + 1, step)
                into = into[(..., span, *[slice(None)] * (len(sizes) - 1 - dim))]
                part = part.narrow(first + dim, low, count)
            else:
                part = part.narrow(first + dim, 0, 0)
                into = into.narrow(first + dim, 0, 0)
        into.add_(part)
    return y
'''


def _overlap_add(x: str, *numbers: Sequence[object]) -> str:
    *others, taps = numbers
    return f"overlap_add({', '.join(map(str, (x, *others, [*taps])))})"


OVERLAP = Operation("overlap_add", _overlap_add, imports=("itertools",), helper=OVERLAP_ADD)
FOLD = Operation("fold", lambda *xs: f"F.fold({', '.join(map(str, xs))})", imports=("F",))


@dataclass(frozen=True)
class Overlap:
    """An axis of ``size`` that ``start + Σ taps·k + step·o`` points into, all steps positive."""

    size: int
    start: int
    step: int
    taps: tuple[int, ...]


def overlapped(writer: Writer, array: Strided, axes: Sequence[Overlap]) -> tuple[Writer, Strided]:
    """``(.., k, .., o, ..)`` to ``(.., i, ..)``: all taps of all axes, then the outputs of each."""
    ways = [partial(_added, array, axes)]
    if len(axes) <= 2 and all(len(x.taps) <= 1 for x in axes):
        ways.append(partial(_folded, array, axes))
    return cheapest("overlap", writer, ways)


def _added(array: Strided, axes: Sequence[Overlap], writer: Writer) -> tuple[Writer, Strided]:
    """Each part added in turn into a tensor of zeros."""
    sizes, starts, steps = zip(*((x.size, x.start, x.step) for x in axes), strict=True)
    taps = tuple((at, tap) for at, x in enumerate(axes) for tap in x.taps)
    lead = array.shape[: len(array.shape) - len(axes) - len(taps)]
    shape, parts = (*lead, *sizes), prod(array.shape[len(lead) : len(lead) + len(taps)])
    row, step, rows, _ = array.innermost
    if len(axes) > 1:  # rows of each part lie in two dimensions of the result
        rows = array.shape[-2]
    step = max(step, steps[-1])
    kernel = cost.shifted(array.size, prod(shape), parts, min(row, array.shape[-1]), step, rows)
    numbers = sizes, starts, steps, taps
    return writer.run(OVERLAP, [array], shape, kernel, "add parts that overlap", numbers)


def _folded(array: Strided, axes: Sequence[Overlap], writer: Writer) -> tuple[Writer, Strided]:
    """Torch's fold, in one or two dimensions of at most one tap leg each."""
    lead = array.shape[: len(array.shape) - sum(1 + len(x.taps) for x in axes)]
    outputs, left = array.shape[-len(axes) :], iter(array.shape[len(lead) :])
    kernel = [next(left) if x.taps else 1 for x in axes]
    dilation = [sum(x.taps) or 1 for x in axes]
    spans = [
        x.step * (o - 1) + d * (k - 1) + 1
        for x, o, k, d in zip(axes, outputs, kernel, dilation, strict=True)
    ]
    rests = [x.size - 2 * x.start - span for x, span in zip(axes, spans, strict=True)]
    whole = all(x.start <= 0 <= rest < x.step for x, rest in zip(axes, rests, strict=True))
    sizes = [x.size for x in axes] if whole else spans
    padding = [-x.start if whole else 0 for x in axes]
    one = (1,) * (2 - len(axes))
    numbers = [(*one, *sizes), (*one, *kernel), (*one, *dilation)]
    numbers += [(*(0 for _ in one), *padding), (*one, *(x.step for x in axes))]
    samples, channels = (lead[0], prod(lead[1:])) if lead else (1, 1)
    writer, columns = writer.reshape(array, [samples, channels * prod(kernel), prod(outputs)])
    shape = (samples, channels, *one, *sizes)
    work = replace(cost.fold(array.size, prod(shape)), scratch=cost.bytes_per_entry() * array.size)
    if columns.run < columns.size:  # torch copies them first
        copied = cost.copy(array.size, *columns.innermost).seconds
        work = replace(work, seconds=work.seconds + copied, scratch=2 * work.scratch)
    writer, folded = writer.run(FOLD, [columns], shape, work, "fold", tuple(numbers))
    result = folded.free_reshape([*lead, *sizes])
    assert result is not None
    if whole:
        return writer, result
    pads = [(x.start, x.size - x.start - size) for x, size in zip(axes, sizes, strict=True)]
    return writer.pad(result, [*((0, 0) for _ in lead), *pads])
