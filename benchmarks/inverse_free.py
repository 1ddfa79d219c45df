"""Training steps of inverse-free and root-free optimizers next to those of SGD.

Run as ``python -m benchmarks.inverse_free --json results.json``; ``--help`` lists the options. On
ResNet-20 each optimizer takes steps that precondition alone, and steps that also update factors, in
turns with SGD's, each on a model of its own; a run that updates every 10 steps costs the weighted
mean. `RFAdamW` is timed beside ``torch.optim.AdamW(foreach=True)`` on ResNet-18's parameters alone.
Times are of this process, which is what a loaded machine leaves comparable.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks import measure
from benchmarks.models import cifar_resnet18, cifar_resnet20
from tnconv.optim import SINGD, RFAdamW, RFShampoo

EVERY, WARM = 10, 2
STRUCTURES = (
    *("dense", "diagonal", "block_diagonal", "hierarchical", "lower_triangular"),
    *("triangular_top_left", "triangular_toeplitz"),
)
Made = Callable[[nn.Module, list[bool]], torch.optim.Optimizer]


def contestants(flavour: Any) -> dict[str, Made]:
    """Each optimizer of a model, by whose second argument says whether factors are updated."""

    def singd(structures: str) -> Made:
        return lambda model, due: SINGD(
            model, 1e-3, damping=0.1, structures=structures, flavour=flavour,
            update_factors_every=lambda step: due[0],
        )  # fmt: skip

    found: dict[str, Made] = {f"SINGD {name}": singd(name) for name in STRUCTURES}
    for name in ("dense", "diagonal"):
        found[f"RF-Shampoo {name}"] = lambda model, due, name=name: RFShampoo(
            model, 1e-3, damping=0.1, structures=name, update_factors_every=lambda step: due[0]
        )
    return found


def network_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Ratios to SGD's step, of medians of interleaved rounds."""
    x, y = torch.rand(options.batch, 3, 32, 32), torch.randint(10, (options.batch,))
    calls: dict[tuple[str, str], Callable[[], None]] = {}

    def step_of(
        optimizer: torch.optim.Optimizer, model: nn.Module, due: list[bool], kind: str
    ) -> Any:
        def step() -> None:
            due[0] = kind == "factors"
            if hasattr(optimizer, "_prepare"):
                optimizer._prepare()  # looks again whether the next step is one that collects
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        return step

    chosen = {
        k: v
        for k, v in contestants(options.flavour).items()
        if any(part in k for part in options.only.split(","))
    }
    torch.manual_seed(0)
    model = cifar_resnet20(10)
    sgd = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    calls["SGD", "plain"] = step_of(sgd, model, [False], "plain")
    for name, made in chosen.items():
        torch.manual_seed(0)
        model, due = cifar_resnet20(10), [True]
        optimizer = made(model, due)
        for kind in ("plain", "factors"):
            calls[name, kind] = step_of(optimizer, model, due, kind)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for at in range(options.rounds + WARM):
        for key in Random(at).sample(sorted(calls), len(calls)):
            start = time.process_time()
            calls[key]()
            if at >= WARM:
                times[key].append(time.process_time() - start)
    base = median(times["SGD", "plain"])
    return [
        {
            "optimizer": name,
            "sgd_ms": 1e3 * base,
            "plain": median(times[name, "plain"]) / base,
            "factors": median(times[name, "factors"]) / base,
            f"every {EVERY}": (
                (EVERY - 1) * median(times[name, "plain"]) + median(times[name, "factors"])
            )
            / (EVERY * base),
        }
        for name in chosen
    ]


def adamw_row(rounds: int) -> dict[str, Any]:
    """`RFAdamW` over torch's AdamW on ResNet-18's parameters."""
    steps = {}
    for name in ("AdamW", "RFAdamW"):
        torch.manual_seed(0)
        model = cifar_resnet18(10)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        if name == "AdamW":
            steps[name] = torch.optim.AdamW(model.parameters(), foreach=True).step
        else:
            steps[name] = RFAdamW(model.parameters(), batch_size=64).step
    times: dict[str, list[float]] = {name: [] for name in steps}
    for at in range(rounds + 2):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if at > 1:
                times[name].append(time.process_time() - start)
    found = {name: median(each) for name, each in times.items()}
    return {"optimizer": "RFAdamW / AdamW", "ratio": found["RFAdamW"] / found["AdamW"]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--flavour", default="reduce", choices=("reduce", "expand", "hybrid"))
    parser.add_argument(
        "--only", default="", help="parts of optimizers' names, with commas between"
    )
    parser.add_argument("--json", help="where results are written")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [adamw_row(3 * options.rounds), *network_rows(options)]
    for row in rows:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    if options.json:
        measure.write_results(Path(options.json), "cpu", rows, options=vars(options))


if __name__ == "__main__":
    main(sys.argv[1:])
