"""Two dense values as a matrix product: its arrangements, copies and kernels."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from tnconv.codegen.lowering import layouts
from tnconv.codegen.lowering.matrices import copied, is_matrix, products
from tnconv.codegen.lowering.strided import Strided
from tnconv.codegen.lowering.values import Value
from tnconv.codegen.lowering.writer import MATMUL, MULTIPLY, Writer
from tnconv.codegen.prices import cost
from tnconv.diagrams.affine import Leg

Trial = tuple[Writer, Value]
Wanted = tuple[Sequence[Leg], Collection[Leg]]
"""The order of legs in the end, and those that a later product sums: see `pair`."""
EXACT = 1 - 1e-9  # sums of prices differ by rounding alone


def sum_out(writer: Writer, value: Value, needed: Collection[Leg]) -> tuple[Writer, Value]:
    """Sum the legs that nothing needs."""
    dims = [dim for dim, leg in enumerate(value.legs) if leg not in needed]
    writer, array = writer.sum(value.array, dims)
    return writer, Value(array, tuple(leg for leg in value.legs if leg in needed))


def pair(
    writer: Writer,
    a: Value,
    b: Value,
    needed: Collection[Leg],
    hint: Sequence[Leg] = (),
    search: bool = True,
    later: Collection[Leg] = (),
) -> tuple[Writer, Value]:
    """``Σ a b`` over the legs that nothing else needs, by the cheapest arrangement, or the first.

    ``hint`` is the order in which the legs are wanted in the end. Those that are summed ``later``,
    in a product with a mirrored half, are wanted after all others, in any order.
    """
    writer, a = sum_out(writer, a, {*needed, *b.legs})
    writer, b = sum_out(writer, b, {*needed, *a.legs})
    shared = [leg for leg in a.legs if leg in b.legs]
    if all(leg in needed for leg in shared):
        return hadamard(writer, a, b, hint)
    if len(shared) == len(a.legs) == len(b.legs):
        return _dot(writer, a, b, needed)
    matrices = Matrices()
    if not search:
        return _product(writer, next(_arrangements(a, b, needed, hint)), matrices, summed_last=True)
    plans = list(_arrangements(a, b, needed, hint))
    wanted = hint, later
    best = _cheapest([plan for plan in plans if not plan.lead], writer, matrices, wanted)
    if len(best[0].steps) > len(writer.steps) + 1 or _reordering(best[1], *wanted):
        led = [plan for plan in plans if plan.lead]  # no copies?
        best = _cheapest(led, writer, matrices, wanted, best)
    return best


def _cheapest(
    plans: Sequence["Arrangement"],
    writer: Writer,
    matrices: "Matrices",
    wanted: Wanted,
    best: Trial | None = None,
) -> Trial:
    """The first of the cheapest; what costs more by its lower bound already is not written.

    A product or copy as large as an earlier result may be that of a mirrored half, and cost
    nothing.
    """
    least, first = (float("inf") if best is None else _price(best, wanted)), -1
    spent, earlier = writer.seconds, {step.value.size for step in writer.steps}

    def bound(plan: Arrangement) -> float:
        product = 0.0 if plan.entries in earlier else plan.least_seconds
        return EXACT * (spent + product + matrices.copying(plan, earlier))

    bounds = sorted((bound(plan), at) for at, plan in enumerate(plans))
    for seconds, at in bounds:
        if seconds > least:
            break
        trial = _matmul(writer, plans[at], matrices)
        if (price := _price(trial, wanted)) < least or (price == least and at < first):
            best, least, first = trial, price, at
    assert best is not None
    return best


def _price(trial: Trial, wanted: Wanted) -> float:
    return trial[0].seconds + _reordering(trial[1], *wanted)


def _reordering(value: Value, order: Sequence[Leg], later: Collection[Leg]) -> float:
    """The seconds of the copy that a last product takes if its legs are in another order."""
    if set(value.legs) != set(order):
        return 0.0
    if later:
        order = sorted(value.legs, key=later.__contains__)
    array = value.arranged(order)
    return cost.copy(array.size, *array.innermost).seconds if array.run < array.size else 0.0


def hadamard(writer: Writer, a: Value, b: Value, hint: Sequence[Leg] = ()) -> tuple[Writer, Value]:
    """No leg is summed: multiply with broadcasting, in the order in which legs are wanted."""
    legs = _sorted((*a.legs, *(leg for leg in b.legs if leg not in a.legs)), hint)
    first, second = (_broadcast(value, legs) for value in (a, b))
    shape = [max(m, n) for m, n in zip(first.shape, second.shape, strict=True)]
    kernel = cost.elementwise(prod(shape), a.array.size + b.array.size)
    rows = [
        factor.innermost for factor in (first, second) if factor.shape[-1:] == tuple(shape[-1:])
    ]
    seconds = kernel.seconds + sum(cost.gathering(prod(shape), *row) for row in rows)
    kernel = replace(kernel, seconds=seconds)
    comment = f"product [{', '.join(legs)}]"
    strides = layouts.of_entries(shape, [x.expand(shape).strides for x in (first, second)])
    writer, array = writer.run(MULTIPLY, [first, second], shape, kernel, comment, strides=strides)
    return writer, Value(array, legs)


def _dot(writer: Writer, a: Value, b: Value, needed: Collection[Leg]) -> tuple[Writer, Value]:
    """No leg is free: one dot product, or several as a product and a sum.

    Matrix products of one row and one column take several times longer.
    """
    if any(leg in needed for leg in a.legs):
        return sum_out(*hadamard(writer, a, b), needed)
    writer, first = writer.reshape(a.array, [a.array.size])
    writer, second = writer.reshape(b.arranged(a.legs), [a.array.size])
    kernel = cost.reduction(2 * a.array.size, 1, a.array.size)
    comment = f"sum over {', '.join(a.legs)}"
    writer, array = writer.run(MATMUL, [first, second], (), kernel, comment)
    return writer, Value(array, ())


def _broadcast(value: Value, legs: Sequence[Leg]) -> Strided:
    array = value.arranged([leg for leg in legs if leg in value.legs])
    for dim, leg in enumerate(legs):
        if leg not in value.legs:
            array = array.unsqueeze(dim)
    return array


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
    def entries(self) -> int:
        """Of the result."""
        return prod(self._sizes[:-1])

    @property
    def least_seconds(self) -> float:
        """A bound of the price: no copies, blocks; of mirrored halves half of the product."""
        lead, batch, m, n, k = self._sizes
        ways = (cost.matmul(lead * batch, m, n, k, blocks, along=True) for blocks in (False, True))
        seconds = min(kernel.seconds for kernel in ways)
        return seconds / 2 if self.left.array is self.right.array else seconds

    @cached_property
    def _sizes(self) -> list[int]:
        size = {**self.left.sizes, **self.right.sizes}
        legs = (self.lead, self.batch, self.rows, self.columns, self.summed)
        return [prod(size[leg] for leg in some) for some in legs]


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

    def written(self, writer: Writer, summed_last: bool) -> tuple[Writer, Strided]:
        """The matrix, copied with the summed legs last or before the others if it has to be."""
        if self.free is not None:
            return writer, self.free
        writer, array = writer.reshape(*(self.straight if summed_last else self.swapped))
        return writer, array if summed_last else array.mT

    @cached_property
    def copying(self) -> float:
        """The seconds of the faster copy, if it takes one."""
        if self.free is not None:
            return 0.0
        ways = (self.straight[0], self.swapped[0])
        return min(cost.copy(array.size, *array.innermost).seconds for array in ways)


class Matrices:
    """The factors of all arrangements of one product: many have one in common."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Matrix] = {}

    def left(self, plan: Arrangement) -> Matrix:
        return self._of(plan.left, plan, plan.rows)

    def right(self, plan: Arrangement) -> Matrix:
        return self._of(plan.right, plan, plan.columns)

    def _of(self, value: Value, plan: Arrangement, keep: tuple[Leg, ...]) -> Matrix:
        lead = tuple([leg for leg in plan.lead if leg in value.legs])
        key = (value.array, value.legs, lead, plan.batch, keep, plan.summed)
        if (known := self._known.get(key)) is None:
            front = tuple([group for group in (lead, plan.batch) if group])
            known = self._known[key] = Matrix(value, front, keep, plan.summed)
        return known

    def copying(self, plan: Arrangement, earlier: Collection[int]) -> float:
        """A lower bound of the copies' seconds: two copies of one tensor may be one step."""
        left, right = (
            0.0 if matrix.straight[0].size in earlier else matrix.copying
            for matrix in (self.left(plan), self.right(plan))
        )
        return max(left, right) if plan.left.array is plan.right.array else left + right


