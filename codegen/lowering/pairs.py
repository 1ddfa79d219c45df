"""Products of two dense values: summed over some legs, or entry by entry."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from math import inf, prod

from tnconv.codegen.lowering import layouts
from tnconv.codegen.lowering.arrangements import arrangements, in_order
from tnconv.codegen.lowering.candidates import Candidates
from tnconv.codegen.lowering.strided import Strided
from tnconv.codegen.lowering.values import Value
from tnconv.codegen.lowering.writer import MATMUL, MULTIPLY, Writer
from tnconv.codegen.prices import cost
from tnconv.diagrams.affine import Leg


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
    limit: float = inf,
) -> tuple[Writer, Value]:
    """``Σ a b`` over the legs that nothing else needs, by the cheapest arrangement, or the first.

    Args:
        writer: The steps so far.
        a: One value.
        b: The other one.
        needed: The legs that are needed later.
        hint: The order in which the legs are wanted in the end.
        search: Whether all arrangements are compared.
        later: The legs that are summed in a product with a mirrored half. They are wanted after all
            others, in any order.
        limit: The seconds of all steps beyond which the result is of no use. If no arrangement
            stays within them, the first one is taken.
    """
    writer, a = sum_out(writer, a, {*needed, *b.legs})
    writer, b = sum_out(writer, b, {*needed, *a.legs})
    shared = [leg for leg in a.legs if leg in b.legs]
    if all(leg in needed for leg in shared):
        return hadamard(writer, a, b, hint)
    if len(shared) == len(a.legs) == len(b.legs):
        return _dot(writer, a, b, needed)
    candidates = Candidates(writer, a, b, (hint, later))
    plans = list(arrangements(a, b, needed, hint))
    if not search or (limit < inf and all(candidates.least(plan) > limit for plan in plans)):
        return candidates.written(candidates.way(plans[0], summed_last=True))
    if (made := writer.scripted("product")) is not None:
        at, *how = made
        return candidates.written(candidates.way(plans[at], *how), made)
    best = candidates.cheapest([plan for plan in plans if not plan.lead])
    if best.new > 1 or best.reordering:
        led = [plan for plan in plans if plan.lead]  # no copies?
        best = candidates.cheapest(led, best)
    at = next(at for at, plan in enumerate(plans) if plan is best.plan)
    return candidates.written(best, (at, best.summed_last, best.number))


def hadamard(writer: Writer, a: Value, b: Value, hint: Sequence[Leg] = ()) -> tuple[Writer, Value]:
    """No leg is summed: multiply with broadcasting, in the order in which legs are wanted."""
    legs = in_order((*a.legs, *(leg for leg in b.legs if leg not in a.legs)), hint)
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
