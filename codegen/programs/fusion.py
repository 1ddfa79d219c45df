"""Loops over the same parts in one: what their turns have in common is done once."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from tnconv.codegen.lowering.arrays import Step, Turns
from tnconv.codegen.lowering.constants import words
from tnconv.codegen.prices import cost
from tnconv.codegen.routes.loops import NAME, held

TOTALS = '''def totals(rows):
    """The sum of each column of rows."""
    sums = None
    for row in rows:
        sums = row if sums is None else [total + value for total, value in zip(sums, row)]
    return sums
'''


def fused(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The same steps, with one loop for all sums over the same parts that can run together."""
    groups: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        if step.turns is not None:
            groups[step.turns.over].append(step)
    found = list(steps)
    for group in groups.values():
        at = found.index(group[0])
        known = {step.name for step in found[:at]}
        later = {step.name for step in found} - known
        together = [step for step in group if later.isdisjoint(_needs(step))]
        if len(together) > 1:
            found = _together(found, together, f"t{len(found) + 1}")
    return tuple(found)


def shares(turns: Turns) -> dict[str, float]:
    """The seconds of each step in a loop, over all turns, by what tells it from others."""
    return {f"{turns.over}: {s.code}": turns.count * s.kernel.seconds for s in turns.steps}


def _needs(step: Step) -> set[str]:
    assert step.turns is not None
    return {word for line in (*step.turns.body, step.turns.output) for word in words(line)}


def _together(steps: list[Step], sums: Sequence[Step], name: str) -> list[Step]:
    """One loop in the place of the first, and its results in those of all."""
    inner: dict[str, Step] = {}  # by code
    outputs = []
    for step in sums:
        assert step.turns is not None
        names: dict[str, str] = {}
        for each in step.turns.steps:
            code = _renamed(each.code, names)
            same = inner.setdefault(code, replace(each, name=f"u{len(inner) + 1}", code=code))
            names[each.name] = same.name
        outputs.append(_renamed(step.turns.output, names))
    first = sums[0].turns
    assert first is not None
    turns = Turns(first.over, first.count, tuple(inner.values()), f"({', '.join(outputs)})")
    code = f"totals({' '.join([turns.output, *turns.body])})"
    loop = Step(name, code, (0,), _kernel(turns, sums), sums[0].comment)
    picked = {
        step.name: replace(step, code=f"{name}[{at}]", kernel=FREE, comment="", turns=None)
        for at, step in enumerate(sums)
    }
    at = steps.index(sums[0])
    return [*steps[:at], loop, *(picked.get(step.name, step) for step in steps[at:])]


def _renamed(code: str, names: Mapping[str, str]) -> str:
    return NAME.sub(lambda found: names.get(found[0], found[0]), code)


FREE = cost.Kernel("part of a loop", 0, 0, 0.0)


def _kernel(turns: Turns, sums: Sequence[Step]) -> cost.Kernel:
    """All turns, what they hold, and adding up what they give."""
    entries = [prod(step.shape) for step in sums]
    added = [cost.elementwise(size, 2 * size) for size in entries]
    kernels = [*(step.kernel for step in turns.steps), *added]
    return cost.Kernel(
        "loop",
        turns.count * sum(kernel.flops for kernel in kernels),
        turns.count * sum(kernel.bytes for kernel in kernels),
        turns.count * (cost.now().turn + sum(kernel.seconds for kernel in kernels)),
        held(turns.steps, sum(entries)) + cost.item() * sum(entries),
    )
