"""What a program is and how it came about, in words and numbers."""

from collections.abc import Iterator
from typing import Any

from tnconv.codegen.lowering.contraction import path_flops
from tnconv.codegen.lowering.forms import forms_of
from tnconv.codegen.lowering.plans import Plan
from tnconv.codegen.lowering.schedule import Schedule
from tnconv.codegen.lowering.strided import LIKE, ONE
from tnconv.codegen.lowering.writer import Step
from tnconv.codegen.programs.names import Names, argument_names
from tnconv.codegen.programs.program import Program
from tnconv.diagrams.network import TensorNetwork
from tnconv.simplify import Firing

KIND = 25  # columns of the longest kind of kernel


def explain(program: Program[Any]) -> str:
    """Networks, rules that fired, plans and steps with costs, and why not the alternatives."""
    lines: list[str] = [line for net in program.networks for line in _indented("network", str(net))]
    lines += _indented("operands", "\n".join(_shapes(program)) or "none")
    lines += _indented("rules that fired", "\n".join(map(_fired, program.firings)) or "none")
    lines += _chunked(program) if program.chunks else _planned(program)
    lines.append(f"predicted peak memory {program.peak_memory():,} B in float32, without autograd")
    return "\n".join([*lines, *_indented("source", program.source)])


def _indented(title: str, text: str) -> list[str]:
    return [title, *(f"  {line}".rstrip() for line in text.splitlines())]


def _shapes(program: Program[Any]) -> Iterator[str]:
    return (f"{name} {shape}" for name, shape in program.operands.items())


def _fired(firing: Firing) -> str:
    """A firing, and the flops of the best path before and after it: searched for on printing."""
    before, after = path_flops(firing.before), path_flops(firing.after)
    saved = f"{before:,} to {after:,} flop" if before != after else f"{after:,} flop"
    return f"{firing}; {saved}"


def _planned(program: Program[Any]) -> Iterator[str]:
    terms = [term for net in program.networks for term in net.terms]
    for term, (plan, *_) in zip(terms, program.terms, strict=True):
        yield from _indented(f"plan, from the network {plan.label}", str(_form(term, plan.form)))
    yield from _table(program.schedule, list(argument_names(program.operands).values()))
    for chosen, *others in program.terms:
        yield from _alternatives(chosen, others)


def _form(term: TensorNetwork, name: str) -> TensorNetwork:
    """The form of the network that a plan covers."""
    return term if name == "as given" else forms_of(term)[0][name]


def _table(schedule: Schedule, arguments: list[str]) -> Iterator[str]:
    """The steps in their order, what each is made of, and what it costs."""
    names = Names.of(arguments, schedule.steps)
    of = [
        ", ".join(names.text(array) for array in step.value.reads if array not in (LIKE, ONE))
        for step in schedule.steps
    ]
    wide = max([2, *map(len, of)])
    yield "steps, in order"
    if schedule.steps:
        yield (
            f"  {'step':>4} {'of':<{wide}} {'kernel':<{KIND}} {'shape':<24} {'flop':>14} "
            f"{'bytes':>12} {'us':>9}  what it is"
        )
    for step, made_of in zip(schedule.steps, of, strict=True):
        yield _row(step, names.text(step.value), f"{made_of:<{wide}}")
    flops = sum(step.kernel.flops for step in schedule.steps)
    moved = sum(step.kernel.bytes for step in schedule.steps)
    count = len(schedule.steps)
    yield f"  {count} step{'s' * (count != 1)}, {flops:,} flop, {moved:,} B"
    yield f"  predicted time {schedule.seconds * 1e6:,.0f} us"


def _row(step: Step, name: str, made_of: str) -> str:
    kernel = step.kernel
    row = (
        f"  {name:>4} {made_of} {kernel.kind:<{KIND}} {step.shape!s:<24} {kernel.flops:>14,} "
        f"{kernel.bytes:>12,} {kernel.seconds * 1e6:>9,.1f}  {step.comment}"
    )
    return row.rstrip()


def _alternatives(chosen: Plan, others: list[Plan]) -> Iterator[str]:
    """Every other plan once: several forms of a network can lead to the same kernels."""
    distinct: dict[object, Plan] = {_cost(chosen): chosen}
    for plan in others:
        distinct.setdefault(_cost(plan), plan)
    if len(distinct) > 1:
        yield f"alternatives to {chosen.label} ({chosen.seconds * 1e6:,.0f} us, {chosen.peak:,} B)"
    for plan in list(distinct.values())[1:]:
        count = len(plan.steps)
        yield (
            f"  {plan.seconds * 1e6:>9,.0f} us {plan.peak:>13,} B  {plan.label}; "
            f"{count} step{'s' * (count != 1)}; {_why_not(plan, chosen)}"
        )


def _cost(plan: Plan) -> tuple[object, ...]:
    return plan.routes, len(plan.steps), plan.peak, f"{plan.seconds:.4g}"


def _why_not(plan: Plan, chosen: Plan) -> str:
    if plan.seconds > chosen.seconds > 0:
        return f"{plan.seconds / chosen.seconds:.2f} times the time"
    if chosen.is_torchs and chosen.seconds <= chosen.margin * plan.seconds:
        return f"not {chosen.margin} times as fast as torch's own kernel"
    if plan.risk > chosen.risk:
        return "a dense pattern has to be clearly faster"
    if plan.peak > chosen.peak:
        return "holds more memory"
    return "shares less with other terms" if plan.seconds < chosen.seconds else "the same time"


def _chunked(program: Program[Any]) -> Iterator[str]:
    for chunk in program.chunks:
        yield str(chunk)
        for number, part in enumerate(chunk.parts, 1):
            calls = chunk.calls_of(number - 1)
            yield f"part {number}, called {'once' if calls == 1 else f'{calls} times'}"
            yield from _indented("network", str(part.network))
            yield from _planned(part)
