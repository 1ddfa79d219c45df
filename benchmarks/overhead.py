"""What calls and compilations cost beside the kernels: microseconds and milliseconds.

Run as ``python -m benchmarks.overhead``; ``--help`` lists the options. A call's overhead is the
difference of medians, on operands so small that kernels take next to nothing, to the function of
the program's own source. A cold compilation finds nothing in memory or on disk, and ends with that
function. Both are times of one thread.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import tnconv
from benchmarks import cases, contestants, measure
from benchmarks.cases import Layer
from benchmarks.contestants import OPERATIONS
from tnconv.codegen.prices import cost

MOST_CALL, MOST_COMPILE = 4.0, 100.0  # microseconds and milliseconds that are allowed
TINY = Layer("tiny", ("conv",), 2, 3, (3, 3), (1, 1), (1, 1), (1, 1), 1, (2, 5, 5), (3, 5, 5))
KEEP = ("tnconv.codegen.prices.store", "tnconv.codegen.prices.cost")  # what a process reads once
BATCH = 8


@dataclass
class Calls:
    """Microseconds a call on tiny operands: bare torch calls, and what we add to the first."""

    operation: str
    source: float
    torch: float
    program: float
    functional: float


@dataclass
class Compile:
    """Milliseconds of a cold compilation."""

    operation: str
    layer: str
    shapes: str
    milliseconds: float


def calls(operation: str, seconds: float) -> Calls:
    """The overhead of a program and of our function, over the source's function."""
    case = contestants.case(TINY, 2)
    program = tnconv.compile(contestants.network(operation, case))
    operands = {name: getattr(case, name) for name in program.operands}
    ways: dict[str, measure.Call] = {
        "source": partial(program.function, *operands.values()),
        "torch": contestants.contestants(operation)["torch"](operation, case),
        "program": partial(program, **operands),
        "functional": contestants.contestants(operation)["tnconv"](operation, case),
    }
    for way in ways.values():
        way()
    timed = measure.interleaved(ways, seconds, clock=time.process_time)
    taken = {name: timing.median * 1e6 for name, timing in timed.items()}
    source = taken["source"]
    added = (taken[name] - source for name in ("program", "functional"))
    return Calls(operation, source, taken["torch"], *added)


def compiles(layers: Sequence[Layer], repetitions: int) -> Iterator[Compile]:
    """Cold compilations of all operations on the layers, after one that warms up."""
    _compile("forward", contestants.case(layers[0], BATCH))
    for layer in layers:
        case = contestants.case(layer, BATCH)
        for operation in OPERATIONS:
            taken = [_compile(operation, case) for _ in range(repetitions)]
            yield Compile(operation, layer.name, layer.describe(), median(taken) * 1e3)


def _compile(operation: str, case: contestants.Case) -> float:
    network = contestants.network(operation, case)
    forget()
    with measure.own_cache():
        started = time.process_time()
        function = tnconv.compile(network).function
        taken = time.process_time() - started
    assert callable(function)
    return taken


def forget() -> None:
    """Clear what simplification and code generation remember in memory."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("tnconv.simplify", "tnconv.codegen")) and name not in KEEP:
            for value in list(vars(module).values()):
                if callable(clear := getattr(value, "cache_clear", None)):
                    clear()
    cost.in_use().answers.clear()


def lines(called: Sequence[Calls], compiled: Sequence[Compile]) -> Iterator[str]:
    """Both tables in Markdown; what is above the bar is bold."""
    yield f"Microseconds a call adds to the torch calls of its program (asked: ≤ {MOST_CALL:g})."
    yield ""
    yield "| operation | these torch calls | compiled program | `functional` |"
    yield "| --- | --- | --- | --- |"
    for row in called:
        cells = " | ".join(_cell(added, MOST_CALL) for added in (row.program, row.functional))
        yield f"| {row.operation} | {row.source:.1f} | {cells} |"
    yield ""
    yield f"Milliseconds of a cold compilation, batch {BATCH} (asked: ≤ {MOST_COMPILE:g})."
    yield ""
    yield "| operation | layers | median | worst | at |"
    yield "| --- | --- | --- | --- | --- |"
    for operation in dict.fromkeys(row.operation for row in compiled):
        some = [row for row in compiled if row.operation == operation]
        worst = max(some, key=lambda row: row.milliseconds)
        middle = _cell(median(row.milliseconds for row in some), MOST_COMPILE)
        most = _cell(worst.milliseconds, MOST_COMPILE)
        yield f"| {operation} | {len(some)} | {middle} | {most} | {worst.shapes} |"


def _cell(value: float, most: float) -> str:
    return f"{value:.1f}" if value <= most else f"**{value:.1f}**"


def plot(compiled: Sequence[Compile], file: Path) -> None:
    """Sorted times of cold compilations, one line for each operation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.subplots()
    for operation in dict.fromkeys(row.operation for row in compiled):
        times = [row.milliseconds for row in compiled if row.operation == operation]
        axis.plot(sorted(times), label=operation)
    axis.axhline(MOST_COMPILE, color="black", linewidth=0.5)
    axis.set(xlabel="layers, sorted", ylabel="cold compilation in ms", yscale="log")
    axis.legend(fontsize=7)
    figure.savefig(file)


def loaded(saved: dict[str, Any]) -> tuple[list[Calls], list[Compile]]:
    """What a run has written."""
    return [Calls(**row) for row in saved["calls"]], [Compile(**row) for row in saved["rows"]]


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    result.add_argument("--seconds", type=float, default=2.0, help="time per operation's calls (2)")
    result.add_argument("--repetitions", type=int, default=3, help="of every compilation (3)")
    result.add_argument("--json", type=Path, help="write results to this file")
    return result


def main(arguments: Sequence[str]) -> None:
    """Run what the command line asks for."""
    options = parser().parse_args(arguments)
    measure.with_allocator("benchmarks.overhead", arguments)
    torch.set_num_threads(1)
    called = [calls(operation, options.seconds) for operation in OPERATIONS]
    compiled = list(compiles(cases.quick(), options.repetitions))
    print(*lines(called, compiled), sep="\n")
    if options.json:
        rows, clock = [asdict(row) for row in compiled], "one thread's CPU time"
        given = {"clock": clock, "calls": [asdict(row) for row in called]}
        measure.write_results(options.json, "cpu", rows, **given)


if __name__ == "__main__":
    main(sys.argv[1:])
