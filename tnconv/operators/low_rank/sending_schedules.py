"""How many vectors go backwards together within a memory limit, known before any of them is made.

What vectors hold on their way follows from the shapes of the forward pass, and what products of
one parameter hold from their plans.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil

from torch import Tensor

from tnconv.diagrams.errors import TooLittleMemory
from tnconv.models.modules import unwrapped
from tnconv.models.propagation import Footprint
from tnconv.models.terms import Term
from tnconv.operators.low_rank.grams import comparable, cross_plan, gram_plan
from tnconv.operators.low_rank.orders import Orders, order_of
from tnconv.operators.low_rank.rows import JacobianRows
from tnconv.operators.low_rank.sending import Sender
from tnconv.operators.low_rank.term_parts import between
from tnconv.recursions.columns_walk import LARGE

Span = tuple[int, int]
BESIDE = 4  # parts of vectors that a rule works on hold as many times their own size
TRIALS = 5  # to find the least limit: each plan's error names more of what it needs
USED = 2 / 3  # of a limit: kernels copy operands, and heaps keep small pieces that were freed
FEWEST = 2  # vectors that have to go together: inner products are of two


@dataclass(frozen=True)
class Schedule:
    """So many vectors at a time, and the bytes that are left for products of each parameter.

    Where not all vectors go together, they go in blocks of half as many: every pair of blocks, so
    that with b blocks each vector goes backwards b - 1 times for a Gram matrix.
    """

    at_a_time: int
    left: Mapping[str, int]

    def spans(self, count: int) -> list[Span]:
        """As many vectors, as few times as possible."""
        size = self.at_a_time
        return [(at, min(at + size, count)) for at in range(0, count, size)]

    def pairs(self, count: int) -> Iterator[tuple[Span, ...]]:
        """Spans that go together: all vectors, or every pair of blocks."""
        if count <= self.at_a_time:
            yield ((0, count),)
            return
        half = self.at_a_time // 2
        blocks = [(at, min(at + half, count)) for at in range(0, count, half)]
        for at, one in enumerate(blocks):
            yield from ((one, other) for other in blocks[at + 1 :])


@dataclass(frozen=True)
class Needs:
    """What products of rows take: vectors on their way, plans, and what is held all the time.

    Args:
        sender: The batch, after its forward pass.
        vectors: All of them, after the model's output.
        footprint: What each holds on its way.
        order: How Gram matrices are contracted.
        groups: The number of Gram matrices.
        other: Rows of another batch, which Gram matrices with these are asked for, too.
    """

    sender: Sender
    vectors: Tensor
    footprint: Footprint
    order: Orders
    groups: int
    other: JacobianRows | None = None

    def held(self) -> int:
        """Bytes all the time: the vectors after the output, and Gram matrices."""
        size = len(self.vectors) * self.sender.size
        other = 0 if self.other is None else self.other.held_bytes
        return self.vectors.nbytes + self.groups * size**2 * self.vectors.element_size() + other

    def on_the_way(self, count: int) -> int:
        """Bytes while so many vectors go backwards."""
        way = count * self.footprint.most
        return self.held() + count * self.vectors[:1].nbytes + way + min(BESIDE * LARGE, way)

    def schedule(self, limit: int) -> Schedule:
        """As many vectors at a time as fit.

        Raises:
            TooLittleMemory: not even two do.
        """
        count, room = len(self.vectors), int(limit * USED)
        while self.on_the_way(count) > room and count > FEWEST:
            count = max(FEWEST, 2 * (count // 3))
        while True:
            left = self._left(count, room)
            if self.on_the_way(count) <= room and not self._lacking(left, count):
                return Schedule(count, left)
            if count <= FEWEST:
                raise self._too_little(limit, count)
            count = max(FEWEST, 2 * (count // 4))

    def left_beside_all(self, limit: int) -> int | None:
        """What is left for products where all layers' vectors are held; None if that is little.

        One half of the limit is for vectors, the other for products.
        """
        count = len(self.vectors)
        total, room = self.held() + count * self.footprint.total, int(limit * USED)
        if 2 * total > room:
            return None
        left = dict.fromkeys(self._left(count, room), room - total)
        return None if self._lacking(left, count) else room - total

    def _left(self, count: int, limit: int) -> dict[str, int]:
        """What is left for products of each parameter, while its layer's vectors are there."""
        names = {p: name for name, p in unwrapped(self.sender.model).named_parameters()}
        fixed = self.held() + count * self.vectors[:1].nbytes
        left: dict[str, int] = {}
        for call, each in self.footprint.after.items():
            for _, p in call.parameters:
                left[names[p]] = min(left.get(names[p], limit), limit - fixed - count * each)
        return left

    def _lacking(self, left: Mapping[str, int], count: int) -> int:
        """How many bytes products need that are not left, planned as they will be looked up."""
        lacking = 0

        def plan(name: str, term: Term) -> None:
            nonlocal lacking
            try:
                self._plan(name, term, left[name])
            except TooLittleMemory as error:
                lacking = max(lacking, error.least - left[name])

        self.sender.expect_terms(count, plan)
        return lacking

    def _plan(self, name: str, term: Term, limit: int) -> None:
        if limit <= 0:
            raise TooLittleMemory(f"nothing is left for {name!r}", 1)
        order, count = order_of(self.order, name), term.vectors or 0
        if count == len(self.vectors):
            gram_plan(term, order, limit)
        else:
            one, two = between(term, 0, count // 2), between(term, count // 2, count)
            gram_plan(one, order, limit)
            cross_plan(*comparable(one, two), order, limit)
        if self.other is not None and name in self.other.terms:
            cross_plan(*comparable(self.other.terms[name], term), order, limit)

    def _too_little(self, limit: int, count: int) -> TooLittleMemory:
        least = self.on_the_way(count)
        for _ in range(TRIALS):
            least += (more := self._lacking(self._left(count, least), count))
            if not more:
                break
        least = ceil(least / USED)
        return TooLittleMemory(
            f"memory_limit is {limit} bytes; expected at least {least}, for {count} vectors of "
            f"{self.sender.size} samples on their way and products of two",
            least,
        )
