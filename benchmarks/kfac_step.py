"""Training steps with KFAC next to those of SGD: time, and where it goes.

Run as ``python -m benchmarks.kfac_step --json results.json``; ``--help`` lists the options. A row
is a network and a flavour. Three kinds of KFAC steps are timed next to an SGD step, in turns: one
that preconditions alone, one that also collects factors, and one that also inverts them. A step of
a training run that collects every 10 and inverts every 100 steps costs the weighted mean.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.models import cifar_resnet18, cifar_resnet20
from tnconv.optim import KFAC

Step = Callable[[], None]
NETWORKS = {"resnet20": cifar_resnet20, "resnet18": cifar_resnet18}
KINDS = ("plain", "factors", "inverses")
EVERY = {"factors": 10, "inverses": 100}


def step_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: nn.Module, x: Tensor, y: Tensor
) -> Step:
    """One training step."""

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()

    return step


def steps(network: str, flavour: str, options: argparse.Namespace) -> dict[str, Step]:
    """SGD's step and KFAC's, each on a model of its own; KFAC's steps are of each kind in turn."""
    x = torch.rand(options.batch, 3, 32, 32, device=options.device)
    y, found = torch.randint(10, (options.batch,), device=options.device), dict[str, Step]()
    for name in ("sgd", "kfac"):
        torch.manual_seed(0)
        model, loss_fn = NETWORKS[network](10).to(options.device), nn.CrossEntropyLoss()
        optimizer: torch.optim.Optimizer
        if name == "sgd":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        else:
            optimizer = KFAC(
                model,
                lr=0.01,
                flavour=flavour,
                fisher="mc",
                loss_fn=loss_fn,
                inverse=options.inverse,
                update_factors_every=lambda step: step % 3 == 1,
                update_inverses_every=lambda step: step % 3 == 2,
            )
        found[name] = step_of(model, optimizer, loss_fn, x, y)
    return found


def row(network: str, flavour: str, options: argparse.Namespace) -> dict[str, object]:
    """Ratios of medians over SGD's step, and what they come to in a training run."""
    made, shuffle = steps(network, flavour, options), Random(0).shuffle
    taken: dict[str, list[float]] = {name: [] for name in ("sgd", *KINDS)}
    for at in range(options.rounds + 1):
        order = ["sgd", "kfac"]
        for kind in KINDS:
            shuffle(order)
            for name in order:
                started = time.process_time()
                made[name]()
                if at:
                    taken[kind if name == "kfac" else "sgd"].append(time.process_time() - started)
    medians = {name: median(each) for name, each in taken.items()}
    ratios = {kind: medians[kind] / medians["sgd"] for kind in KINDS}
    more = sum((ratios[kind] - ratios["plain"]) / every for kind, every in EVERY.items())
    return {
        "network": network,
        "flavour": flavour,
        "inverse": options.inverse,
        "batch": options.batch,
        "rounds": options.rounds,
        "sgd seconds": medians["sgd"],
        "over sgd": ratios,
        "training run": ratios["plain"] + more,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kfac_step", description=__doc__)
    parser.add_argument("--network", action="append", choices=NETWORKS, help="repeatable")
    parser.add_argument("--flavour", action="append", choices=("expand", "reduce"))
    parser.add_argument("--inverse", default="cholesky", choices=("cholesky", "eigen"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write results to this file")
    options = parser.parse_args(arguments)
    measure.with_allocator("benchmarks.kfac_step", sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(1)
    found = []
    for network in options.network or NETWORKS:
        for flavour in options.flavour or ("expand", "reduce"):
            found.append(row(network, flavour, options))
            print(found[-1], flush=True)
            if options.json:
                measure.write_results(options.json, options.device, found)


if __name__ == "__main__":
    main()