def _arrangements(
    a: Value, b: Value, needed: Collection[Leg], hint: Sequence[Leg]
) -> Iterator[Arrangement]:
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
            wanted = (_sorted(rows, hint), _sorted(columns, hint))
            if wanted != (rows, columns):
                yield Arrangement(left, right, (), both, inner, *wanted)
            for cut in range(1, len(rows)):
                yield Arrangement(left, right, rows[:cut], both, inner, rows[cut:], columns)
            for cut in range(1, len(columns)):
                yield Arrangement(left, right, columns[:cut], both, inner, rows, columns[cut:])


def _sorted(legs: tuple[Leg, ...], order: Sequence[Leg]) -> tuple[Leg, ...]:
    """In the order in which legs are wanted, if it is known of all."""
    return tuple(sorted(legs, key=list(order).index)) if set(legs) <= set(order) else legs


def _oriented(a: Value, b: Value, hint: Sequence[Leg]) -> list[tuple[Value, Value]]:
    """Both orders, the one first whose result has the wanted order of legs."""

    def last(value: Value, other: Value) -> int:
        own = [hint.index(leg) for leg in value.legs if leg not in other.legs and leg in hint]
        return max(own, default=-1)

    return [(a, b), (b, a)] if last(a, b) <= last(b, a) else [(b, a), (a, b)]


