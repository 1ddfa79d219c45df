"""Training with second-order optimizers next to SGD with momentum and AdamW: loss, steps, time.

Run as ``python -m benchmarks.training --json results.json --plot plot.png`` (extras ``demo`` and
``plots``); ``--help`` lists the options. Two tasks on real images: handwritten digits with a small
convolutional network, and which way a patch of a photograph was turned, with a residual one. Each
optimizer's settings are the best of a grid by the loss at the end of a short training on a seed of
its own (``--tune-steps``, the grid is `GRIDS`); then every seed trains anew. Times are process
times of one thread, so the machine's other work hardly counts. A row is a task and an optimizer:
settings, the losses of every seed, seconds per step, and the bytes of the optimizer's state.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from math import inf
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.adahessian import AdaHessian
from benchmarks.images import digits, rotated
from benchmarks.models import Block
from tnconv.optim import KFAC, AdaHesScale, StepSizeScaler

Settings = dict[str, float]
TUNING_SEED = 1000
KFACS = {"lr": (0.03, 0.1, 0.3), "damping": (1e-3, 1e-2, 1e-1), "kl_clip": (1e-3, 1e-2)}
GRIDS: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "SGD": {"lr": (0.01, 0.03, 0.1, 0.3)},
    "AdamW": {"lr": (3e-4, 1e-3, 3e-3, 1e-2)},
    "KFAC-expand": KFACS,
    "KFAC-reduce": KFACS,
    "AdaHessian": {"lr": (0.01, 0.03, 0.1, 0.3)},
    "AdaHesScale": {"lr": (3e-5, 1e-4, 3e-4, 1e-3)},
    "AdamW, scaled": {"lr": (1e-3, 1e-2, 1e-1), "delta": (1e-6, 1e-5, 1e-4)},
}


def digits_network() -> nn.Module:
    """Three convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


def residual_network() -> nn.Module:
    """A residual network of 8, 16 and 32 channels, a block each."""
    blocks = [Block(8, 8, 1), Block(8, 16, 2), Block(16, 32, 2)]
    stem = (nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))


