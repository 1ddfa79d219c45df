"""The ways to compute one matrix product: all are priced, and only the chosen one is written."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

from tnconv.codegen.lowering import layouts
from tnconv.codegen.lowering.arrangements import Arrangement, Matrix
from tnconv.codegen.lowering.matrices import Product, copied, is_matrix, least_seconds, products
from tnconv.codegen.lowering.strided import Strided, strided
from tnconv.codegen.lowering.values import Value
from tnconv.codegen.lowering.writer import Step, Writer
from tnconv.codegen.prices import cost
from tnconv.diagrams.affine import Leg

Wanted = tuple[Sequence[Leg], Collection[Leg]]
"""The order of legs of the final result, and the legs that a later product sums: `pairs.pair`."""


class Way(NamedTuple):
    """One way to compute a product, with its price.

    Args:
        plan: Which legs are batch, rows, summed and columns, in which order.
        factors: The two matrices.
        copies: The steps that make them, where strides do not allow a view.
        product: The call.
        within: The seconds of copies that torch makes inside of the call.
        new: The number of steps that are not written yet.
        seconds: The predicted time of all steps up to and including these.
        reordering: The seconds of a copy of the result into the wanted order of legs.
        summed_last: Whether copies have the summed legs last, rather than before the others.
        number: Which of `products` the call is.
    """

    plan: Arrangement
    factors: tuple[Strided, Strided]
    copies: tuple[Step, ...]
    product: Product
    within: float
    new: int
    seconds: float
    reordering: float
    summed_last: bool
    number: int

    @property
    def price(self) -> float:
        return self.seconds + self.reordering


class Candidates:
    """Prices the ways to compute one product, and writes the chosen one.

    Matrices and reorderings are kept, because many arrangements have them in common.
    """

    def __init__(self, writer: Writer, a: Value, b: Value, wanted: Wanted) -> None:
        self._writer, self._wanted = writer, wanted
        self._size = {**a.sizes, **b.sizes}
        self._matrices: dict[tuple[object, ...], Matrix] = {}
        self._reorderings: dict[tuple[Leg, ...], float] = {}
        self._earlier = {step.value.size for step in writer.steps}
        self._mirrored = a.array.origin is b.array.origin

    def cheapest(self, plans: Sequence[Arrangement], best: Way | None = None) -> Way:
        """The cheapest way by any of these arrangements, or the ``best`` so far.

        They are written in the order of their bounds, until those exceed the best price.
        """
        first, place = best, -1  # of equally cheap ones the first is taken
        bounds = [
            (self.least(plan) + self._reordering(plan.legs), at) for at, plan in enumerate(plans)
        ]
        for least, at in sorted(bounds):
            if first is not None and (least, at) > (first.price, place):
                break
            way = self.way(plans[at], summed_last=True)
            if way.new > 1:  # copies have the summed legs before the others if that is cheaper
                other = self.way(plans[at], summed_last=False)
                way = other if other.seconds < way.seconds else way
            if first is None or (way.price, at) < (first.price, place):
                first, place = way, at
        assert first is not None
        return first

    def least(self, plan: Arrangement) -> float:
        """A lower bound of the seconds of an arrangement, from sizes and strides alone.

        Terms are added in the order of `way`, so that rounding leaves it a bound.
        """
        size, seconds = self._size, self._writer.seconds
        copies = [
            matrix.least_copy
            for matrix in (self._left(plan), self._right(plan))
            if matrix.entries not in self._earlier  # else the copy may be written already
        ]
        for copy in copies[:1] if self._mirrored else copies:
            seconds += copy
        batch, rows, summed, columns = (
            prod([size[leg] for leg in legs])
            for legs in (plan.lead + plan.batch, plan.rows, plan.summed, plan.columns)
        )
        if batch * rows * columns not in self._earlier:  # else the product may be
            seconds += least_seconds(batch, rows, summed, columns, self._mirrored)
        return seconds

    def way(self, plan: Arrangement, summed_last: bool, number: int | None = None) -> Way:
        """The product by an arrangement: the cheapest of the `products`, or that of a number."""
        left, first = self._left(plan).factor(summed_last, False)
        right, second = self._right(plan).factor(summed_last, True)
        front = _front(left, right)
        ways = list(products(left, right, front))
        if number is None or number >= len(ways):
            number = min(range(len(ways)), key=lambda at: ways[at].kernel.seconds)
        best = ways[number]
        within = sum(
            cost.copy(entries, right.shape[-1]).seconds
            for entries in (copied(left, front), copied(right, front))
            if entries
        )
        if first is not None and second is not None and first.value is second.value:
            second = None
        copies = tuple([step for step in (first, second) if step is not None])
        seconds, new = self._writer.seconds, 1
        for step in copies:
            if not self._writer.has(step.value):
                seconds, new = seconds + step.kernel.seconds, new + 1
        if prod(best.shape) in self._earlier and self._writer.has(_result(best)):
            new -= 1
        else:
            seconds += best.kernel.seconds + within
        reordering = self._reordering(plan.legs)
        factors, costs = (left, right), (within, new, seconds, reordering)
        return Way(plan, factors, copies, best, *costs, summed_last, number)

    def written(
        self, way: Way, choice: tuple[int, bool, int] | None = None
    ) -> tuple[Writer, Value]:
        """The writer after the steps of a way, and the result. The choice is recorded."""
        writer, plan = self._writer, way.plan
        writer = writer if choice is None else writer.choosing("product", choice)
        for step in way.copies:
            writer = writer.with_step(step)
        front = _front(*way.factors)
        held = [copied(array, front) for array in way.factors]
        held += [prod(array.shape[-2:]) for array in way.factors if not is_matrix(array)]
        kernel = way.product.kernel
        kernel = replace(
            kernel,
            seconds=kernel.seconds + way.within,
            scratch=kernel.scratch + cost.bytes_per_entry() * sum(held),
        )
        comment = f"[{', '.join(plan.legs)}] = sum over {', '.join(plan.summed)}"
        array = _result(way.product)
        writer = writer.with_step(Step(array, kernel, comment))
        split = array.free_reshape([self._size[leg] for leg in plan.legs])
        assert split is not None
        return writer, Value(split, plan.legs)

    def _left(self, plan: Arrangement) -> Matrix:
        return self._matrix(plan.left, plan, plan.rows)

    def _right(self, plan: Arrangement) -> Matrix:
        return self._matrix(plan.right, plan, plan.columns)

    def _matrix(self, value: Value, plan: Arrangement, keep: tuple[Leg, ...]) -> Matrix:
        lead = tuple([leg for leg in plan.lead if leg in value.legs])
        key = (value.array, value.legs, lead, plan.batch, keep, plan.summed)
        if (known := self._matrices.get(key)) is None:
            front = tuple([group for group in (lead, plan.batch) if group])
            known = self._matrices[key] = Matrix(value, front, keep, plan.summed)
        return known

    def _reordering(self, legs: tuple[Leg, ...]) -> float:
        """The seconds of the copy that a result with legs in this order needs in the end."""
        if (known := self._reorderings.get(legs)) is None:
            known = self._reorderings[legs] = self._reordered(legs)
        return known

    def _reordered(self, legs: tuple[Leg, ...]) -> float:
        order, later = self._wanted
        if set(legs) != set(order):
            return 0.0
        if later:
            order = sorted(legs, key=later.__contains__)
        strides = dict(
            zip(legs, layouts.contiguous([self._size[leg] for leg in legs]), strict=True)
        )
        shape = tuple([self._size[leg] for leg in order])
        there = tuple([strides[leg] for leg in order])
        if layouts.run(shape, there) == prod(shape):
            return 0.0
        return cost.copy(prod(shape), *layouts.innermost(shape, there)).seconds


def _front(left: Strided, right: Strided) -> tuple[int, ...]:
    """The batch dimensions of a product."""
    return max(left.shape[:-2], right.shape[:-2], key=lambda shape: (len(shape), prod(shape)))


def _result(product: Product) -> Strided:
    strides = layouts.contiguous(product.shape)
    return strided(product.operation, product.factors, product.attributes, product.shape, strides)
