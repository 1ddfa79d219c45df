"""Two checkouts of tnconv in turns: is what this one compiles as fast as what another one does?

Run as ``python -m benchmarks.against OTHER --every 6``, with OTHER another checkout of this
repository, such as a worktree of an earlier commit; ``--help`` lists the options. Each checkout has
a process of its own, and the two are timed in turns on the same convolutions, by the processes' own
clocks. A ratio is the other's time over ours, so above 1 is a gain; geometric means and the worst
rows are printed for every operation. Programs whose code is equal have the ratio 1 and are not
timed, unless ``--equal`` asks for it. Warm calls are those of `CALLS` on operands so small that
kernels take next to nothing; ``--warm`` times them alone.
"""

import argparse
import ast
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import geometric_mean, median
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
OPERATIONS = (
    "forward",
    "weight_vjp",
    "input_vjp",
    "per_sample_weight_grad",
    "gradient_norms",
    "kfac_reduce",
    "kfac_expand",
)
CALLS = ("converted module", "contract", "program", *(f"functional {o}" for o in OPERATIONS))
LEAST = 0.02  # seconds of one sample
Options = argparse.Namespace


class Checkout:
    """A process in which one checkout's programs run."""

    def __init__(self, folder: Path, threads: int, worker: str = __file__) -> None:
        command = [sys.executable, worker, "--worker", "--threads", str(threads)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=folder, text=True, **pipes)

    def ask(self, *words: object) -> float:
        """Send a line, and wait for the number that answers it."""
        given, taken = _pipe(self.process.stdin), _pipe(self.process.stdout)
        print(*words, file=given, flush=True)
        answer = taken.readline()
        if not answer:
            raise RuntimeError(f"the worker in {self.process.args!r} ended; see its output above")
        return float(answer)

    def close(self) -> None:
        """End the process."""
        _pipe(self.process.stdin).close()
        self.process.wait()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def work(threads: int) -> None:
    """Answer lines: ``make OPERATION NUMBER``, ``warm CALL``, ``code OPERATION NUMBER``, ``run N``.

    The first two prepare a call, the last times it; ``code`` answers a number for what the
    operation's program is.
    """
    sys.path.insert(0, str(Path.cwd()))
    import torch

    from benchmarks import cases, contestants, measure

    torch.set_num_threads(threads)
    measure.touch_pages()
    call: Callable[[], object] | None = None
    for line in sys.stdin:
        word, *arguments = line.split()
        count = int(arguments[0]) if word == "run" else 1
        if word != "run" and word != "warm":
            case = contestants.case(cases.layers()[int(arguments[1])])
        if word == "code":
            print(_code(contestants.network(arguments[0], case)), flush=True)
            continue
        if word == "make":
            call = contestants.contestants(arguments[0])["tnconv"](arguments[0], case)
        if word == "warm":
            call = _warm(" ".join(arguments))
        assert call is not None
        for _ in range(3 if word != "run" else 0):  # sizes that return are searched for
            call()
        started = time.process_time()
        for _ in range(count):
            call()
        print((time.process_time() - started) / count, flush=True)


def _code(network: object) -> int:
    """A number that programs of equal code have in common, whatever their comments are."""
    import tnconv

    text = ast.unparse(ast.parse(tnconv.compile(network).source))  # type: ignore[call-overload]
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)  # a double can hold it


def _warm(name: str) -> Callable[[], object]:
    """One of `CALLS` on a tiny convolution."""
    import torch

    import tnconv
    from benchmarks import contestants
    from benchmarks.overhead import TINY

    case = contestants.case(TINY, 2)
    if name == "converted module":
        module = tnconv.nn.convert(torch.nn.Conv2d(2, 3, 3, padding=1))
        return lambda: module(case.x)
    if name == "contract":
        network = contestants.network("forward", case)
        operands = {name: getattr(case, name) for name in network.operands}
        return lambda: tnconv.contract(network, **operands)
    if name == "program":
        program = tnconv.compile(contestants.network("forward", case))
        operands = {name: getattr(case, name) for name in program.operands}
        return lambda: program(**operands)
    operation = name.removeprefix("functional ")
    return contestants.contestants(operation)["tnconv"](operation, case)


def compared(ours: Checkout, other: Checkout, *prepare: object, rounds: int) -> float:
    """The median over rounds of the other's time over ours, after this line to both."""
    once = max(each.ask(*prepare) for each in (ours, other))
    count = max(1, round(LEAST / max(once, 1e-6)))
    found = []
    for turn in range(rounds):
        taken = {}
        for each in (ours, other)[:: 1 if turn % 2 else -1]:
            taken[each] = each.ask("run", count)
        found.append(taken[other] / taken[ours])
    return median(found)


def row(ours: Checkout, other: Checkout, operation: str, number: int, options: Options) -> float:
    """The ratio for one operation on one convolution; 1 if both run the same code."""
    asked = "code", operation, number
    if not options.equal and ours.ask(*asked) == other.ask(*asked):
        return 1.0
    return compared(ours, other, "make", operation, number, rounds=options.rounds)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__)
    result.add_argument("other", type=Path, nargs="?", help="the folder of the other checkout")
    result.add_argument("--every", type=int, default=6, help="take one of every N convolutions (6)")
    result.add_argument("--operation", action="append", choices=OPERATIONS, help="repeatable")
    result.add_argument("--rounds", type=int, default=11, help="rounds of each pair (11)")
    result.add_argument("--equal", action="store_true", help="time programs of equal code, too")
    result.add_argument("--warm", action="store_true", help="time warm calls only")
    result.add_argument("--threads", type=int, default=1)
    result.add_argument("--json", type=Path, help="write results to this file")
    result.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return result


def main(arguments: Sequence[str]) -> None:
    """Run what the command line asks for."""
    options = parser().parse_args(arguments)
    if options.worker:
        work(options.threads)
        return
    from benchmarks import cases, measure

    measure.with_allocator("benchmarks.against", arguments)
    if options.other is None or not (options.other / "benchmarks" / "cases.py").is_file():
        raise SystemExit(f"other is {options.other}; expected the folder of another checkout")
    ours, other = Checkout(ROOT, options.threads), Checkout(options.other, options.threads)
    found: dict[str, dict[str, float]] = {}
    layers = cases.layers()
    for operation in () if options.warm else options.operation or OPERATIONS:
        ratios = {
            f"{layers[at].describe()} ({at})": row(ours, other, operation, at, options)
            for at in range(0, len(layers), options.every)
        }
        found[operation] = ratios
        worst = sorted(ratios.items(), key=lambda item: item[1])[:3]
        words = ", ".join(f"{name} {ratio:.2f}" for name, ratio in worst)
        mean = geometric_mean(ratios.values())
        timed = sum(ratio != 1.0 for ratio in ratios.values())
        print(
            f"{operation:24} {mean:.3f} over {len(ratios)}, {timed} timed; worst {words}",
            flush=True,
        )
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    for name in CALLS if not options.operation else ():
        ratio = compared(ours, other, "warm", name, rounds=options.rounds)
        print(f"warm call, {name:34} {ratio:.3f}", flush=True)
    ours.close()
    other.close()


if __name__ == "__main__":
    main(sys.argv[1:])
