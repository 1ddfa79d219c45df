"""Numbers in steps as expressions of one size, found from the same steps at several sizes."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from math import isclose
from typing import TypeVar

from tnconv.codegen.lowering.schedule import Schedule
from tnconv.codegen.lowering.strided import Strided, strided
from tnconv.codegen.lowering.turns import Turns
from tnconv.codegen.lowering.writer import Step

POWERS = (0.5, 1.0, 2.0, -1.0, -0.5)  # of a size by which means divide, or their roots; counts
EXACT = 1e-12  # relative; factors are doubles
T = TypeVar("T")


class Different(Exception):  # an answer rather than an error
    """The steps differ in structure between sizes, or no expression fits their numbers."""


@dataclass(frozen=True)
class Affine:
    """``each · size + constant``, printed with the name of the size."""

    each: int
    constant: int
    name: str

    def __add__(self, other: "int | Affine") -> "int | Affine":
        if isinstance(other, Affine):
            return _affine(self.each + other.each, self.constant + other.constant, self.name)
        return Affine(self.each, self.constant + other, self.name)

    def __mul__(self, factor: int) -> "int | Affine":
        return _affine(self.each * factor, self.constant * factor, self.name)

    def __sub__(self, other: "int | Affine") -> "int | Affine":
        return self + other * -1

    def __rsub__(self, other: int) -> "int | Affine":
        return self * -1 + other

    __radd__, __rmul__ = __add__, __mul__

    def __gt__(self, other: int) -> bool:
        """Whether it exceeds a number at size two, the least for which such programs run."""
        return 2 * self.each + self.constant > other

    def at(self, size: int) -> int:
        return self.each * size + self.constant

    def __repr__(self) -> str:
        scaled = self.name if self.each == 1 else f"{self.each} * {self.name}"
        if not self.constant:
            return scaled
        return f"{scaled} {'+' if self.constant > 0 else '-'} {abs(self.constant)}"


def _affine(each: int, constant: int, name: str) -> int | Affine:
    return Affine(each, constant, name) if each else constant


@dataclass(frozen=True)
class Share:
    """``total / size ** power``: the factor of a mean, the root of one, or a count."""

    total: float
    power: float
    name: str

    def __repr__(self) -> str:
        power = "" if abs(self.power) == 1 else f" ** {abs(self.power):g}"
        return f"({self.total!r} {'/' if self.power > 0 else '*'} {self.name}{power})"


def generalized(schedules: Sequence[tuple[int, Schedule]], name: str) -> Schedule:
    """The steps of the first schedule, with numbers as expressions of the size that is ``name``.

    All schedules compute one network, each at another size. Shapes, strides and prices stay those
    of the first. Three sizes are enough: integers in steps are products of sizes, or minima or
    maxima of affine expressions, so that one which meets a line at three sizes is that line
    between them.

    Raises:
        Different: the structures differ, or numbers are no such expressions.
    """
    sizes = [size for size, _ in schedules]
    every = [schedule for _, schedule in schedules]
    found = _Found(sizes, name)
    steps = found.steps([schedule.steps for schedule in every])
    outputs = [found.value(values) for values in _zipped([each.outputs for each in every])]
    return Schedule(steps, tuple(outputs))


def depends(schedule: Schedule) -> bool:
    """Whether any number in a schedule depends on the size."""
    views = (view for output in schedule.outputs for view in output.views)
    steps = (step.value for step in schedule.steps)
    return any(map(varies, steps)) or any(_varies(view.attributes) for view in views)


def varies(value: Strided) -> bool:
    """Whether the step of a value, or a view that it reads, has numbers that depend on the size."""
    return _varies(value.attributes) or any(
        _varies(view.attributes) for each in value.inputs for view in each.views
    )


def _varies(attribute: object) -> bool:
    match attribute:
        case Affine() | Share():
            return True
        case tuple():
            return any(map(_varies, attribute))
        case Turns():
            return any(varies(step.value) for step in attribute.steps)
    return False


def _zipped(several: Sequence[Sequence[T]]) -> list[tuple[T, ...]]:
    if len({len(each) for each in several}) > 1:
        raise Different
    return list(zip(*several, strict=True))


class _Found:
    """Generalizes values, given what each is at every size, and remembers them."""

    def __init__(self, sizes: Sequence[int], name: str) -> None:
        self.sizes, self.name = sizes, name
        self.known: dict[tuple[Strided, ...], Strided] = {}

    def steps(self, several: Sequence[Sequence[Step]]) -> tuple[Step, ...]:
        found = []
        for each in _zipped(several):
            comment = each[0].comment if len({step.comment for step in each}) == 1 else ""
            value = self.value([step.value for step in each])
            found.append(replace(each[0], value=value, comment=comment))
        return tuple(found)

    def value(self, values: Sequence[Strided]) -> Strided:
        key = tuple(values)
        if (known := self.known.get(key)) is None:
            known = self.known[key] = self._made(values)
        return known

    def _made(self, values: Sequence[Strided]) -> Strided:
        first, *others = values
        if any(each.operation is not first.operation for each in others):
            raise Different
        inputs = tuple(self.value(each) for each in _zipped([value.inputs for value in values]))
        attributes = tuple(self._number(each) for each in _zipped([v.attributes for v in values]))
        return strided(first.operation, inputs, attributes, first.shape, first.strides)

    def _number(self, numbers: Sequence[Hashable]) -> Hashable:
        first, *others = numbers
        kinds = {type(each) for each in numbers}
        if len(kinds) > 1:
            raise Different
        if isinstance(first, tuple):
            several: Sequence[tuple[Hashable, ...]] = numbers  # type: ignore[assignment]
            return tuple(self._number(each) for each in _zipped(several))
        if isinstance(first, Turns):
            return self._turns(numbers)  # type: ignore[arg-type]
        if all(other == first for other in others):
            return first
        if kinds == {int}:
            return self._integer(numbers)  # type: ignore[arg-type]
        if kinds == {float}:
            return self._share(numbers)  # type: ignore[arg-type]
        raise Different

    def _turns(self, several: Sequence[Turns]) -> Turns:
        parts = tuple(self.value(each) for each in _zipped([turns.parts for turns in several]))
        steps = self.steps([turns.steps for turns in several])
        outputs = [self.value(each) for each in _zipped([turns.outputs for turns in several])]
        return Turns(parts, steps, tuple(outputs))

    def _integer(self, numbers: Sequence[int]) -> int | Affine:
        (low, first), *_, (high, last) = sorted(zip(self.sizes, numbers, strict=True))
        each, rest = divmod(last - first, high - low)
        constant = first - each * low
        if rest or any(
            each * size + constant != number
            for size, number in zip(self.sizes, numbers, strict=True)
        ):
            raise Different
        return _affine(each, constant, self.name)

    def _share(self, numbers: Sequence[float]) -> Share:
        for power in POWERS:
            totals = [n * size**power for size, n in zip(self.sizes, numbers, strict=True)]
            if all(isclose(total, totals[0], rel_tol=EXACT) for total in totals):
                return Share(totals[0], power, self.name)
        raise Different
