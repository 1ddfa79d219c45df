"""Families: networks that differ in the size of one leg, and programs that serve several sizes.

A plan is written by choices, and written again by the same choices for other sizes, without a
search. Where the steps for three sizes have one structure and numbers that are affine in the size,
a program is printed that reads the size from its operands and serves all sizes between.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import count
from threading import RLock
from typing import Any

import torch

from tnconv.codegen.compiler import again
from tnconv.codegen.lowering.plans import Plan
from tnconv.codegen.lowering.schedule import ITEMS
from tnconv.codegen.prices import cost
from tnconv.codegen.prices.calibration import coefficients
from tnconv.codegen.programs.batches import Batches, Price, at_size
from tnconv.codegen.programs.joint import weight
from tnconv.codegen.programs.names import FIXED, argument_names
from tnconv.codegen.programs.program import Program
from tnconv.codegen.programs.sizes import Affine, Different, generalized
from tnconv.diagrams.affine import Leg
from tnconv.diagrams.expression import Expression
from tnconv.diagrams.resizing import resized

BATCH: Leg = "n"  # the leg of diagrams that is the batch
WORSE = 1.25  # a size is planned again where another plan is predicted to win by more (0022)
UP_TO = 4  # times its own size that a program is generalized to (0022)
RIVALS = 2  # other plans of a term whose prices are followed (0022) ...
SLOWEST = 4.0  # ... if they take at most this many times the chosen plan's seconds (0022) ...
LEAST = 0.05  # ... and their term at least this share of the whole program (0022)
POWERS = (0, 1, 2, -1)  # of the size that scales of networks divide by
MOST_FAMILIES = 4096
MOST_MEMBERS = 8  # sizes of a family that were searched for
MOST_VAIN = 2  # of them whose programs serve no other size


@dataclass(frozen=True)
class Kin:
    """Networks that are compiled together, as a member of their family.

    Args:
        family: What all members of the family have in common, as a key.
        networks: The networks themselves.
        size: The size of their batch leg.
        device: The device on which programs run.
        dtype: The dtype of the operands.
    """

    family: Hashable
    networks: tuple[Expression, ...]
    size: int
    device: str
    dtype: torch.dtype

    @property
    def scales(self) -> list[Fraction]:
        return [term.scale for network in self.networks for term in network.terms]

    def powers(self, other: "Kin") -> tuple[int, ...] | None:
        """For each scale, the p with ``other = own · (size / other size)^p``; None without one."""
        by = Fraction(self.size, other.size)
        ratios = [theirs / own for own, theirs in zip(self.scales, other.scales, strict=True)]
        found = [next((p for p in POWERS if by**p == ratio), None) for ratio in ratios]
        return tuple(p for p in found if p is not None) if None not in found else None


def kin(
    networks: Sequence[Expression],
    one: bool,
    device: torch.device | str,
    dtype: torch.dtype,
    channels_last: tuple[str, ...] = (),
) -> Kin | None:
    """The networks as a member of their family; None if no other batch can be given to them.

    Args:
        networks: The networks that are compiled together.
        one: Whether it is one network, rather than a sequence of one.
        device: The device on which programs run.
        dtype: The dtype for which they are chosen.
        channels_last: The operands that are in this memory format.
    """
    terms = [term for network in networks for term in network.terms]
    sizes = {term.sizes[BATCH] for term in terms if BATCH in term.sizes}
    alike = [resized(networks, BATCH, size) for size in (2, 3)] if len(sizes) == 1 else [None]
    # two sizes, because a leg that is no batch may have one of them by chance
    structure = tuple(_structure(each) for each in alike if each is not None)
    if None in alike:
        return None
    family = one, str(device), dtype, channels_last, structure
    return Kin(family, (*networks,), sizes.pop(), str(device), dtype)


def _structure(networks: Sequence[Expression]) -> Hashable:
    """The networks without the scales of their terms."""
    return tuple(
        tuple((term.nodes, term.result, tuple(term.sizes.items())) for term in network.terms)
        for network in networks
    )


@dataclass
class _Member:
    """A program that was searched for one size, and the programs for many that it was made into."""

    kin: Kin
    program: Program[Any]
    general: dict[tuple[int, ...], Program[Any] | None] = field(default_factory=dict)

    def serving(self, other: Kin, tried: bool = False) -> Program[Any] | None:
        """The program for the size of other networks, unless a rival wins there by a quarter.

        If enough members of the family were ``tried`` in vain, this one is not generalized.
        """
        if (powers := self.kin.powers(other)) is None:
            return None
        if other.size == self.kin.size:
            return self.program
        if powers not in self.general and not tried:
            self.general[powers] = for_sizes(self.program, self.kin, powers)
        found = self.general.get(powers)
        if found is None or found.batches is None or other.size not in found.batches.sizes:
            return None
        price = found.batches.price(other.size)
        return found.priced_at(other.size) if price.seconds <= WORSE * price.least else None


class Families:
    """The programs of each family, and the families that have run before."""

    def __init__(self) -> None:
        self._members: OrderedDict[Hashable, list[_Member]] = OrderedDict()
        self._met: OrderedDict[Hashable, None] = OrderedDict()
        self._lock = RLock()

    def serving(self, kin: Kin) -> Program[Any] | None:
        """The cheapest program for these networks, or None if they have to be searched for.

        It tells the price of their size.
        """
        with self._lock:
            members = self._members.get(kin.family, ())
            vain = sum(None in each.general.values() for each in members)
            served = [each.serving(kin, vain >= MOST_VAIN) for each in members]
        found = [program for program in served if program is not None]
        return min(found, key=_price_of) if found else None

    def met(self, networks: Sequence[Expression]) -> bool:
        """Whether a family of these networks may have run before; from now on it has.

        Only the sizes of the other legs are compared, which takes no time and is enough for most
        new sizes.
        """
        terms = [term for network in networks for term in network.terms]
        if all(BATCH not in term.sizes for term in terms):
            return False
        own = [(leg, n) for term in terms for leg, n in term.sizes.items() if leg[:1] != BATCH]
        with self._lock:
            known = tuple(own) in self._met
            self._met[tuple(own)] = None
            while len(self._met) > MOST_FAMILIES:
                self._met.popitem(last=False)
        return known

    def searched(self, kin: Kin) -> bool:
        """Whether a program was searched for in the family, for any size."""
        with self._lock:
            return bool(self._members.get(kin.family))

    def add(self, kin: Kin, program: Program[Any]) -> None:
        """Add a program that was searched for, unless it runs in chunks."""
        if program.chunks:
            return
        with self._lock:
            members = self._members.setdefault(kin.family, [])
            members.append(_Member(kin, program))
            del members[:-MOST_MEMBERS]
            while len(self._members) > MOST_FAMILIES:
                self._members.popitem(last=False)

    def clear(self) -> None:
        """Forget all programs and families."""
        with self._lock:
            self._members.clear()
            self._met.clear()


def _price_of(program: Program[Any]) -> tuple[bool, float]:
    """What was searched for this size comes first: there torch's kernels are kept on purpose."""
    return program.batches is not None, program.seconds


