"""Arrangements of a pair of dense values as a matrix product, and the matrices that they take."""

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from math import prod
from typing import NamedTuple

from tnconv.codegen.lowering import layouts
from tnconv.codegen.lowering.layouts import Ints
from tnconv.codegen.lowering.strided import Strided
from tnconv.codegen.lowering.values import Value
from tnconv.codegen.lowering.writer import Step, copying
from tnconv.codegen.prices import cost
from tnconv.diagrams.affine import Leg


class Arrangement(NamedTuple):
    """``left @ right`` with legs (lead, batch, rows, summed) and (lead, batch, summed, columns).

    ``lead`` are legs of one side only that stay batch dimensions (the other side broadcasts), which
    saves a copy where they are not next to that side's other legs. ``rows`` and ``columns`` do not
    count them.
    """

    left: Value
    right: Value
    lead: tuple[Leg, ...]
    batch: tuple[Leg, ...]
    summed: tuple[Leg, ...]
    rows: tuple[Leg, ...]
    columns: tuple[Leg, ...]

    @property
    def legs(self) -> tuple[Leg, ...]:
        """Of the result, in order."""
        return (*self.lead, *self.batch, *self.rows, *self.columns)


Groups = tuple[tuple[Leg, ...], ...]


class Matrix:
    """``(lead, batch, keep, summed)``, as it lies or a copy.

    Both halves of a symmetric product make the same copy, if they need one: then it runs once.

    Args:
        value: The dense value.
        front: The groups of legs that are batch dimensions: lead and batch, as far as they exist.
        keep: The legs of the rows of a left factor, or of the columns of a right one.
        summed: The legs that the product sums.
    """

    def __init__(
        self, value: Value, front: Groups, keep: tuple[Leg, ...], summed: tuple[Leg, ...]
    ) -> None:
        self._value = value
        self._straight, self._swapped = (*front, keep, summed), (*front, summed, keep)
        self._factors: dict[tuple[bool, bool], tuple[Strided, Step | None]] = {}

    @property
    def entries(self) -> int:
        return self._value.array.size

    @cached_property
    def least_copy(self) -> float:
        """The seconds of the cheaper copy, or none where strides allow a view."""
        laid_out = [self._strides(groups) for groups in (self._straight, self._swapped)]
        if any(layouts.of_a_view(*each) is not None for each in laid_out):
            return 0.0
        inner = (layouts.innermost(shape, strides) for shape, strides, _ in laid_out)
        return min([cost.copy(self.entries, *loops).seconds for loops in inner])

    def factor(self, summed_last: bool, right: bool) -> tuple[Strided, Step | None]:
        """The matrix, or its transpose as the ``right`` factor, and the copy that it takes.

        Copies have the summed legs last, or before the others.
        """
        if (known := self._factors.get((summed_last, right))) is None:
            array, step = self._free, None
            if array is None:
                step = copying(*self._flat(self._straight if summed_last else self._swapped))
                array = step.value if summed_last else step.value.mT
            known = self._factors[summed_last, right] = (array.mT if right else array, step)
        return known

    @cached_property
    def _free(self) -> Strided | None:
        """The matrix as a view, if strides allow."""
        array, shape = self._flat(self._straight)
        if (free := array.free_reshape(shape)) is not None:
            return free
        array, shape = self._flat(self._swapped)
        return None if (free := array.free_reshape(shape)) is None else free.mT

    def _flat(self, groups: Groups) -> tuple[Strided, Ints]:
        """The dimensions in this order, and the shape with one dimension for each group."""
        array = self._value.arranged([leg for group in groups for leg in group])
        return array, self._shape(groups)

    def _strides(self, groups: Groups) -> tuple[Ints, Ints, Ints]:
        """Shape and strides in this order, and the shape with one dimension for each group."""
        legs, array = self._value.legs, self._value.array
        order = [legs.index(leg) for group in groups for leg in group]
        shape, strides = array.shape, array.strides
        return (
            tuple([shape[dim] for dim in order]),
            tuple([strides[dim] for dim in order]),
            self._shape(groups),
        )

    def _shape(self, groups: Groups) -> Ints:
        size = self._value.sizes
        return tuple([prod([size[leg] for leg in group]) for group in groups])


def arrangements(
    a: Value, b: Value, needed: Collection[Leg], hint: Sequence[Leg]
) -> Iterator[Arrangement]:
    """Every order of the shared legs that one value has, with either value on the left.

    ``hint`` is the order in which the legs of the result are wanted.
    """
    batch = [leg for leg in a.legs if leg in b.legs and leg in needed]
    summed = [leg for leg in a.legs if leg in b.legs and leg not in needed]
    orders = [
        tuple(tuple(sorted(some, key=value.legs.index)) for some in (batch, summed))
        for value in (a, b)
    ]
    for both, inner in dict.fromkeys(orders):
        for left, right in _oriented(a, b, hint):
            rows, columns = (
                tuple(leg for leg in value.legs if leg not in both + inner)
                for value in (left, right)
            )
            yield Arrangement(left, right, (), both, inner, rows, columns)
            wanted = (in_order(rows, hint), in_order(columns, hint))
            if wanted != (rows, columns):
                yield Arrangement(left, right, (), both, inner, *wanted)
            for cut in range(1, len(rows)):
                yield Arrangement(left, right, rows[:cut], both, inner, rows[cut:], columns)
            for cut in range(1, len(columns)):
                yield Arrangement(left, right, columns[:cut], both, inner, rows, columns[cut:])


def in_order(legs: tuple[Leg, ...], order: Sequence[Leg]) -> tuple[Leg, ...]:
    """In the order in which legs are wanted, if it is known of all."""
    return tuple(sorted(legs, key=list(order).index)) if set(legs) <= set(order) else legs


def _oriented(a: Value, b: Value, hint: Sequence[Leg]) -> list[tuple[Value, Value]]:
    """Both orders of the factors; first the one whose result has the legs in the wanted order."""

    def last(value: Value, other: Value) -> int:
        own = [hint.index(leg) for leg in value.legs if leg not in other.legs and leg in hint]
        return max(own, default=-1)

    return [(a, b), (b, a)] if last(a, b) <= last(b, a) else [(b, a), (a, b)]
