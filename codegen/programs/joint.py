"""Several plans in one program: equal steps are one, and plans are chosen with that in mind."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tnconv.codegen.lowering.arrays import Array, Step, contiguous
from tnconv.codegen.lowering.schedule import NAME, Schedule
from tnconv.codegen.planner import Plan
from tnconv.codegen.prices import cost
from tnconv.codegen.programs.fusion import fused, shares

_CONVOLUTION = re.compile(r"F\.conv[123]d\((?!.*bias=)")
_EXPANDED = re.compile(r"(?P<name>\w+)(\.(unsqueeze|expand|permute|reshape)\([\d, ]*\))*")
MOST_PLANS = 8  # considered together for each network


def scheduled(sums: Sequence[Sequence[Plan]]) -> Schedule:
    """The steps of all plans, equal ones once; the plans of each sum are added."""
    steps: dict[str, Step] = {}  # by code
    outputs = []
    for terms in sums:
        total, *others = [_written(plan, steps)[0] for plan in terms]
        for other in others:
            if len(sums) == 1 and _biased(total, other, steps):
                continue
            kernel = cost.elementwise(total.size, 2 * total.size)
            code = f"{total.code} + {other.code}"
            name = _step(Step("", code, total.shape, kernel, "sum of terms"), code, steps)
            total = Array(name, total.shape, contiguous(total.shape))
        outputs.append(total)
    return Schedule(fused(list(steps.values())), tuple(outputs))


def _biased(total: Array, other: Array, steps: dict[str, Step]) -> bool:
    """Give a native convolution, the last step, a bias: a vector that is added to its channels."""
    last = next(reversed(steps.values()), None)
    if last is None or (last.name, last.shape) != (total.code, total.shape):
        return False
    channels = tuple(int(dim == 1) for dim in range(len(total.shape)))
    vector = _EXPANDED.fullmatch(other.code)
    if not (_CONVOLUTION.match(last.code) and other.strides == channels and vector):
        return False
    bias, whole = vector["name"], other.code.count(".unsqueeze(") == len(total.shape) - 1
    bias += "" if whole and ".reshape" not in other.code else f".reshape({total.shape[1]})"
    del steps[last.code]
    code = f"{last.code[:-1]}, bias={bias})"
    steps[code] = replace(last, code=code)
    return True


def _written(plan: Plan, steps: dict[str, Step]) -> tuple[Array, frozenset[str]]:
    """Add the steps of a plan, unless they are there; its output, and its steps' names."""
    names: dict[str, str] = {}

    def rename(code: str) -> str:
        return NAME.sub(lambda found: names[found[0]], code)

    for step in plan.steps:
        turns = None if step.turns is None else step.turns.renamed(rename)
        names[step.name] = _step(replace(step, turns=turns), rename(step.code), steps)
    output = Array(rename(plan.output.code), plan.output.shape, plan.output.strides)
    return output, frozenset(names.values())


def _step(step: Step, code: str, steps: dict[str, Step]) -> str:
    named = replace(step, name=f"t{len(steps) + 1}", code=code)
    return steps.setdefault(code, named).name


@dataclass(frozen=True)
class _Candidate:
    plan: Plan
    units: frozenset[str]
    weight: float


def chosen_together(lists: Sequence[Sequence[Plan]]) -> list[Plan]:
    """One plan of each list (ranked, the best first) such that together they take least time.

    Steps that plans have in common count once, and so do those of loops over the same parts.
    Beside the first of a list, only plans that have a
    step in common with plans of other lists are considered. A step counts with the least weight of
    the plans that want it: what torch does natively stays unless others are clearly faster.
    """
    if len(lists) < 2:
        return [plans[0] for plans in lists]
    steps: dict[str, Step] = {}
    seconds: dict[str, float] = {}
    tables = [
        [
            _Candidate(plan, _units_of(plan, steps, seconds), _weight(plan, plans[0]))
            for plan in plans[:MOST_PLANS]
        ]
        for plans in lists
    ]
    shared = [
        {unit for other in tables if other is not rows for row in other for unit in row.units}
        for rows in tables
    ]
    tables = [
        [rows[0], *(row for row in rows[1:] if row.units & units)]
        for rows, units in zip(tables, shared, strict=True)
    ]

    def price(choice: Sequence[_Candidate]) -> float:
        weights: dict[str, float] = {}
        for row in choice:
            for unit in row.units:
                weights[unit] = min(row.weight, weights.get(unit, row.weight))
        return sum(seconds[unit] * weight for unit, weight in weights.items())

    first = [rows[0] for rows in tables]
    starts = [_put(first, at, row) for at, rows in enumerate(tables) for row in rows]
    best = min((_descend(start, tables, price) for start in starts), key=price)
    return [row.plan for row in best]


def _units_of(plan: Plan, steps: dict[str, Step], seconds: dict[str, float]) -> frozenset[str]:
    """What is paid once by all who need it: steps, and those inside of loops."""
    names = _written(plan, steps)[1]
    units: dict[str, float] = {}
    for step in steps.values():
        if step.name in names:
            inside = {} if step.turns is None else shares(step.turns)
            units |= inside | {step.name: step.kernel.seconds - sum(inside.values())}
    seconds |= units
    return frozenset(units)


def _weight(plan: Plan, first: Plan) -> float:
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
