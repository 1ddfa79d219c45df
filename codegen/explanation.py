"""What a program is and how it came about, in words and numbers."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tnconv.codegen.arrays import Step
from tnconv.codegen.contraction import path_flops
from tnconv.simplify import Firing

if TYPE_CHECKING:
    from tnconv.codegen.program import Program, Result


def explain(program: "Program[Result]") -> str:
    """Networks, rules that fired, plans, steps with costs, alternatives that were rejected."""
    lines: list[str] = [line for net in program.networks for line in _indented("network", str(net))]
    lines += _indented("operands", "\n".join(_shapes(program)) or "none")
    lines += _indented("rules that fired", "\n".join(map(_fired, program.firings)) or "none")
    lines += _chunked(program) if program.chunks else _planned(program)
    lines.append(f"predicted peak memory {program.peak_memory():,} B in float32")
    return "\n".join([*lines, *_indented("source", program.source)])


def _indented(title: str, text: str) -> list[str]:
    return [title, *(f"  {line}" for line in text.splitlines())]


def _shapes(program: "Program[Result]") -> Iterator[str]:
    return (f"{name} {shape}" for name, shape in program.operands.items())


def _fired(firing: Firing) -> str:
    """A firing, and the flops of the best path before and after it: searched for on printing."""
    before, after = path_flops(firing.before), path_flops(firing.after)
    saved = f"{before:,} to {after:,} flop" if before != after else f"{after:,} flop"
    return f"{firing}; {saved}"


def _planned(program: "Program[Result]") -> Iterator[str]:
    schedule = program.schedule
    for plan, *_ in program.terms:
        yield f"plan, from the network {plan.label}"
    for step in schedule.steps:
        yield _row(step)
    flops = sum(step.kernel.flops for step in schedule.steps)
    moved = sum(step.kernel.bytes for step in schedule.steps)
    yield f"  {len(schedule.steps)} steps, {flops:,} flop, {moved:,} B"
    yield f"  predicted time {schedule.seconds * 1e6:,.0f} us"
    for chosen, *others in program.terms:
        if others:
            yield f"alternatives to {chosen.label} ({chosen.seconds * 1e6:,.0f} us)"
        for other in others:
            yield f"  {other.seconds * 1e6:>9,.0f} us {other.peak:>13,} B  {other.label}"


def _row(step: Step) -> str:
    kernel = step.kernel
    return (
        f"  {step.name:>4} {kernel.kind:<16} {step.shape!s:<24} {kernel.flops:>14,} flop "
        f"{kernel.bytes:>12,} B {kernel.seconds * 1e6:>9,.1f} us  {step.comment}"
    )


def _chunked(program: "Program[Result]") -> Iterator[str]:
    for chunk in program.chunks:
        yield str(chunk)
        for number, part in enumerate(chunk.parts, 1):
            yield f"part {number}, {chunk.calls_of(number - 1)} times"
            yield from _planned(part)
