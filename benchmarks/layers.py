"""Operations of convolution layers: tnconv against torch's own way and einconv.

Run as ``python -m benchmarks.layers --quick``; ``--help`` lists the options.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from math import exp, log
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks import cases, contestants, further, measure
from benchmarks.contestants import OPERATIONS, PEERS, TOLERANCE, TUNED, Case, TooLargeError
from tnconv.codegen.prices.calibration import calibrate
from tnconv.codegen.programs.names import Names

OURS, OURS_TUNED, AGAIN = "tnconv", "tnconv tuned", " again"
Makers = dict[str, Callable[[], Callable[[], Tensor]]]
CASES: dict[str, Callable[[], tuple[cases.Layer, ...]]] = {
    "all": lambda: cases.layers() + cases.own(),
    "cnn": lambda: cases.layers(),
    "own": lambda: cases.own(),
}
OLDER = {"dtype": "float32", "channels_last": False, "calibrated": False}  # of files without them
SLOWER = 0.95  # where both ratios are below, tnconv is reported as slower than torch


@dataclass
class Row:
    """One operation on one layer; ratios above 1 mean that tnconv is faster."""

    operation: str
    layer: str
    kind: str
    shapes: str
    count: int
    batch: int
    plan: str
    work: str
    predicted: float
    compiling: float
    median: dict[str, float] = field(default_factory=dict)
    minimum: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    not_timed: dict[str, str] = field(default_factory=dict)

    def ratio(self, name: str, statistic: str = "median") -> float | None:
        """How many times longer than tnconv's a contestant's call takes."""
        times = getattr(self, statistic)
        return times[name] / times[OURS] if name in times and OURS in times else None

    @property
    def slower(self) -> bool:
        """Whether tnconv is slower than torch by more than 5%, by medians and by minima."""
        ratios = [self.ratio("torch", statistic) for statistic in ("median", "minimum")]
        return all(ratio is not None and ratio < SLOWER for ratio in ratios)


@cache
def _layers() -> dict[str, cases.Layer]:
    return {layer.name: layer for layer in CASES["all"]()}


def layer_of(row: Row) -> cases.Layer | None:
    """The case of a row, if it is still one."""
    return _layers().get(row.layer)


def _described(operation: str, case: Case) -> Row:
    """The row before anything is measured; plans are told of the main operations only."""
    layer = case.layer
    result = Row(
        *(operation, layer.name, layer.kind, layer.describe(), len(layer.layers), len(case.x)),
        *("", "", 0.0, 0.0),
    )
    if operation in OPERATIONS:
        started = time.process_time()
        program = contestants.compiled(operation, case, dtype=case.x.dtype)
        result.compiling = time.process_time() - started
        names = Names.of(list(program.operands), program.steps)
        code = "; ".join(names.call(step.value) for step in program.steps)
        calls = re.findall(r"F\.\w+|aten\.\w+|torch\.\w+(?=\()|@|permute|unfold", code)
        best, *_ = program.terms[0]
        result.plan, result.work, result.predicted = best.label, " ".join(calls), best.seconds
    return result


def _other_plans(operation: str, case: Case, count: int) -> Makers:
    program = contestants.compiled(operation, case)
    operands = {name: getattr(case, name) for name in program.operands}
    (best, *rest), *_ = program.terms
    return {
        f"{plan.label} (predicted {plan.seconds * 1e3:.3g} ms)": partial(
            partial, replace(program, terms=((plan, best),)), **operands
        )
        for plan in rest[:count]
    }


def row(operation: str, case: Case, options: argparse.Namespace) -> Row:
    """Check every contestant against torch's result, then time those that agree."""
    result, device = _described(operation, case), options.device
    makers: Makers = {
        name: partial(make, operation, case)
        for name, make in contestants.contestants(operation).items()
        if not options.peer or name in (OURS, "torch", *options.peer)
        if name not in contestants.missing()
    }
    if operation in TUNED or (options.tune and operation in OPERATIONS):
        makers[OURS_TUNED] = partial(contestants.tuned, operation, case)
    if options.self_check:
        makers |= {f"{name}{AGAIN}": makers[name] for name in (OURS, "torch")}
    if options.plans and operation in OPERATIONS:
        makers |= _other_plans(operation, case, options.plans)
    calls = _agreeing(makers, result.not_timed)
    if options.memory:
        result.memory = {name: measure.peak_memory(call, device) for name, call in calls.items()}
    clock = time.process_time if options.cpu_time else time.perf_counter
    for name, timing in measure.interleaved(calls, options.seconds, device, clock).items():
        result.median[name] = timing.median
        result.minimum[name] = timing.minimum
        result.rounds[name] = len(timing.samples)
    return result