def for_sizes(program: Program[Any], kin: Kin, powers: tuple[int, ...]) -> Program[Any] | None:
    """The program for a range of batch sizes, or None if its steps cannot be written for one.

    If the chosen plan cannot, a rival that takes at most a quarter longer is tried instead.

    Args:
        program: A program that was searched for one size.
        kin: Its networks.
        powers: The powers of the size by which the scales of the family's networks differ.
    """
    with cost.using(coefficients(torch.device(kin.device), kin.dtype), kin.dtype.itemsize):
        for candidate in _candidates(program):
            for sizes in _spreads(kin.size):
                try:
                    return _general(candidate, kin, powers, sizes)
                except Different:
                    continue
    return None


def _spreads(own: int) -> Iterator[list[int]]:
    """Sizes to write the steps for: its own, one below and one above; the widest range first."""
    yield sorted({2, own, UP_TO * own} | ({2 * own} if own == 2 else set()))
    if own >= 6:
        yield [own // 2, own, 2 * own]


def _candidates(program: Program[Any]) -> Iterator[Program[Any]]:
    """The program; then, if it has one term, programs by rivals that take little longer."""
    yield program
    if len(program.terms) == 1:
        ((first, *others),) = program.terms
        for plan in others[:RIVALS]:
            if weight(plan, first) * plan.seconds <= WORSE * first.seconds:
                rest = (each for each in (first, *others) if each is not plan)
                yield replace(program, terms=((plan, *rest),))


def _general(
    program: Program[Any], kin: Kin, powers: tuple[int, ...], sizes: Sequence[int]
) -> Program[Any]:
    """The program for all sizes between the least and the greatest of these.

    Raises:
        Different: its steps have another structure for one of them.
    """
    rivals = [_rivals(plans, program) for plans in program.terms]
    written: dict[int, Program[Any]] = {kin.size: program}
    for size in sizes:
        if size != kin.size:
            networks = at_size(kin.networks, BATCH, kin.size, size, powers)
            found = None if networks is None else again(program, networks, rivals)
            if found is None:
                raise Different
            written[size] = found
    taken = {*argument_names(program.operands).values(), *FIXED}
    name = next(name for at in count() if (name := BATCH + at * "_") not in taken)
    order = [kin.size, *(size for size in sizes if size != kin.size)]
    schedule = generalized([(size, written[size].schedule) for size in order], name)
    shapes = {
        operand: tuple(
            _dimension([(size, written[size].operands[operand][dim]) for size in order], name)
            for dim in range(len(shape))
        )
        for operand, shape in program.operands.items()
    }
    if not any(isinstance(number, Affine) for shape in shapes.values() for number in shape):
        raise Different  # no operand tells the size
    prices = tuple(_price(size, written[size], rivals) for size in sizes)
    batches = Batches(BATCH, kin.size, powers, schedule, shapes, prices)
    return replace(program, batches=batches).prepared()


def _rivals(plans: Sequence[Plan], program: Program[Any]) -> int:
    """How many of a term's other plans may overtake the first at other sizes."""
    first, *others = plans
    if first.seconds < LEAST * sum(chosen.seconds for chosen, *_ in program.terms):
        return 0
    return sum(plan.seconds <= SLOWEST * first.seconds for plan in others[:RIVALS])


def _dimension(found: Sequence[tuple[int, int]], name: str) -> int | Affine:
    """A dimension of an operand, from its values at several sizes: a number, or a multiple of it.

    Raises:
        Different: it is neither.
    """
    (own, first), *_ = found
    if all(number == first for _, number in found):
        return first
    if any(number != first // own * size for size, number in found):
        raise Different
    return Affine(first // own, 0, name)


def _price(size: int, program: Program[Any], rivals: Sequence[int]) -> Price:
    """The predicted seconds of the chosen plans, and of the best of them and their rivals."""
    seconds = least = 0.0
    for (first, *others), most in zip(program.terms, rivals, strict=True):
        known = [weight(plan, first) * plan.seconds for plan in others[:most]]
        seconds += first.seconds
        least += min([first.seconds, *known])
    return Price(size, seconds, least, tuple(map(program.held, ITEMS)))
