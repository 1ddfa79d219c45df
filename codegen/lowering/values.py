"""Lowering of affine views: operands into dense values, and dense values into results."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from tnconv.codegen.lowering.operations import Operation
from tnconv.codegen.lowering.overlaps import Overlap, overlapped
from tnconv.codegen.lowering.strided import Strided
from tnconv.codegen.lowering.writer import Step, Writer
from tnconv.codegen.prices import cost
from tnconv.diagrams.affine import Axis, Leg, Sizes, View, reach

DIAG_EMBED = Operation("diag_embed", lambda x: f"torch.diag_embed({x})", imports=("torch",))


@dataclass(unsafe_hash=True)  # in place of frozen, which takes three times as long to make
class Value:
    """A dense tensor with one dimension per leg, in this order."""

    array: Strided
    legs: tuple[Leg, ...]

    @cached_property
    def sizes(self) -> dict[Leg, int]:
        return dict(zip(self.legs, self.array.shape, strict=True))

    def arranged(self, legs: Sequence[Leg]) -> Strided:
        """The array with its dimensions in the order of ``legs``."""
        return self.array.permute([self.legs.index(leg) for leg in legs])


def read(writer: Writer, array: Strided, view: View, sizes: Sizes) -> tuple[Writer, Value]:
    """The operand ``array`` read through ``view``: reshape, pad, windows, diagonals, flips.

    Everything is a strided view, except zero padding where an axis reaches outside of the array,
    and flips where a coefficient is negative.
    """
    key = array, view, tuple([sizes[leg] for leg in view.legs])
    if (known := writer.readings.get(key)) is None:  # routes read the same tensors over and over
        known = writer.readings[key] = _reading(array, view, sizes)
    steps, value = known
    for step in steps:
        writer = writer.with_step(step)
    return writer, value


def _reading(array: Strided, view: View, sizes: Sizes) -> tuple[tuple[Step, ...], Value]:
    """The steps that reading takes, and the value."""
    writer, axes = Writer(), _proper(view)
    split = array.free_reshape([axis.size for axis in axes])
    assert split is not None
    pads = [axis.overhang(sizes) for axis in axes]
    writer, array = writer.pad(split, pads)
    dims: list[Axis | tuple[Leg, int]] = list(axes)
    for axis, (before, _) in zip(axes, pads, strict=True):
        array = _read_axis(array, dims, axis, before, sizes)
    terms = [dim for dim in dims if isinstance(dim, tuple)]
    writer, array = writer.flip(array, [at for at, (_, a) in enumerate(terms) if a < 0])
    names = [leg for leg, _ in terms]
    while repeated := [leg for leg in names if names.count(leg) > 1]:
        first, second = [at for at, leg in enumerate(names) if leg == repeated[0]][:2]
        array = array.diagonal(first, second)
        names = [*names[:first], *names[first + 1 : second], *names[second + 1 :], repeated[0]]
    return writer.steps, Value(array, tuple(names))


def _proper(view: View) -> tuple[Axis, ...]:
    """The axes without constant ones of size one, which a reshape drops and adds."""
    return tuple(axis for axis in view.axes if axis.terms or axis.offset or axis.size != 1)


def _read_axis(
    array: Strided, dims: list[Axis | tuple[Leg, int]], axis: Axis, before: int, sizes: Sizes
) -> Strided:
    """Turn the dimension of one axis into those of its terms; ``dims`` follows the dimensions."""
    dim = next(at for at, other in enumerate(dims) if other is axis)
    if not axis.terms:
        del dims[dim]
        return array.select(dim, axis.offset + before)
    start = axis.offset + before + reach(axis.terms, sizes)[0]
    *outer, last = sorted(axis.terms, key=lambda term: -abs(term[1]))
    if outer:
        array = array.narrow(dim, start, _span([*outer, last], sizes))
        start = 0
    for at, term in enumerate(outer, 1):
        array = array.unfold(dim, _span([*outer[at:], last], sizes), abs(term[1]))
        dims[dim] = term
        dims.append(axis)
        dim = len(dims) - 1
    dims[dim] = last
    return array.narrow(dim, start, sizes[last[0]], abs(last[1]))


def _span(terms: Sequence[tuple[Leg, int]], sizes: Sizes) -> int:
    return sum(abs(a) * (sizes[leg] - 1) for leg, a in terms) + 1


def write(writer: Writer, value: Value, view: View, sizes: Sizes) -> tuple[Writer, Strided]:
    """The adjoint of `read`: add a dense value into zeros where ``view`` points.

    Legs that the value lacks broadcast. Axes whose legs nest (each step exceeds what the smaller
    ones span) are padded and flattened; where they overlap, shifted parts are added.
    """
    array, names, shape = value.array, list(value.legs), view.shape
    view = View(tuple(axis.size for axis in _proper(view)), _proper(view))
    for leg in view.legs:
        if leg not in names:
            names.append(leg)
            array = array.unsqueeze(len(names) - 1)
            array = array.expand([*array.shape[:-1], sizes[leg]])
    writer, array, order = _spread_diagonals(writer, array, names, view)
    array = array.permute([names.index(name) for name in order])
    flips = [
        dim
        for dim, (axis, term) in enumerate(_places(view.axes))
        if dict(view.axes[axis].terms)[term] < 0
    ]
    writer, array = writer.flip(array, flips)
    writer, array = _embed(writer, array, view.axes, sizes)
    return writer.reshape(array, shape)


def overlaps(view: View, sizes: Sizes) -> int:
    """How many shifted parts `write` adds up."""
    parts = 1
    for axis in view.axes:
        if not _nested(axis, sizes):
            legs = [sizes[leg] for leg, _ in axis.terms]
            parts *= prod(legs) // max(1, *legs)
    return parts


def _nested(axis: Axis, sizes: Sizes) -> bool:
    """Whether each step of the axis exceeds what the smaller ones span."""
    terms = sorted(axis.terms, key=lambda t: -abs(t[1]))
    return all(abs(a) >= _span(terms[at + 1 :], sizes) for at, (_, a) in enumerate(terms))


def _gapped(axis: Axis) -> bool:
    """Whether the axis is one leg with zeros between its positions."""
    return len(axis.terms) == 1 and abs(axis.terms[0][1]) > 1


def _places(axes: Sequence[Axis]) -> list[tuple[int, Leg]]:
    """Axis and leg of every dimension that `_embed` expects: larger steps first in an axis."""
    return [
        (at, leg)
        for at, axis in enumerate(axes)
        for leg, _ in sorted(axis.terms, key=lambda t: -abs(t[1]))
    ]


def _spread_diagonals(
    writer: Writer, array: Strided, names: list[Leg], view: View
) -> tuple[Writer, Strided, list[Leg]]:
    """Give a leg that several axes hold one dimension for each; returns the order of dimensions."""
    order: list[Leg] = []
    for _, leg in _places(view.axes):
        name = leg
        while name in order:
            name += "\0"
        if name not in names:
            at = names.index(leg)
            array = array.permute([*(d for d in range(len(names)) if d != at), at])
            names.append(names.pop(at))
            names.append(name)
            shape = (*array.shape, array.shape[-1])
            kernel = cost.copy(prod(shape), array.shape[-1], array.shape[-1], read=array.size)
            writer, array = writer.run(DIAG_EMBED, [array], shape, kernel, f"diagonal in {leg}")
        order.append(name)
    return writer, array, order


def _embed(
    writer: Writer, array: Strided, axes: Sequence[Axis], sizes: Sizes
) -> tuple[Writer, Strided]:
    """Flatten the dimensions of each axis's legs into one of the axis's size."""
    writer, array, done = _overlapped(writer, array, axes, sizes)
    dim = 0
    for axis in axes:
        if axis not in done and axis.plain(sizes) is None:
            steps = sorted((abs(a) for _, a in axis.terms), reverse=True)
            low = axis.offset + reach(axis.terms, sizes)[0]
            writer, array = _embed_nested(writer, array, dim, steps)
            pads = [(0, 0)] * len(array.shape)
            pads[dim] = (low, axis.size - low - array.shape[dim])
            writer, array = writer.pad(array, pads)
        dim += 1
    return writer, array


def _overlapped(
    writer: Writer, array: Strided, axes: Sequence[Axis], sizes: Sizes
) -> tuple[Writer, Strided, list[Axis]]:
    """Axes whose legs do not nest, or leave gaps: one dimension where those of its legs are."""
    loose = [axis for axis in axes if not _nested(axis, sizes) or _gapped(axis)]
    if not loose:
        return writer, array, loose
    places = _places(axes)
    others, taps, outputs, found = [], [], [], []
    for at, axis in enumerate(axes):
        own = [dim for dim, (of, _) in enumerate(places) if of == at]
        if axis not in loose:
            others += own
            continue
        steps = [abs(a) for _, a in sorted(axis.terms, key=lambda t: -abs(t[1]))]
        longest = max(own, key=lambda dim: array.shape[dim])
        taps += [dim for dim in own if dim != longest]
        outputs.append(longest)
        start = axis.offset + reach(axis.terms, sizes)[0]
        step = dict(zip(own, steps, strict=True))
        rest = tuple(step[dim] for dim in own if dim != longest)
        found.append(Overlap(axis.size, start, step[longest], rest))
    writer, result = overlapped(writer, array.permute([*others, *taps, *outputs]), found)
    order = sorted([*others, *outputs])
    return writer, result.permute([[*others, *outputs].index(dim) for dim in order]), loose


def _embed_nested(
    writer: Writer, array: Strided, dim: int, steps: Sequence[int]
) -> tuple[Writer, Strided]:
    """Flatten dimensions from ``dim`` on to one, with entries at multiples of their ``steps``."""
    if not steps:
        return writer, array.unsqueeze(dim)
    inner = dim + len(steps) - 1
    array = array.unsqueeze(inner + 1)  # the gap behind each entry
    for at in range(inner, dim - 1, -1):
        pads = [(0, 0)] * len(array.shape)
        pads[at + 1] = (0, steps[at - dim] - array.shape[at + 1])
        writer, array = writer.pad(array, pads)
        merged = array.shape[at] * array.shape[at + 1]
        shape = (*array.shape[:at], merged, *array.shape[at + 2 :])
        writer, array = writer.reshape(array, shape)
    return writer, array