def _agreeing(makers: Makers, not_timed: dict[str, str]) -> dict[str, Callable[[], Tensor]]:
    """The calls whose results equal torch's; why the others are left out goes to ``not_timed``."""
    calls: dict[str, Callable[[], Tensor]] = {}
    try:
        torch_call = makers["torch"]()
        expected = torch_call()
    except (TooLargeError, NotImplementedError) as reason:
        not_timed.update({name: f"not run: {reason}" for name in makers})
        return calls
    for name, make in makers.items():
        if name == "torch":
            calls[name] = torch_call
            continue
        try:
            call = make()
            error = contestants.error(call(), expected)
        except TooLargeError as reason:
            not_timed[name] = f"too large: {reason}"
        except (RuntimeError, ValueError, TypeError, IndexError, MemoryError) as reason:
            not_timed[name] = f"failed: {type(reason).__name__}: {str(reason)[:200]}"
        else:
            if error <= TOLERANCE[expected.dtype]:
                calls[name] = call
            else:
                not_timed[name] = f"wrong: relative error {error:.1e}"
    return calls


def rows(options: argparse.Namespace, done: Collection[tuple[str, str]] = ()) -> Iterator[Row]:
    """All cases that the command line asks for, layer by layer, but (operation, layer) done."""
    chosen = cases.quick() if options.quick else CASES[options.cases]()
    for layer in chosen:
        if options.network in (None, layer.network):
            wanted = options.operation or (further.WAYS if options.further else OPERATIONS)
            left = [operation for operation in wanted if (operation, layer.name) not in done]
            case = _case(layer, options) if left else None
            for operation in left:
                assert case is not None
                yield row(operation, case, options)


def _case(layer: cases.Layer, options: argparse.Namespace) -> Case:
    dtype = getattr(torch, options.dtype)
    last = options.channels_last and layer.dims == 2
    memory_format = torch.channels_last if last else torch.contiguous_format
    return contestants.case(layer, options.batch, options.device, dtype, memory_format)


def others(found: Sequence[Row], operation: str) -> list[str]:
    """All that were timed beside tnconv, but tnconv's other plans."""
    known = [*contestants.contestants(operation), OURS_TUNED, OURS + AGAIN, "torch" + AGAIN]
    timed = {name for row in found if row.operation == operation for name in row.median}
    return [name for name in known if name != OURS and name in timed]


def summary(found: Sequence[Row], name: str) -> dict[str, float]:
    """Geometric mean, median and worst of the ratios to one contestant."""
    return summarised([ratio for row in found if (ratio := row.ratio(name)) is not None])


def summarised(ratios: Sequence[float]) -> dict[str, float]:
    """How many there are, their geometric mean, their median and the least."""
    if not ratios:
        return {"cases": 0}
    return {
        "cases": len(ratios),
        "geometric mean": exp(sum(map(log, ratios)) / len(ratios)),
        "median": median(ratios),
        "worst": min(ratios),
    }