def _matmul(writer: Writer, plan: Arrangement, matrices: Matrices) -> Trial:
    """Copies that it takes have the summed legs last or, if that is cheaper, before the others."""
    last = _product(writer, plan, matrices, summed_last=True)
    if len(last[0].steps) == len(writer.steps) + 1:
        return last
    first = _product(writer, plan, matrices, summed_last=False)
    return min(last, first, key=lambda way: way[0].seconds)


def _product(writer: Writer, plan: Arrangement, matrices: Matrices, summed_last: bool) -> Trial:
    writer, left = matrices.left(plan).written(writer, summed_last)
    writer, right = matrices.right(plan).written(writer, summed_last)
    right = right.mT
    n = right.shape[-1]
    front = max(left.shape[:-2], right.shape[:-2], key=lambda shape: (len(shape), prod(shape)))
    legs = (*plan.lead, *plan.batch, *plan.rows, *plan.columns)
    best = min(products(left, right, front), key=lambda way: way.kernel.seconds)
    held = [copied(array, front) for array in (left, right)]
    copies = sum(cost.copy(entries, n).seconds for entries in held if entries)
    held += [prod(array.shape[-2:]) for array in (left, right) if not is_matrix(array)]
    kernel = replace(
        best.kernel,
        seconds=best.kernel.seconds + copies,
        scratch=best.kernel.scratch + cost.bytes_per_entry() * sum(held),
    )
    comment = f"[{', '.join(legs)}] = sum over {', '.join(plan.summed)}"
    call = best.operation, best.factors, best.shape, kernel, comment, best.attributes
    writer, array = writer.run(*call)
    size = {**plan.left.sizes, **plan.right.sizes}
    split = array.free_reshape([size[leg] for leg in legs])
    assert split is not None
    return writer, Value(split, legs)
