"""Low-rank Gauss-Newton quantities next to the gradient: time and peak memory.

Run as ``python -m benchmarks.low_rank --json results.json``; ``--help`` lists the options. A row is
a quantity of `tnconv.low_rank_ggn`; its number is the time of gradient and quantity together over
that of the gradient alone, the median over interleaved rounds, by the process' own clock.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.models import PROBLEMS
from benchmarks.networks import GRADIENT, Step, gradient, ratios
from tnconv import LowRankGGN, low_rank_ggn, observe_low_rank

Quantity = Callable[[LowRankGGN], object]
Columns = Mapping[str, object]

EXACT: Columns = {}
MONTE_CARLO: Columns = {"fisher": "mc"}


def all_eigenvalues(ggn: LowRankGGN) -> object:
    """The whole spectrum."""
    return ggn.eigvalsh()


def ten_eigenvectors(ggn: LowRankGGN) -> object:
    """The ten leading eigenpairs."""
    return ggn.eigh(10)


def ten_derivatives(ggn: LowRankGGN) -> object:
    """Slopes and curvatures of every sample along the ten leading eigenvectors."""
    return ggn.directional_derivatives(k=10)


def newton_step(ggn: LowRankGGN) -> object:
    """A damped step along the ten leading eigenvectors."""
    return ggn.newton_step(1e-2, 10)


def everything(ggn: LowRankGGN) -> object:
    """Eigenvalues, the ten leading eigenvectors, slopes and curvatures, in one call."""
    pairs = ggn.eigh(10)
    return ggn.eigvalsh(), pairs, ggn.directional_derivatives(pairs)


ROWS: dict[str, tuple[Quantity, Columns, int]] = {
    "eigenvalues, exact": (all_eigenvalues, EXACT, 1),
    "eigenvalues, one sample": (all_eigenvalues, MONTE_CARLO, 1),
    "eigenvalues, an eighth": (all_eigenvalues, EXACT, 8),
    "eigenvalues, one sample, an eighth": (all_eigenvalues, MONTE_CARLO, 8),
    "ten eigenvectors, exact": (ten_eigenvectors, EXACT, 1),
    "ten eigenvectors, one sample": (ten_eigenvectors, MONTE_CARLO, 1),
    "derivatives, exact": (ten_derivatives, EXACT, 1),
    "derivatives, one sample": (ten_derivatives, MONTE_CARLO, 1),
    "Newton step, exact": (newton_step, EXACT, 1),
    "Newton step, an eighth": (newton_step, EXACT, 8),
    "Newton step, one sample": (newton_step, MONTE_CARLO, 1),
    "all of these, exact": (everything, EXACT, 1),
}
"""What is asked for, by which columns, and the share of the batch that they are made of."""


def with_gradient(
    model: nn.Module, inputs: Tensor, targets: Tensor, row: str, memory_limit: int | None
) -> Step:
    """The gradient and a quantity of the whole batch: the gradient is made of the same rows."""
    quantity, how, share = ROWS[row]
    if share > 1:
        return in_a_loop(model, inputs, targets, row, memory_limit)
    ask = partial(low_rank_ggn, model, F.cross_entropy, inputs, targets)

    def step() -> None:
        ggn = ask(memory_limit=memory_limit, **how)  # type: ignore[arg-type]
        quantity(ggn)
        ggn.gradient()

    return step


def in_a_loop(
    model: nn.Module, inputs: Tensor, targets: Tensor, row: str, memory_limit: int | None
) -> Step:
    """A quantity of some samples beside autograd's gradient of all, from one forward pass."""
    quantity, how, share = ROWS[row]
    subset, watched = range(len(inputs) // share), ExitStack()
    ask = partial(observe_low_rank, model, memory_limit=memory_limit)
    observation = watched.enter_context(ask(**how))  # type: ignore[arg-type]

    def step(watched: ExitStack) -> None:
        model.zero_grad(set_to_none=True)
        output = model(inputs)
        quantity(observation.ggn(F.cross_entropy, output, targets, subset, subset))
        F.cross_entropy(output, targets).backward()

    return partial(step, watched)  # which stays open as long as there is a next step


def step(problem: str, row: str, options: argparse.Namespace) -> Step:
    """The gradient alone, or with the quantity of a row, on a model of its own."""
    chosen = PROBLEMS[problem]
    model, data = chosen.model(options.device), chosen.data(options.batch, options.device)
    if row == GRADIENT:
        return gradient(model, *data)
    return with_gradient(model, *data, row, options.memory_limit)


def peak(problem: str, row: str, options: argparse.Namespace) -> float:
    """The high-water mark of a fresh process that takes the step three times, in MiB."""
    command = [sys.executable, "-m", "benchmarks.low_rank", "--default-allocator"]
    command += ["--step", problem, row, "--device", options.device, "--batch", str(options.batch)]
    if options.memory_limit:
        command += ["--memory-limit", str(options.memory_limit)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measured(problem: str, row: str, options: argparse.Namespace) -> dict[str, object]:
    """One quantity on one network."""
    steps = {name: step(problem, name, options) for name in (GRADIENT, row)}
    steps[row]()  # sizes that return are searched for
    found = ratios(steps, options.rounds, time.process_time)[row]
    result: dict[str, object] = {"problem": problem, "batch": options.batch, "quantity": row}
    result |= {"rounds": options.rounds, "ratio": found}
    if options.memory:
        result["memory"] = peak(problem, row, options)
    return result


def once(problem: str, row: str, options: argparse.Namespace) -> dict[str, object]:
    """High-water marks of this process, in MiB: after a gradient, the vectors, and the quantity."""
    chosen, (quantity, how, _) = PROBLEMS[problem], ROWS[row]
    model, data = chosen.model(options.device), chosen.data(options.batch, options.device)
    gradient(model, *data)()
    result: dict[str, object] = {"problem": problem, "batch": options.batch, "quantity": row}
    result |= {"memory_limit": options.memory_limit, "gradient": measure.high_water()}
    start = time.process_time()
    limit = {"memory_limit": options.memory_limit}
    ggn = low_rank_ggn(model, F.cross_entropy, *data, **limit, **how)  # type: ignore[arg-type]
    result["vectors_held"] = ggn.block.rows.held_bytes / 2**20
    result["vectors"] = measure.high_water()
    quantity(ggn)
    return result | {"quantity_made": measure.high_water(), "seconds": time.process_time() - start}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.low_rank", description=__doc__)
    result.add_argument("--quick", action="store_true", help="small batches, few rounds")
    result.add_argument("--problem", choices=PROBLEMS, default=next(iter(PROBLEMS)))
    result.add_argument("--row", action="append", choices=ROWS, help="repeatable")
    result.add_argument("--batch", type=int, help="the batch size (32; quick: 8)")
    result.add_argument("--rounds", type=int, help="interleaved rounds (15; quick: 2)")
    result.add_argument("--memory-limit", type=int, help="bytes, as for low_rank_ggn")
    result.add_argument("--device", default="cpu")
    result.add_argument("--once", action="store_true", help="one call: peaks of this process alone")
    result.add_argument("--memory", action="store_true", help="also peak memory, in new processes")
    result.add_argument("--json", type=Path, help="write results to this file")
    result.add_argument("--merge", action="store_true", help="keep the other rows of that file")
    result.add_argument(
        "--default-allocator", action="store_true", help="leave malloc's settings as they are"
    )
    result.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    return result


def kept(options: argparse.Namespace) -> list[dict[str, object]]:
    """The rows of an earlier run that are not taken again."""
    if not (options.merge and options.json and options.json.exists()):
        return []
    rows: list[dict[str, object]] = json.loads(options.json.read_text())["rows"]
    return [row for row in rows if row["quantity"] not in (options.row or ROWS)]


def main(arguments: Sequence[str]) -> None:
    """Run what the command line asks for."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    options.rounds = options.rounds or (2 if options.quick else 15)
    options.batch = options.batch or (8 if options.quick else 32)
    if options.step:
        taken = step(*options.step, options)
        for _ in range(3):
            taken()
        print(measure.high_water())
        return
    if options.once:
        row = (options.row or list(ROWS))[0]
        found = [once(options.problem, row, options)]
        print(found[0])
        if options.json:
            measure.write_results(options.json, options.device, found)
        return
    if not options.default_allocator:
        measure.with_allocator("benchmarks.low_rank", arguments)
    found = kept(options)
    for row in options.row or ROWS:
        found.append(measured(options.problem, row, options))
        print(found[-1], flush=True)
        if options.json:
            measure.write_results(options.json, options.device, found)


if __name__ == "__main__":
    main(sys.argv[1:])
