"""Several plans in one program: equal steps are one, and plans are chosen with that in mind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tnconv.codegen import cost
from tnconv.codegen.arrays import Array, Step, contiguous
from tnconv.codegen.planner import CLEARLY, Plan
from tnconv.codegen.schedule import NAME, Schedule

MOST_PLANS = 8  # considered together for each network


def scheduled(sums: Sequence[Sequence[Plan]]) -> Schedule:
    """The steps of all plans, equal ones once; the plans of each sum are added."""
    steps: dict[str, Step] = {}  # by code
    outputs = []
    for terms in sums:
        total, *others = [_written(plan, steps)[0] for plan in terms]
        for other in others:
            kernel = cost.elementwise(total.size, 2 * total.size)
            code = f"{total.code} + {other.code}"
            name = _step(Step("", code, total.shape, kernel, "sum of terms"), code, steps)
            total = Array(name, total.shape, contiguous(total.shape))
        outputs.append(total)
    return Schedule(tuple(steps.values()), tuple(outputs))


def _written(plan: Plan, steps: dict[str, Step]) -> tuple[Array, frozenset[str]]:
    """Add the steps of a plan, unless they are there; its output, and its steps' names."""
    names: dict[str, str] = {}

    def rename(code: str) -> str:
        return NAME.sub(lambda found: names[found[0]], code)

    for step in plan.steps:
        names[step.name] = _step(step, rename(step.code), steps)
    output = Array(rename(plan.output.code), plan.output.shape, plan.output.strides)
    return output, frozenset(names.values())


def _step(step: Step, code: str, steps: dict[str, Step]) -> str:
    named = Step(f"t{len(steps) + 1}", code, step.shape, step.kernel, step.comment)
    return steps.setdefault(code, named).name


@dataclass(frozen=True)
class _Candidate:
    plan: Plan
    names: frozenset[str]
    weight: float


def chosen_together(lists: Sequence[Sequence[Plan]]) -> list[Plan]:
    """One plan of each list (ranked, the best first) such that together they take least time.

    Steps that plans have in common count once. Beside the first of a list, only plans that have a
    step in common with plans of other lists are considered. A step counts with the least weight of
    the plans that want it: what torch does natively stays unless others are clearly faster.
    """
    if len(lists) < 2:
        return [plans[0] for plans in lists]
    steps: dict[str, Step] = {}
    tables = [
        [
            _Candidate(plan, _written(plan, steps)[1], _weight(plan, plans[0]))
            for plan in plans[:MOST_PLANS]
        ]
        for plans in lists
    ]
    shared = [
        {name for other in tables if other is not rows for row in other for name in row.names}
        for rows in tables
    ]
    tables = [
        [rows[0], *(row for row in rows[1:] if row.names & names)]
        for rows, names in zip(tables, shared, strict=True)
    ]
    seconds = {step.name: step.kernel.seconds for step in steps.values()}

    def price(choice: Sequence[_Candidate]) -> float:
        weights: dict[str, float] = {}
        for row in choice:
            for name in row.names:
                weights[name] = min(row.weight, weights.get(name, row.weight))
        return sum(seconds[name] * weight for name, weight in weights.items())

    first = [rows[0] for rows in tables]
    starts = [_put(first, at, row) for at, rows in enumerate(tables) for row in rows]
    best = min((_descend(start, tables, price) for start in starts), key=price)
    return [row.plan for row in best]


def _weight(plan: Plan, first: Plan) -> float:
    return plan.risk * (
        CLEARLY if (first.is_torchs and first.form == "as given") and plan is not first else 1.0
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
