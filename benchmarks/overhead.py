"""What calls and compilations cost beside the kernels: microseconds and milliseconds.

Run as ``python -m benchmarks.overhead``; ``--help`` lists the options. A call's overhead is the
difference of medians, on operands so small that kernels take next to nothing, to the function of
the program's own source. A cold compilation finds nothing in memory or on disk, and ends with that
function; `LONG` are networks that take the search longest. All are times of one thread.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

import torch

import tnconv
from benchmarks import cases, contestants, measure
from benchmarks.cases import Layer
from benchmarks.contestants import OPERATIONS
from tnconv.codegen import Program
from tnconv.codegen.baseline import baseline
from tnconv.codegen.prices import cost
from tnconv.diagrams import Tensor, TensorNetwork, View, conv, kfac_expand
from tnconv.diagrams.expression import Expression

MOST_CALL = 4.0  # microseconds that are allowed
MEDIAN, WORST = 15.0, 50.0  # milliseconds that are allowed for a cold compilation
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
    """Milliseconds of a cold compilation, and of a baseline program: see `tiered_compilation`."""

    operation: str
    layer: str
    shapes: str
    milliseconds: float
    baseline: float = nan


@dataclass
class Long:
    """Seconds of a cold compilation that takes long, and how many are allowed."""

    name: str
    seconds: float
    most: float


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
        for _ in range(3):  # sizes that return are searched for
            way()
    timed = measure.interleaved(ways, seconds, clock=time.process_time)
    taken = {name: timing.median * 1e6 for name, timing in timed.items()}
    source = taken["source"]
    added = (taken[name] - source for name in ("program", "functional"))
    return Calls(operation, source, taken["torch"], *added)


def compiles(layers: Sequence[Layer], repetitions: int) -> Iterator[Compile]:
    """Cold compilations of all operations on the layers, after one that warms up."""
    _compile("forward", contestants.case(layers[0], BATCH), tnconv.compile)
    for layer in layers:
        case = contestants.case(layer, BATCH)
        for operation in OPERATIONS:
            searched, first = (
                median(_compile(operation, case, tier) for _ in range(repetitions)) * 1e3
                for tier in (tnconv.compile, baseline)
            )
            yield Compile(operation, layer.name, layer.describe(), searched, first)


def _compile(operation: str, case: contestants.Case, tier: Callable[..., Program]) -> float:
    network = contestants.network(operation, case)
    return _seconds(lambda: tier(network).function)


def _seconds(compilation: Callable[[], object]) -> float:
    forget()
    with measure.own_cache():
        started = time.process_time()
        compilation()
        return time.process_time() - started


def chain(count: int) -> TensorNetwork:
    """The product of a chain of ``count`` matrices, each two by two."""
    sizes = {f"a{at}": 2 for at in range(count + 1)}
    nodes = (Tensor(f"m{at}", View.of(sizes, f"a{at}", f"a{at + 1}")) for at in range(count))
    return TensorNetwork(tuple(nodes), View.of(sizes, "a0", f"a{count}"), sizes)


def _layer() -> list[Expression]:
    """Three networks of one layer: its output, its weight's gradient, and a Kronecker factor."""
    shapes = (6, 8, 14, 14), (8, 8, 3, 3)
    layer = conv(*shapes, padding=1)
    return [layer, layer.vjp("weight"), kfac_expand(shapes[0], 3, padding=1)]


def least(networks: Sequence[Expression]) -> int:
    """The least memory within which networks can be computed together, as an error tells it."""
    try:
        tnconv.compile(networks, memory_limit=1)
    except ValueError as error:
        return int(str(error).split()[-2])
    raise AssertionError("nothing is computed within one byte")