def show(found: Sequence[Row]) -> None:
    """Tables per operation, the summary, and where tnconv is slower than torch."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    for operation in dict.fromkeys(row.operation for row in found):
        peers = others(found, operation)
        memory = [name for name in (OURS, *PEERS) if any(name in row.memory for row in found)]
        table = Table(title=operation)
        for column in ("layer", "shapes", "n", "tnconv ms", *peers, "plan"):
            number = column in ("n", "tnconv ms", *peers)
            table.add_column(column, justify="right" if number else "left")
        for name in memory:
            table.add_column(f"{name} MB", justify="right")
        for row in found:
            if row.operation == operation:
                table.add_row(
                    *(row.layer, row.shapes, str(row.batch)),
                    f"{row.median[OURS] * 1e3:.3f}" if OURS in row.median else "wrong",
                    *(_cell(row, name) for name in peers),
                    row.plan,
                    *(f"{row.memory.get(name, 0) / 1e6:.1f}" for name in memory),
                )
        console.print(table)
    table = Table(title="ratios to tnconv: above 1, tnconv is faster")
    for column in ("operation", "contestant", "cases", "geometric mean", "median", "worst"):
        table.add_column(column)
    for operation in dict.fromkeys(row.operation for row in found):
        for name in others(found, operation):
            values = summary([row for row in found if row.operation == operation], name)
            table.add_row(operation, name, *(f"{value:.3g}" for value in values.values()))
    console.print(table)
    slow = [row for row in found if row.slower]
    console.print(f"slower than torch by more than 5%: {len(slow)} of {len(found)}")
    for row in sorted(slow, key=lambda row: row.ratio("torch") or 1.0):
        console.print(
            f"  {row.ratio('torch'):.2f} (minima {row.ratio('torch', 'minimum'):.2f})  "
            f"{row.operation} {row.layer}  {row.shapes}  n={row.batch}\n"
            f"      {row.plan}: {row.work}, predicted {row.predicted * 1e3:.3g} ms",
            soft_wrap=True,
            highlight=False,
        )
        for name in row.median.keys() - {OURS, *others(found, row.operation)}:
            console.print(f"      {row.ratio(name):.2f} {name}", soft_wrap=True, highlight=False)
    for row in found:
        for name, why in row.not_timed.items():
            console.print(f"not timed: {row.operation} {row.layer} {name}: {why}", soft_wrap=True)


def _cell(row: Row, name: str) -> str:
    if (ratio := row.ratio(name)) is not None:
        return f"{ratio:.2f}" + ("*" if row.rounds[name] == 1 else "")
    return row.not_timed.get(name, "").partition(":")[0]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__)
    result.add_argument("--quick", action="store_true", help="one layer per network and kind")
    result.add_argument("--cases", choices=CASES, default="all", help="CNNs', our own, or all")
    result.add_argument(
        "--operation", action="append", choices=[*OPERATIONS, *further.WAYS], help="repeatable"
    )
    result.add_argument(
        "--further",
        action="store_true",
        help="all other operations against torch's obvious ways, on two-dimensional layers",
    )
    networks = dict.fromkeys(h.network for h in CASES["all"]())
    result.add_argument("--network", choices=networks)
    result.add_argument("--device", default="cpu")
    result.add_argument("--batch", type=int, help="one batch size for all layers")
    result.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    result.add_argument("--channels-last", action="store_true", help="operands with channels last")
    result.add_argument("--peer", action="append", help="only torch and these; repeatable")
    result.add_argument("--seconds", type=float, help="time per case (quick: 0.2, else 0.5)")
    result.add_argument("--threads", type=int, help="torch's threads")
    result.add_argument(
        "--calibrate",
        action="store_true",
        help="plan by prices that are measured first, not by those that ship",
    )
    result.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, and its own time: for a CPU that others use at the same time",
    )
    result.add_argument("--memory", action="store_true", help="also peak memory")
    result.add_argument(
        "--tune",
        action="store_true",
        help=f"tnconv also tuned in all operations, not only {', '.join(TUNED)}",
    )
    result.add_argument(
        "--self-check",
        action="store_true",
        help="tnconv and torch each twice: what two equal calls differ by",
    )
    result.add_argument("--plans", type=int, default=0, help="also so many of tnconv's other plans")
    result.add_argument("--json", type=Path, help="write results to this file, and go on with it")
    result.add_argument(
        "--default-allocator", action="store_true", help="leave malloc's settings as they are"
    )
    return result


def main(arguments: Sequence[str]) -> None:
    """Run what the command line asks for."""
    options = parser().parse_args(arguments)
    if not options.default_allocator:
        measure.with_allocator("benchmarks.layers", arguments)
        measure.touch_pages()
    try:
        import rich.progress
    except ImportError:
        sys.exit("benchmarks print with rich, which is missing: pip install 'tnconv[demo]'")
    if options.seconds is None:
        options.seconds = 0.2 if options.quick else 0.5
    if options.cpu_time or options.threads:
        torch.set_num_threads(1 if options.cpu_time else options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name in sorted(contestants.missing()):
        print(f"{name} is not installed (pip install 'tnconv[peers]'): left out", file=sys.stderr)
    started, found = time.perf_counter(), resumed(options)
    done = {(row.operation, row.layer) for row in found}
    with measure.own_cache():
        if options.calibrate:
            calibrate(options.device, getattr(torch, options.dtype))
        for result in rich.progress.track(rows(options, done), "measuring", total=None):
            found.append(result)
            if options.json:
                _write(options, found)
    show(found)
    print(f"{len(found)} cases in {time.perf_counter() - started:.0f} s")


def resumed(options: argparse.Namespace) -> list[Row]:
    """The rows of an interrupted run that ``--json`` names, if it had the same settings.

    Raises:
        SystemExit: it had others.
    """
    if not options.json or not options.json.exists():
        return []
    saved = json.loads(options.json.read_text())
    for name, value in _settings(options).items():
        if saved.get(name, OLDER.get(name)) != value:
            sys.exit(
                f"{options.json} has {name} = {saved.get(name)!r}, this run {value!r}; "
                "expected equal settings to go on with it, or another file"
            )
    return [Row(**values) for values in saved["rows"]]


def _settings(options: argparse.Namespace) -> dict[str, object]:
    """What all rows of one file have in common."""
    environment = measure.environment(options.device)
    kept = ("torch", "threads", "device", "allocator")
    return {
        "settings": {name: environment[name] for name in kept},
        "clock": "one thread's CPU time" if options.cpu_time else "wall time",
        "seconds_per_case": options.seconds,
        "batch": options.batch,
        "dtype": options.dtype,
        "channels_last": options.channels_last,
        "calibrated": options.calibrate,
    }


def _write(options: argparse.Namespace, found: Sequence[Row]) -> None:
    """What was found until now, so that an interrupted run leaves its results."""
    summaries = {
        operation: {
            name: summary([row for row in found if row.operation == operation], name)
            for name in others(found, operation)
        }
        for operation in dict.fromkeys(row.operation for row in found)
    }
    results = {
        "environment": measure.environment(options.device),
        **_settings(options),
        "summary": summaries,
        "rows": [asdict(row) for row in found],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