def digits_batches(batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = digits()
    while True:
        order = torch.randperm(len(images), generator=generator)
        for part in order.split(batch)[:-1]:
            yield images[part], labels[part]


def rotation_batches(batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield rotated(batch, 32, generator)


TASKS: Mapping[str, tuple[Callable[[], nn.Module], Callable[..., Iterator[Any]]]] = {
    "digits": (digits_network, digits_batches),
    "rotation": (residual_network, rotation_batches),
}


def optimizer_of(
    name: str, model: nn.Module, loss_fn: nn.Module, settings: Settings
) -> torch.optim.Optimizer:
    """The optimizer with these settings; KFAC has factors every 5, inverses every 20 steps."""
    if name == "SGD":
        return torch.optim.SGD(model.parameters(), momentum=0.9, **settings)
    if name == "AdamW":
        return torch.optim.AdamW(model.parameters(), **settings)
    if name == "AdaHessian":
        return AdaHessian(model.parameters(), **settings)
    if name == "AdaHesScale":
        return AdaHesScale(model, loss_fn, **settings)
    if name == "AdamW, scaled":
        inner = torch.optim.AdamW(model.parameters(), settings["lr"])
        return StepSizeScaler(inner, model, loss_fn, settings["delta"])
    return KFAC(
        model,
        flavour=name.removeprefix("KFAC-"),  # type: ignore[arg-type]
        fisher="mc",
        loss_fn=loss_fn,
        update_factors_every=5,
        update_inverses_every=20,
        **settings,
    )


def backward(
    optimizer: torch.optim.Optimizer, loss_fn: nn.Module, output: Tensor, y: Tensor
) -> Tensor:
    """The loss and its gradient, as the optimizer wants it; the loss."""
    if isinstance(optimizer, AdaHesScale):  # gradient and diagonal in one pass
        return optimizer.backward(output, y)
    loss: Tensor = loss_fn(output, y)
    if isinstance(optimizer, AdaHessian):
        optimizer.backward(loss)
    else:
        loss.backward()  # type: ignore[no-untyped-call]
    return loss


def train(
    task: str, name: str, settings: Settings, seed: int, steps: int, batch: int
) -> dict[str, Any]:
    """Losses of each step, seconds up to each, and the bytes of the optimizer's state."""
    make, batches = TASKS[task]
    torch.manual_seed(seed)
    model, loss_fn = make(), nn.CrossEntropyLoss()
    optimizer = optimizer_of(name, model, loss_fn, settings)
    losses, seconds, spent = [], [], 0.0
    data = batches(batch, torch.Generator().manual_seed(seed))
    for _ in range(steps):
        x, y = next(data)
        start = time.process_time()
        optimizer.zero_grad()
        loss = backward(optimizer, loss_fn, model(x), y)
        optimizer.step()
        spent += time.process_time() - start
        losses.append(loss.item())
        seconds.append(spent)
        if not losses[-1] < 1e3:
            break
    tensors = (t for own in optimizer.state.values() for t in own.values() if torch.is_tensor(t))
    state = {id(t): t.nbytes for t in tensors}
    return {"losses": losses, "seconds": seconds, "state_bytes": sum(state.values())}


def final(losses: Sequence[float], steps: int) -> float:
    """The mean of the last tenth; infinite if training broke off."""
    return mean(losses[-max(1, steps // 10) :]) if len(losses) == steps else inf


def tuned(task: str, name: str, options: argparse.Namespace) -> Settings:
    """The settings of the grid with the least loss after a short training."""
    grid, best = GRIDS[name], (inf, Settings())
    for values in product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        run = train(task, name, settings, TUNING_SEED, options.tune_steps, options.batch)
        loss = final(run["losses"], options.tune_steps)
        if loss < best[0]:
            best = loss, settings
    return best[1]


def row(task: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One optimizer on one task, with every seed."""
    settings = tuned(task, name, options)
    runs = [
        train(task, name, settings, seed, options.steps, options.batch)
        for seed in range(options.seeds)
    ]
    return {
        "task": task,
        "optimizer": name,
        "settings": settings,
        "final": [final(run["losses"], options.steps) for run in runs],
        "seconds_per_step": median(run["seconds"][-1] / len(run["seconds"]) for run in runs),
        "state_bytes": runs[0]["state_bytes"],
        "losses": [[round(loss, 5) for loss in run["losses"]] for run in runs],
    }


def smoothed(losses: Sequence[float], over: int = 10) -> list[float]:
    """Running means."""
    return [mean(losses[max(0, at - over + 1) : at + 1]) for at in range(len(losses))]


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss against steps and against time, a task in each row: medians and ranges over seeds."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(8.5, 3 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False)
    for (left, right), task in zip(axes, tasks, strict=True):
        for each in (row for row in rows if row["task"] == task):
            curves = list(zip(*map(smoothed, each["losses"]), strict=False))
            steps = range(1, len(curves) + 1)
            times = [each["seconds_per_step"] * step for step in steps]
            for ax, at in ((left, list(steps)), (right, times)):
                ax.plot(at, [median(values) for values in curves], label=each["optimizer"])
                ax.fill_between(
                    at, *zip(*((min(c), max(c)) for c in curves), strict=True), alpha=0.2
                )
        left.set_ylabel(f"training loss, {task}")
        for ax, words in ((left, "steps"), (right, "seconds of one thread")):
            ax.set_xlabel(words)
            ax.set_yscale("log")
            ax.grid(alpha=0.3)
    axes[0][0].legend()
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune, train, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", action="append", choices=TASKS, help="repeatable")
    parser.add_argument("--optimizer", action="append", choices=GRIDS, help="repeatable")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tune-steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for task in options.task or TASKS:
        for name in options.optimizer or GRIDS:
            rows.append(row(task, name, options))
            found = rows[-1]
            print(
                f"{task:>9} {name:<12} loss {median(found['final']):.4f} "
                f"({min(found['final']):.4f} to {max(found['final']):.4f}), "
                f"{1e3 * found['seconds_per_step']:.2f} ms a step, "
                f"state {found['state_bytes'] / 2**20:.2f} MiB, {found['settings']}",
                flush=True,
            )
    if options.json:
        names = ("steps", "tune_steps", "seeds", "batch")
        settings = {name: getattr(options, name) for name in names}
        measure.write_results(options.json, "cpu", rows, settings=settings, grids=GRIDS)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
