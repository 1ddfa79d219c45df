"""Sharpness: what it costs, and whether it depends on how a network is written.

Run as ``python -m benchmarks.sharpness --json results.json --plot plot.png`` (extras ``demo`` and
``plots``), or with ``--part cost``. Cost: one evaluation (the metric, and the trace by ten probes)
of ResNet-20 with KFAC's metric, over twenty Hessian products: medians of interleaved rounds by the
process' own clock, on one thread. Study: a convolutional network, trained on handwritten digits,
whose first two layers are rescaled by a and 1/a, which leaves its function: sharpness with the
identity of the parameters as they are, with KFAC's metric and a damping that is a number, and with
the damping carried along.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import tnconv
from benchmarks import measure
from benchmarks.images import digits
from benchmarks.models import cifar_resnet20
from benchmarks.training import digits_network
from tnconv.geometry import (
    Euclidean,
    Kronecker,
    Metric,
    kfac_metric,
    points_of,
    relu_rescale,
    shape_operator,
    sharpness,
)
from tnconv.quantities.kronecker_factors import Fisher

LOSS = nn.CrossEntropyLoss()
FACTORS = (1.0, 2.0, 10.0, 100.0, 1000.0)
DAMPING = 1e-4


def damped_factors(model: nn.Module, x: Tensor, y: Tensor, fisher: Fisher = "type-2") -> Kronecker:
    """KFAC's metric with factors that are damped by the identity of the parameters as they are."""
    metric = kfac_metric(model, LOSS, [(x, y)], fisher=fisher)
    assert isinstance(metric, Kronecker)
    return metric.damped(metric.identity(DAMPING))


def cost(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Ratios over twenty Hessian products, after every round."""
    torch.manual_seed(0)
    model = cifar_resnet20(10).eval()
    x, y = torch.randn(options.batch, 3, 32, 32), torch.randint(10, (options.batch,))
    batches = [(x, y)]
    draw = {name: torch.randn_like(p) for name, p in points_of(model).items()}

    def products() -> None:
        hessian = tnconv.HessianOperator(model, LOSS, batches)
        for _ in range(20):
            hessian @ draw

    def metric() -> Kronecker:
        return damped_factors(model, x, y, fisher="mc")

    made = metric()
    calls: dict[str, Callable[[], object]] = {
        "products": products,
        "trace": lambda: sharpness(model, LOSS, batches, made),
        "metric and trace": lambda: sharpness(model, LOSS, batches, metric()),
    }
    largest = max(max(a.shape[-1], b.shape[-1]) for a, b in made.factors.values())
    taken: dict[str, list[float]] = {name: [] for name in calls}
    calls["metric and trace"]()
    for rounds in range(1, options.rounds + 1):
        for name, call in calls.items():
            started = time.process_time()
            call()
            taken[name].append(round(time.process_time() - started, 4))
        base = median(taken["products"])
        ratios = {
            name: round(median(each) / base, 3)
            for name, each in taken.items()
            if name != "products"
        }
        how = {"network": "ResNet-20", "batch": options.batch, "rounds": rounds}
        yield how | {"ratios": ratios, "seconds": taken, "largest matrix": largest}


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that has learned most of the digits."""
    torch.manual_seed(0)
    images, labels = digits()
    model = digits_network()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        at = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        LOSS(model(images[at]), labels[at]).backward()
        optimizer.step()
    return model.double(), images[:32].double(), labels[:32]


def measured(model: nn.Module, x: Tensor, y: Tensor, metric: Metric) -> dict[str, float]:
    """The trace by ten probes, and the largest eigenvalue."""
    shape = shape_operator(model, LOSS, [(x, y)], metric)
    trace = shape.trace(10, torch.Generator().manual_seed(0))
    leading = shape.eigenvalues(1, torch.Generator().manual_seed(0))
    return {"trace": float(trace), "largest": float(leading[-1])}


def study() -> list[dict[str, Any]]:
    """A row for every factor."""
    model, x, y = trained()
    theta, base = points_of(model), damped_factors(model, x, y)
    rows = []
    for factor in FACTORS:
        map, twin = relu_rescale(model, "0", "2", factor, x), deepcopy(model)
        psi = map(theta)
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p.copy_(psi[name])
        metrics = {
            "identity": Euclidean(points_of(twin)),
            "KFAC, number as damping": damped_factors(twin, x, y),
            "KFAC, carried along": base.pushforward(map, theta),
        }
        found = {name: measured(twin, x, y, metric) for name, metric in metrics.items()}
        rows.append({"factor": factor, **found})
        print(rows[-1], flush=True)
    return rows


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Sharpness over its value at factor one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for ax, measure_ in zip(figure.subplots(1, 2), ("trace", "largest"), strict=True):
        for name in rows[0]:
            if name != "factor":
                values = [abs(row[name][measure_] / rows[0][name][measure_]) for row in rows]
                ax.plot([row["factor"] for row in rows], values, "o-", label=name)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("factor a of the first layer")
        ax.set_ylabel(f"{measure_} over that of a = 1")
        ax.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharpness", description=__doc__)
    parser.add_argument("--part", choices=["cost", "study"], default="study")
    parser.add_argument("--batch", type=int, default=16, help="of the cost")
    parser.add_argument("--rounds", type=int, default=7, help="of the cost")
    parser.add_argument("--json", type=Path, help="write results to this file")
    parser.add_argument("--plot", type=Path, help="draw results into this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.part == "study":
        rows = study()
        if options.plot:
            plot(rows, options.plot)
        if options.json:
            measure.write_results(options.json, "cpu", rows)
        return
    for price in cost(options):
        print(price, flush=True)
        if options.json:
            measure.write_results(options.json, "cpu", [price])


if __name__ == "__main__":
    main()
