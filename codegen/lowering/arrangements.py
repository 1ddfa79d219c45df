"""Arrangements of a pair of dense values as a matrix product, and the matrices that they take."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from tnconv.codegen.lowering.strided import Strided
from tnconv.codegen.lowering.values import Value
from tnconv.codegen.lowering.writer import Step, copying
from tnconv.diagrams.affine import Leg


@dataclass(frozen=True)
class Arrangement:
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


@dataclass(frozen=True)
class Matrix:
    """``(lead, batch, keep, summed)``, as it lies or a copy.

    Both halves of a symmetric product make the same copy, if they need one: then it runs once.
    """

    value: Value
    front: Groups
    keep: tuple[Leg, ...]
    summed: tuple[Leg, ...]

    @cached_property
    def free(self) -> Strided | None:
        """The matrix without a copy, if strides allow."""
        array, shape = self.straight
        if (free := array.free_reshape(shape)) is not None:
            return free
        array, shape = self.swapped
        return None if (free := array.free_reshape(shape)) is None else free.mT

    @cached_property
    def straight(self) -> tuple[Strided, list[int]]:
        return self._flat(*self.front, self.keep, self.summed)

    @cached_property
    def swapped(self) -> tuple[Strided, list[int]]:
        return self._flat(*self.front, self.summed, self.keep)

    def _flat(self, *groups: tuple[Leg, ...]) -> tuple[Strided, list[int]]:
        size = self.value.sizes
        array = self.value.arranged([leg for group in groups for leg in group])
        return array, [prod([size[leg] for leg in group]) for group in groups]

    def factor(self, summed_last: bool, right: bool) -> tuple[Strided, Step | None]:
        """The matrix, or its transpose as the ``right`` factor, and the copy that it takes.

        Copies have the summed legs last, or before the others.
        """
        if (known := self._factors.get((summed_last, right))) is None:
            step = None
            if (array := self.free) is None:
                step = self._copied_straight if summed_last else self._copied_swapped
                array = step.value if summed_last else step.value.mT
            known = self._factors[summed_last, right] = (array.mT if right else array, step)
        return known

    @cached_property
    def _factors(self) -> dict[tuple[bool, bool], tuple[Strided, Step | None]]:
        return {}

    @cached_property
    def _copied_straight(self) -> Step:
        return copying(*self.straight)

    @cached_property
    def _copied_swapped(self) -> Step:
        return copying(*self.swapped)


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
    """Both orders, the one first whose result has the wanted order of legs."""

    def last(value: Value, other: Value) -> int:
        own = [hint.index(leg) for leg in value.legs if leg not in other.legs and leg in hint]
        return max(own, default=-1)

    return [(a, b), (b, a)] if last(a, b) <= last(b, a) else [(b, a), (a, b)]
