"""Two checkouts of tnconv in turns: is what this one compiles as fast as what another one does?

Run as ``python -m benchmarks.against OTHER --every 6``, with OTHER another checkout of this
repository, such as a worktree of an earlier commit; ``--help`` lists the options. Each checkout has
a process of its own, and the two are timed in turns on the same convolutions, by the processes' own
clocks. A ratio is the other's time over ours, so above 1 is a gain; geometric means and the worst
rows are printed for every operation.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
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
LEAST = 0.02  # seconds of one sample


class Checkout:
    """A process in which one checkout's programs run."""

    def __init__(self, folder: Path, threads: int) -> None:
        command = [sys.executable, __file__, "--worker", "--threads", str(threads)]
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
    """Answer lines: ``make OPERATION NUMBER`` prepares a call, ``run COUNT`` times it."""
    sys.path.insert(0, str(Path.cwd()))
    import torch

    from benchmarks import cases, contestants, measure

    torch.set_num_threads(threads)
    measure.touch_pages()
    call = None
    for line in sys.stdin:
        word, *arguments = line.split()
        if word == "make":
            case = contestants.case(cases.layers()[int(arguments[1])])
            call = contestants.contestants(arguments[0])["tnconv"](arguments[0], case)
            for _ in range(3):  # sizes that return are searched for
                call()
            count = 1
        else:
            count = int(arguments[0])
        assert call is not None
        started = time.process_time()
        for _ in range(count):
            call()
        print((time.process_time() - started) / count, flush=True)


def row(ours: Checkout, other: Checkout, operation: str, number: int, rounds: int) -> float:
    """The median over rounds of the other's time over ours."""
    once = max(each.ask("make", operation, number) for each in (ours, other))
    count = max(1, round(LEAST / max(once, 1e-6)))
    found = []
    for turn in range(rounds):
        taken = {}
        for each in (ours, other)[:: 1 if turn % 2 else -1]:
            taken[each] = each.ask("run", count)
        found.append(taken[other] / taken[ours])
    return median(found)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__)
    result.add_argument("other", type=Path, nargs="?", help="the folder of the other checkout")
    result.add_argument("--every", type=int, default=6, help="take one of every N convolutions (6)")
    result.add_argument("--operation", action="append", choices=OPERATIONS, help="repeatable")
    result.add_argument("--rounds", type=int, default=11, help="rounds of each pair (11)")
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
    for operation in options.operation or OPERATIONS:
        ratios = {
            f"{layers[at].describe()} ({at})": row(ours, other, operation, at, options.rounds)
            for at in range(0, len(layers), options.every)
        }
        found[operation] = ratios
        worst = sorted(ratios.items(), key=lambda item: item[1])[:3]
        words = ", ".join(f"{name} {ratio:.2f}" for name, ratio in worst)
        mean = geometric_mean(ratios.values())
        print(f"{operation:24} {mean:.3f} over {len(ratios)}; worst {words}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    ours.close()
    other.close()


if __name__ == "__main__":
    main(sys.argv[1:])