def long() -> Iterator[Long]:
    """The compilations that take longest: long chains, and several networks within a limit."""
    for count in (60, 120):
        network = chain(count)
        taken = _seconds(lambda network=network: tnconv.compile(network).function)  # type: ignore[misc]
        yield Long(f"chain of {count} matrices, 2 by 2", taken, 1.0)
    networks = _layer()
    smallest, largest = least(networks), tnconv.compile(networks).peak_memory()
    for share in (0.0, 0.3, 0.6, 0.9):
        limit = smallest + int(share * (largest - smallest))
        program = tnconv.compile(networks, memory_limit=limit)
        how = "in chunks" if any(len(chunk.pieces) > 1 for chunk in program.chunks) else "whole"
        taken = _seconds(lambda limit=limit: tnconv.compile(networks, memory_limit=limit))  # type: ignore[misc]
        name = f"layer, gradient and factor within {limit / largest:.0%} of their memory, {how}"
        yield Long(name, taken, 2.0)


def forget() -> None:
    """Clear what simplification and code generation remember in memory."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("tnconv.simplify", "tnconv.codegen")) and name not in KEEP:
            for value in list(vars(module).values()):
                if callable(clear := getattr(value, "cache_clear", None)):
                    clear()
    cost.in_use().answers.clear()


def lines(
    called: Sequence[Calls], compiled: Sequence[Compile], longest: Sequence[Long] = ()
) -> Iterator[str]:
    """The tables in Markdown; what is above the bar is bold."""
    yield f"Microseconds a call adds to the torch calls of its program (asked: ≤ {MOST_CALL:g})."
    yield ""
    yield "| operation | these torch calls | compiled program | `functional` |"
    yield "| --- | --- | --- | --- |"
    for row in called:
        cells = " | ".join(_cell(added, MOST_CALL) for added in (row.program, row.functional))
        yield f"| {row.operation} | {row.source:.1f} | {cells} |"
    yield ""
    asked = f"asked: median ≤ {MEDIAN:g}, worst ≤ {WORST:g}"
    yield f"Milliseconds of a cold compilation by a search, batch {BATCH} ({asked}), and of a"
    yield "baseline program, which is made without one."
    yield ""
    yield "| operation | layers | baseline program | median | worst | at |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for operation in dict.fromkeys(row.operation for row in compiled):
        some = [row for row in compiled if row.operation == operation]
        worst = max(some, key=lambda row: row.milliseconds)
        middle = _cell(median(row.milliseconds for row in some), MEDIAN)
        most = _cell(worst.milliseconds, WORST)
        first = f"{median(row.baseline for row in some):.1f}"
        yield f"| {operation} | {len(some)} | {first} | {middle} | {most} | {worst.shapes} |"
    times = [row.milliseconds for row in compiled]
    first = f"{median(row.baseline for row in compiled):.1f}"
    both = f"{_cell(median(times), MEDIAN)} | {_cell(max(times), WORST)}"
    yield f"| all | {len(times)} | {first} | {both} | |"
    if longest:
        yield from ("", "Seconds of the cold compilations that take longest.", "")
        yield from ("| networks | seconds | asked |", "| --- | --- | --- |")
        for each in longest:
            seconds = (
                f"{each.seconds:.2f}" if each.seconds <= each.most else f"**{each.seconds:.2f}**"
            )
            yield f"| {each.name} | {seconds} | ≤ {each.most:g} |"


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
    axis.axhline(WORST, color="black", linewidth=0.5)
    axis.set(xlabel="layers, sorted", ylabel="cold compilation in ms", yscale="log")
    axis.legend(fontsize=7)
    figure.savefig(file)


def loaded(saved: dict[str, Any]) -> tuple[list[Calls], list[Compile], list[Long]]:
    """What a run has written."""
    called, compiled = (
        [Calls(**row) for row in saved["calls"]],
        [Compile(**row) for row in saved["rows"]],
    )
    return called, compiled, [Long(**row) for row in saved.get("long", ())]


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
    longest = list(long())
    print(*lines(called, compiled, longest), sep="\n")
    if options.json:
        rows, clock = [asdict(row) for row in compiled], "one thread's CPU time"
        given = {"clock": clock, "calls": [asdict(row) for row in called]}
        given |= {"long": [asdict(row) for row in longest]}
        measure.write_results(options.json, "cpu", rows, **given)


if __name__ == "__main__":
    main(sys.argv[1:])
