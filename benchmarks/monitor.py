"""What a training step costs with the monitor, over the step alone.

Run as ``python -m benchmarks.monitor --json results.json``; ``--help`` lists the options. A row is
a set of measurements with a schedule, on 3C3D at CIFAR-10 shapes. Its numbers are the mean time of
a step with the monitor (over one period of the schedule; for the largest eigenvalue from one long
run of Lanczos to the next) divided by that of the step alone: the median of the ratios of rounds,
in which both are timed one after the other by the process' own clock, on one thread.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.models import PROBLEMS, cifar_resnet20
from tnconv.monitor import (
    Alpha,
    Distance,
    GradHist1d,
    GradNorm,
    HessMaxEV,
    InnerTest,
    Loss,
    Measurement,
    Monitor,
    NormTest,
    OrthoTest,
    UpdateSize,
    configuration,
    every,
)
from tnconv.monitor.lanczos_experience import SELDOM

BARE = [Alpha(), Distance(), GradNorm(), InnerTest(), Loss(), NormTest(), OrthoTest(), UpdateSize()]
ADAPTED = [*BARE, GradHist1d(adaptation="absmax")]


@dataclass(frozen=True)
class Row:
    """What is measured, how often, and the issue's bar."""

    quantities: Sequence[Measurement]
    interval: int
    bar: float
    adam: bool = False
    period: int = 0  # steps that are timed together, by default an interval
    options: tuple[tuple[str, Any], ...] = ()


ROWS: dict[str, Row] = {
    "cheap": Row(configuration("cheap"), 1, 1.1),
    "economy": Row(configuration("economy"), 1, 1.8),
    "economy, Adam, adapted ranges": Row(ADAPTED, 1, 1.9, True),
    "economy without histogram": Row(BARE, 1, 1.55),
    "economy, 8 samples": Row(configuration("economy"), 1, 1.25, options=(("samples", 8),)),
    "business": Row(configuration("business"), 4, 1.5),
    "full, 3 products": Row(configuration("full", products=3), 16, 1.5),
    "HessMaxEV": Row([HessMaxEV()], 1, 6.0, period=SELDOM),  # with one long run
}


@dataclass
class Run:
    """A training run whose steps can be taken one by one, with a monitor or without."""

    model: nn.Module
    step: Callable[[], object]
    monitor: Monitor | None = None


def run(row: Row | None, batch: int, adam: bool, make: Callable[[], nn.Module]) -> Run:
    """A new run with the same weights and data."""
    torch.manual_seed(0)
    model, loss_fn = make(), nn.CrossEntropyLoss()
    kind: Any = torch.optim.Adam if adam else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=1e-3 if adam else 0.01)
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(10, 3, 32, 32, generator=generator)

    def data() -> tuple[Tensor, Tensor]:
        y = torch.randint(10, (batch,), generator=generator)
        return centres[y] + torch.randn(batch, 3, 32, 32, generator=generator), y

    def train() -> None:
        x, y = data()
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()

    if row is None:
        return Run(model, train)
    options = dict(row.options)
    monitor = Monitor(model, loss_fn, row.quantities, every(row.interval), alerts=(), **options)

    def watched() -> None:
        with monitor.step():
            train()

    return Run(model, watched, monitor)


def ratios(name: str, options: argparse.Namespace) -> dict[str, object]:
    """One row: interleaved periods of the run with the monitor and of the run alone."""
    row = ROWS[name]
    make: Callable[[], nn.Module] = lambda: PROBLEMS["3c3d"].model().train()  # noqa: E731
    if options.network == "resnet20":
        make = lambda: cifar_resnet20(10).train()  # noqa: E731
    runs = [run(None, options.batch, row.adam, make), run(row, options.batch, row.adam, make)]
    period = row.period or row.interval
    for _ in range(period + row.interval + 2):
        for each in runs:
            each.step()
    while runs[1].monitor is not None and runs[1].monitor.steps % period:
        runs[1].step()
    times: list[list[float]] = [[], []]
    for _ in range(options.rounds):
        for at in random.sample((0, 1), 2):
            begin = time.process_time()
            for _ in range(period):
                runs[at].step()
            times[at].append((time.process_time() - begin) / period)
    alone, pairs = median(times[0]), zip(*times, strict=True)
    ratio = median(watched / own for own, watched in pairs)  # the machine's speed changes slowly
    found = {"row": name, "ratio": ratio, "minima": min(times[1]) / min(times[0])}
    print(f"{name:32} {found['ratio']:6.2f} {found['minima']:6.2f}   bar {row.bar}   "
          f"step alone {1e3 * alone:.1f} ms", flush=True)  # fmt: skip
    found |= {"bar": row.bar, "alone_ms": 1e3 * alone, "rounds": options.rounds}
    return found


def kept(options: argparse.Namespace) -> dict[str, object]:
    """What a run with a budget takes longer than the run alone: both step by step, in turns."""
    make: Callable[[], nn.Module] = lambda: PROBLEMS["3c3d"].model().train()  # noqa: E731
    if options.network == "resnet20":
        make = lambda: cifar_resnet20(10).train()  # noqa: E731
    row = Row(configuration("business"), 1, 0.0, options=(("budget", options.budget),))
    runs = [run(None, options.batch, False, make), run(row, options.batch, False, make)]
    times = [0.0, 0.0]
    for _ in range(options.steps):
        for at in random.sample((0, 1), 2):
            begin = time.process_time()
            runs[at].step()
            times[at] += time.process_time() - begin
    assert runs[1].monitor is not None and runs[1].monitor.budget is not None
    found = {"network": options.network, "overhead": times[1] / times[0] - 1}
    found |= {"steps": options.steps, "report": runs[1].monitor.budget.report()}
    print(found, flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--network", choices=("3c3d", "resnet20"), default="3c3d")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name contains one of")
    parser.add_argument("--budget", type=float, help="keep this overhead over some steps instead")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.budget is not None:
        found = kept(options)
        if options.json is not None:
            measure.write_results(options.json, "cpu", [found])
        return
    print(f"{'':32} median minima")
    chosen = [name for name in ROWS if any(part in name for part in options.only)]
    rows = [ratios(name, options) for name in chosen]
    if options.json is not None:
        measure.write_results(options.json, "cpu", rows)


if __name__ == "__main__":
    measure.with_allocator("benchmarks.monitor", sys.argv[1:])
    main()
