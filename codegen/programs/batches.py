"""Batches: the sizes of one leg for which a program runs, and its predicted time for each."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil

from tnconv.codegen.lowering.schedule import Schedule
from tnconv.codegen.programs.sizes import Affine, depends
from tnconv.diagrams.affine import Leg
from tnconv.diagrams.expression import Expression
from tnconv.diagrams.resizing import resized

Shape = tuple[int | Affine, ...]


@dataclass(frozen=True)
class Price:
    """Predicted seconds at one size: of a program, and of the best plans that are known.

    ``held`` are the most bytes of a call, by bytes of an entry, for `ITEMS`.
    """

    size: int
    seconds: float
    least: float
    held: tuple[int, ...]

    def between(self, other: "Price", size: int) -> "Price":
        """The price for a size between both: linear, which is no less than what is held.

        What is held is the greatest of several amounts that are affine in the size.
        """
        share = (size - self.size) / (other.size - self.size)

        def linear(low: float, high: float) -> float:
            return low + share * (high - low)

        held = map(ceil, map(linear, self.held, other.held))
        seconds = linear(self.seconds, other.seconds), linear(self.least, other.least)
        return Price(size, *seconds, tuple(held))


@dataclass(frozen=True)
class Batches:
    """How a program runs for all sizes of a leg between the first and the last of its prices.

    Args:
        leg: The leg.
        own: Its size in the program's network.
        powers: For each term of each network, the power of the size that its scale divides by.
        schedule: The steps, whose numbers are expressions of the size.
        shapes: The shapes of the operands, likewise.
        prices: The predicted time of the program at a few sizes, in ascending order.
        asked: The size whose price the program tells, if it is not its own.
    """

    leg: Leg
    own: int
    powers: tuple[int, ...]
    schedule: Schedule
    shapes: Mapping[str, Shape]
    prices: tuple[Price, ...]
    asked: int | None = None

    @property
    def name(self) -> str:
        """The variable that holds the size in the program's source."""
        return next(each.name for shape in self.shapes.values() for each in _affine(shape))

    @property
    def sizes(self) -> range:
        """The sizes for which the program runs."""
        return range(self.prices[0].size, self.prices[-1].size + 1)

    @property
    def place(self) -> tuple[str, int]:
        """An operand and the dimension of it from which the size is read."""
        return next(
            (operand, dim)
            for operand, shape in self.shapes.items()
            for dim, number in enumerate(shape)
            if isinstance(number, Affine)
        )

    def line(self, arguments: Mapping[str, str]) -> str:
        """The line of the source that reads the size, if a step needs it."""
        if not depends(self.schedule):
            return ""
        operand, dim = self.place
        unit = self._unit
        divided = f" // {unit}" if unit > 1 else ""
        return f"{self.name} = {arguments[operand]}.shape[{dim}]{divided}"

    @property
    def _unit(self) -> int:
        operand, dim = self.place
        number = self.shapes[operand][dim]
        assert isinstance(number, Affine)
        return number.each

    def shapes_at(self, size: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the operands at a size."""
        return {
            operand: tuple(n.at(size) if isinstance(n, Affine) else n for n in shape)
            for operand, shape in self.shapes.items()
        }

    def size_of(self, shapes: Sequence[Sequence[int]]) -> int:
        """The size that operands of these shapes have."""
        operand, dim = self.place
        return shapes[list(self.shapes).index(operand)][dim] // self._unit

    def shapes_for(self, given: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
        """The shapes that operands should have at the size of the given ones, if that is known."""
        operand, dim = self.place
        shape = tuple(getattr(given.get(operand), "shape", ()))
        size, rest = divmod(shape[dim], self._unit) if len(shape) > dim else (0, 0)
        return self.shapes_at(size if size in self.sizes and not rest else self.own)

    def networks(self, networks: Sequence[Expression], size: int) -> tuple[Expression, ...]:
        """The program's networks for a size."""
        found = at_size(networks, self.leg, self.own, size, self.powers)
        assert found is not None
        return found

    def price(self, size: int) -> Price:
        """The price for a size: linear between the known sizes next to it."""
        for low, high in pairwise(self.prices):
            if low.size <= size <= high.size:
                return low.between(high, size)
        raise ValueError(f"size is {size}; expected one of {self.sizes}")


def _affine(shape: Iterable[int | Affine]) -> list[Affine]:
    return [number for number in shape if isinstance(number, Affine)]


def at_size(
    networks: Sequence[Expression], leg: Leg, own: int, size: int, powers: Sequence[int]
) -> tuple[Expression, ...] | None:
    """The networks for another size of a leg, with scales that divide by powers of it.

    Args:
        networks: The networks.
        leg: The leg that gets another size.
        own: The size that it has.
        size: The size that it gets.
        powers: One power for each term of each network.
    """
    if (found := resized(networks, leg, size)) is None:
        return None
    left = iter(powers)
    scaled: list[Expression] = []
    for network in found:
        factors = [Fraction(own, size) ** next(left) for _ in network.terms]
        if len(factors) == 1:
            scaled.append(network.scaled(factors[0]))
        else:
            terms = zip(network.terms, factors, strict=True)
            scaled.append(type(network)(tuple(term.scaled(f) for term, f in terms)))  # type: ignore[call-arg]
    return tuple(scaled)
