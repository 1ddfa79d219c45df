"""Several plans in one program: equal steps run once, and plans are chosen for what they share."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from tnconv.codegen.lowering.layouts import contiguous
from tnconv.codegen.lowering.plans import Plan
from tnconv.codegen.lowering.schedule import Schedule
from tnconv.codegen.lowering.strided import EXPAND, PERMUTE, RESHAPE, UNSQUEEZE, Strided, strided
from tnconv.codegen.lowering.turns import ADDED, turns_of
from tnconv.codegen.lowering.writer import ADD, Step
from tnconv.codegen.prices import cost
from tnconv.codegen.programs.fusion import fused, shares
from tnconv.codegen.routes.native import CONVOLUTION

MOST_PLANS = 8  # considered together for each network
Steps = dict[Strided, Step]


def scheduled(sums: Sequence[Sequence[Plan]]) -> Schedule:
    """The steps of all plans, equal ones once, and the addition of the terms of each sum."""
    steps: Steps = {}
    outputs = []
    for plans in sums:
        terms = []
        for plan in plans:
            for step in plan.steps:
                steps.setdefault(step.value, step)
            terms.append(plan.output)
        total, *others = terms
        for other in others:
            biased = _biased(total, other, steps) if len(sums) == 1 else None
            total = biased or _added(total, other, steps)
        outputs.append(total)
    return Schedule(*fused(list(steps.values()), outputs))


def _added(total: Strided, other: Strided, steps: Steps) -> Strided:
    kernel = cost.elementwise(total.size, 2 * total.size)
    value = strided(ADD, (total, other), (), total.shape, contiguous(total.shape))
    steps.setdefault(value, Step(value, kernel, "sum of terms"))
    return value


def _biased(total: Strided, other: Strided, steps: Steps) -> Strided | None:
    """A sum of a native convolution and a vector over channels as that convolution with a bias.

    None unless the convolution is the last step, so that nothing else reads it.
    """
    channels = tuple(int(dim == 1) for dim in range(len(total.shape)))
    spread = all(x.operation in (UNSQUEEZE, EXPAND, PERMUTE, RESHAPE) for x in other.views)
    if not (total.operation is CONVOLUTION and len(total.inputs) == 2 and spread):
        return None
    if total is not next(reversed(steps), None) or other.strides != channels:
        return None
    if (bias := other.origin.free_reshape(total.shape[1:2])) is None:
        return None
    image, kernel = total.inputs
    operands, numbers = (image, kernel, bias), total.attributes
    value = strided(CONVOLUTION, operands, numbers, total.shape, total.strides)
    steps[value] = replace(steps.pop(total), value=value)
    return value


@dataclass(frozen=True)
class _Candidate:
    plan: Plan
    units: tuple[Hashable, ...]
    weight: float


def chosen_together(lists: Sequence[Sequence[Plan]]) -> list[Plan]:
    """One plan of each ranked list, such that together they take the least time.

    Steps that several plans have in common count once, as do steps in loops over the same parts.
    Beside the first of a list only plans that have a step in common with another list are
    considered. A step counts with the least `weight` of the chosen plans that have it. Starting
    from every single exchange of the first choice, one plan at a time is exchanged as long as the
    total falls.
    """
    if len(lists) < 2:
        return [plans[0] for plans in lists]
    seconds: dict[Hashable, float] = {}
    tables = [
        [
            _Candidate(plan, _units_of(plan, seconds), weight(plan, plans[0]))
            for plan in plans[:MOST_PLANS]
        ]
        for plans in lists
    ]
    shared = [
        {unit for other in tables if other is not rows for row in other for unit in row.units}
        for rows in tables
    ]
    tables = [
        [rows[0], *(row for row in rows[1:] if not units.isdisjoint(row.units))]
        for rows, units in zip(tables, shared, strict=True)
    ]

    def price(choice: Sequence[_Candidate]) -> float:
        weights: dict[Hashable, float] = {}
        for row in choice:
            for unit in row.units:
                weights[unit] = min(row.weight, weights.get(unit, row.weight))
        return sum(seconds[unit] * weight for unit, weight in weights.items())

    first = [rows[0] for rows in tables]
    starts = [_put(first, at, row) for at, rows in enumerate(tables) for row in rows]
    best = min((_descend(start, tables, price) for start in starts), key=price)
    return [row.plan for row in best]


def _units_of(plan: Plan, seconds: dict[Hashable, float]) -> tuple[Hashable, ...]:
    """What several plans can share: steps, and steps inside of loops. Also fills ``seconds``."""
    units: dict[Hashable, float] = {}
    for step in plan.steps:
        inside = shares(turns_of(step.value)) if step.operation is ADDED else {}
        units |= inside
        units[step.value] = step.kernel.seconds - sum(inside.values())
    for unit, taken in units.items():
        seconds.setdefault(unit, taken)
    return tuple(units)


def weight(plan: Plan, first: Plan) -> float:
    """The factor of a plan's seconds in comparisons: its risk, and the margin of torch's own plan.

    ``first`` is the plan that comes first in the plan's list.
    """
    return plan.risk * (
        first.margin if first.is_torchs and first.form == "as given" and plan is not first else 1.0
    )


def _descend(
    choice: list[_Candidate],
    tables: Sequence[Sequence[_Candidate]],
    price: Callable[[Sequence[_Candidate]], float],
) -> list[_Candidate]:
    """Change one plan at a time, as long as that lowers the price."""
    while True:
        moves = [_put(choice, at, row) for at, rows in enumerate(tables) for row in rows]
        best = min(moves, key=price)
        if price(best) >= price(choice):
            return choice
        choice = best


def _put(choice: Sequence[_Candidate], at: int, row: _Candidate) -> list[_Candidate]:
    return [*choice[:at], row, *choice[at + 1 :]]
