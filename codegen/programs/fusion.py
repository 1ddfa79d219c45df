"""Loops over the same parts in one: what their turns have in common is done once."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace

from tnconv.codegen.lowering.strided import Strided, strided
from tnconv.codegen.lowering.substitution import recomputed, substituted
from tnconv.codegen.lowering.turns import (
    ADDED,
    ADDED_TOGETHER,
    FREE,
    PICKED,
    Turns,
    held,
    turns_of,
)
from tnconv.codegen.lowering.writer import Step
from tnconv.codegen.prices import cost


def fused(
    steps: Sequence[Step], outputs: Sequence[Strided]
) -> tuple[tuple[Step, ...], tuple[Strided, ...]]:
    """The steps and outputs with loops over the same parts fused, where they can run together."""
    groups: dict[tuple[Strided, ...], list[Strided]] = defaultdict(list)
    for step in steps:
        if step.operation is ADDED:
            groups[turns_of(step.value).parts].append(step.value)
    found, names = list(steps), dict[Strided, Strided]()
    for group in groups.values():
        if len(group) > 1 or turns_of(group[0]).products:
            found = _together(found, [substituted(value, names) for value in group], names)
    return tuple(found), tuple(substituted(output, names) for output in outputs)


def shares(turns: Turns) -> dict[Hashable, float]:
    """The seconds of each step in a loop, over all turns; loops that share it have its key."""
    return {(turns.parts, step.value): turns.count * step.kernel.seconds for step in turns.steps}


def _together(
    steps: list[Step], loops: Sequence[Strided], names: dict[Strided, Strided]
) -> list[Step]:
    """The steps with one loop in the place of the first of several, and its results for all.

    The loop adds products without computing them first, which pays for a single sum as well. The
    values that were replaced are added to ``names``.
    """
    at = next(at for at, step in enumerate(steps) if step.value is loops[0])
    later = {step.value for step in steps[at:]}
    sums = [s for s in steps[at:] if s.value in loops and later.isdisjoint(s.value.reads)]
    if len(sums) < 2 and not turns_of(loops[0]).products:
        return steps
    each = [turns_of(step.value) for step in sums]
    inner = {step.value: step for turns in each for step in turns.steps}
    outputs = tuple(output for turns in each for output in turns.outputs)
    turns = Turns(each[0].parts, tuple(inner.values()), outputs)
    loop = Step(
        strided(ADDED_TOGETHER, turns.reads, (turns,), (0,), (1,)),
        _kernel(turns, sums),
        sums[0].comment,
    )
    for position, step in enumerate(sums):
        old = step.value
        names[old] = strided(PICKED, (loop.value,), (position,), old.shape, old.strides)
    return [*steps[:at], loop, *(_renewed(step, names) for step in steps[at:])]


def _renewed(step: Step, names: dict[Strided, Strided]) -> Step:
    """The step on the values that have replaced others, or the free step of such a value."""
    if step.value in names:
        return Step(names[step.value], FREE)
    value = recomputed(step.value, names)
    if value is not step.value:
        names[step.value] = value
    return replace(step, value=value)


def _kernel(turns: Turns, sums: Sequence[Step]) -> cost.Kernel:
    """The price of all turns of the fused loop, sums included, and the bytes that it holds."""
    entries = [step.value.size for step in sums]
    added = [cost.added(size) for size in entries]
    kernels = [*(step.kernel for step in turns.steps), *added]
    return cost.Kernel(
        "loop",
        turns.count * sum(kernel.flops for kernel in kernels),
        turns.count * sum(kernel.bytes for kernel in kernels),
        cost.loop(turns.count, sum(kernel.seconds for kernel in kernels)),
        held(turns.steps, sum(entries)) + cost.bytes_per_entry() * sum(entries),
    )
