"""How wide the range of step sizes is with which PPO and A2C learn, with and without scaling.

Run as ``python -m benchmarks.rl.study --json results.json --plot plot.png`` (extras ``rl`` and
``plots``). Every network has an Adam; "scaled" puts `tnconv.optim.StepSizeScaler` around it. A row
is a task, an algorithm, a step size and whether it is scaled: the mean return of the last twenty
episodes of every seed, and process times. A run that finds its ``--json`` file goes on where that
stopped, if the settings are equal. Source: Elsayed et al. 2024.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from benchmarks import measure
from benchmarks.rl.agents import Algorithm, MakeOptimizer, train
from benchmarks.rl.rollouts import TASKS
from tnconv.optim import StepSizeScaler

CASES: tuple[tuple[str, Algorithm, tuple[float, ...]], ...] = (
    ("cartpole", "a2c", (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    ("cartpole", "ppo", (1e-3, 1e-2, 1e-1)),
    ("pendulum", "ppo", (1e-3, 1e-2)),
)
"""Tasks, algorithms and step sizes."""


def optimizers(lr: float, delta: float | None) -> MakeOptimizer:
    """Adam, scaled if there is a delta."""

    def make(network: nn.Module, loss_fn: nn.Module) -> torch.optim.Optimizer:
        inner = torch.optim.Adam(network.parameters(), lr)
        return inner if delta is None else StepSizeScaler(inner, network, loss_fn, delta)

    return make


def row(
    task: str, algorithm: Algorithm, lr: float, delta: float | None, options: argparse.Namespace
) -> dict[str, Any]:
    """All seeds of one setting."""
    found, started = [], time.process_time()
    for seed in range(options.seeds):
        returns = train(algorithm, TASKS[task], optimizers(lr, delta), seed)
        found.append(mean(returns[-20:]) if returns else float("nan"))
    seconds = (time.process_time() - started) / options.seeds
    how = {"task": task, "algorithm": algorithm, "lr": lr, "scaled": delta is not None}
    return how | {"returns": [round(each, 1) for each in found], "seconds": round(seconds, 2)}


def _those(
    rows: Sequence[Mapping[str, Any]], task: str, algorithm: str, scaled: bool
) -> list[Mapping[str, Any]]:
    wanted = task, algorithm, scaled
    return [r for r in rows if (r["task"], r["algorithm"], r["scaled"]) == wanted]


def learned(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For every task, algorithm and kind: the step sizes whose mean return says so."""
    found = []
    for task, algorithm, _ in CASES:
        for scaled in (False, True):
            own = _those(rows, task, algorithm, scaled)
            good = [r["lr"] for r in own if mean(r["returns"]) >= TASKS[task].learns]
            kind = "scaled" if scaled else "plain"
            words = ", ".join(f"{lr:g}" for lr in good) or "none"
            if own:
                found.append(f"{task} {algorithm} {kind}: {len(good)} of {len(own)} ({words})")
    return found


def before(path: Path | None, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run with equal settings."""
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text())
    same = all(found.get(name) == value for name, value in settings.items())
    return list(found["rows"]) if same else []


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Returns against step sizes: every seed, and means."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys((r["task"], r["algorithm"]) for r in rows))
    figure = Figure(figsize=(4 * len(kinds), 3.2), layout="constrained")
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    for ax, (task, algorithm) in zip(axes, kinds, strict=True):
        for scaled, colour in ((False, "tab:blue"), (True, "tab:orange")):
            own = _those(rows, task, algorithm, scaled)
            label = "Adam, scaled" if scaled else "Adam"
            ax.plot([r["lr"] for r in own], [mean(r["returns"]) for r in own], "-", color=colour)
            for r in own:
                ax.plot([r["lr"]] * len(r["returns"]), r["returns"], ".", color=colour, label=label)
                label = "_"
        ax.axhline(TASKS[task].learns, color="grey", linewidth=0.7, linestyle=":")
        ax.set_xscale("log")
        ax.set_xlabel("step size")
        ax.set_title(f"{algorithm.upper()} on {TASKS[task].name}")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("mean return of the last 20 episodes")
    axes[0].legend()
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rl.study", description=__doc__)
    parser.add_argument("--task", action="append", choices=TASKS, help="repeatable")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--delta", type=float, default=1e-6)
    parser.add_argument("--json", type=Path, help="write results to this file")
    parser.add_argument("--plot", type=Path, help="draw results into this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    settings = {"seeds": options.seeds, "delta": options.delta}
    rows = before(options.json, settings)
    have = {(r["task"], r["algorithm"], r["lr"], r["scaled"]) for r in rows}
    for task, algorithm, sizes in CASES:
        for lr, delta in product(sizes, (None, options.delta)):
            if task in (options.task or TASKS) and (task, algorithm, lr, bool(delta)) not in have:
                rows.append(row(task, algorithm, lr, delta, options))
                print(rows[-1], flush=True)
                if options.json:
                    measure.write_results(options.json, "cpu", rows, **settings)
    print(*learned(rows), sep="\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
