"""How far the monitored largest eigenvalue is off, during a training that learns.

Run as ``python -m benchmarks.monitor_eigenvalue --json results.json``; ``--help`` lists the
options. A network is trained with `HessMaxEV` at every step, with nothing between two steps left
out. Every so many steps the Hessian's eigenvalue of largest magnitude of the same batch is computed
again, by another implementation: Lanczos with full orthogonalisation on double backward passes in
float64, from a random vector, until the residual's norm is below 1e-4 of the eigenvalue.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.models import PROBLEMS
from tnconv.monitor import HessMaxEV, Loss, Measurement, Monitor, Seen
from tnconv.monitor.needs import Spectrum

TOLERANCE = 0.01


class Products(Measurement):
    """How many products with the Hessian the eigenvalue took."""

    needs = (Spectrum(False, 12, TOLERANCE),)

    def value(self, seen: Seen) -> float:
        return seen.spectra[self.needs[0]][2]


def small() -> nn.Module:
    """Two convolutions and two linear layers, 20,000 parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2)]
    return nn.Sequential(
        *layers, nn.ReLU(), nn.Flatten(), nn.Linear(576, 32), nn.Tanh(), nn.Linear(32, 10)
    )


def three_c_three_d() -> nn.Module:
    return PROBLEMS["3c3d"].model().train()


class Residual(nn.Module):
    """A convolution with group normalisation, beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
                                  nn.GroupNorm(4, channels), nn.ReLU())  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.body(x)
        return found


def residual() -> nn.Module:
    """Three residual blocks with group normalisation between strided convolutions."""
    first: list[nn.Module] = [nn.Conv2d(3, 16, 3, 2, 1), Residual(16), nn.Conv2d(16, 32, 3, 2, 1)]
    last: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(*first, Residual(32), Residual(32), *last)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "small": small, "3c3d": three_c_three_d, "residual": residual
}  # fmt: skip


def exact(model: nn.Module, x: Tensor, y: Tensor, most: int = 200) -> float:
    """The eigenvalue of largest magnitude, in float64."""
    twin = copy.deepcopy(model).double()
    parameters = [p for p in twin.parameters() if p.requires_grad]
    loss = nn.functional.cross_entropy(twin(x.double()), y)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(len(flat), generator=generator, dtype=torch.float64)
    basis, diagonal, beside = [v / v.norm()], list[float](), list[float]()
    while True:
        found = torch.autograd.grad(flat, parameters, basis[-1], retain_graph=True)
        w = torch.cat([h.reshape(-1) for h in found])
        diagonal.append(float(w @ basis[-1]))
        known = torch.stack(basis)
        for _ in range(2):
            w = w - known.T @ (known @ w)
        beside.append(float(w.norm()))
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if len(beside) > 1:
            off = torch.tensor(beside[:-1], dtype=torch.float64)
            matrix += torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(matrix)
        at = int(values.abs().argmax())
        value, residual = float(values[at]), beside[-1] * abs(float(vectors[-1, at]))
        converged = len(diagonal) >= 5 and residual < 1e-4 * abs(value)
        if converged or len(diagonal) >= most:
            return value
        basis.append(w / w.norm())


def compared(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each step that is checked."""
    torch.manual_seed(options.seed)
    model, loss_fn = NETWORKS[options.network](), nn.CrossEntropyLoss()
    optimizer: torch.optim.Optimizer
    if options.optimizer == "adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=options.rate)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=options.rate, momentum=0.9)
    generator = torch.Generator().manual_seed(options.seed + 1)
    centres = torch.randn(10, 3, 32, 32, generator=generator)
    kinds = [HessMaxEV(12, TOLERANCE), Products(), Loss()]
    monitor, rows = Monitor(model, loss_fn, kinds, alerts=()), []
    for step in range(options.steps):
        y = torch.randint(10, (options.batch,), generator=generator)
        noise = torch.randn(options.batch, 3, 32, 32, generator=generator)
        x = options.signal * centres[y] + noise
        checked = step % options.every == options.every - 1
        expected = exact(model, x, y) if checked else 0.0
        with monitor.step():
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
        found = monitor.records[-1]
        if checked:
            row = {"step": step, "loss": found["Loss"], "exact": expected}
            row |= {"found": found["HessMaxEV"], "products": found["Products"]}
            rows.append(row | {"error": abs(found["HessMaxEV"] / expected - 1)})
            print(row, f"{rows[-1]['error']:.4f}", flush=True)
    products = [record["Products"] for record in monitor.records]
    errors = [row["error"] for row in rows]
    within = sum(error <= TOLERANCE for error in errors)
    summary = {"within 1 %": within, "of": len(errors), "median error": median(errors)}
    summary |= {"worst error": max(errors), "products of all steps": mean(products)}
    print(summary, flush=True)
    rows.append(summary)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=NETWORKS, default="small")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=4, help="steps from one check to the next")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--optimizer", choices=("sgd", "adam"), default="sgd")
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", type=float, default=0.1, help="of the classes in the noise")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = compared(options)
    if options.json is not None:
        names = ("network", "optimizer", "batch", "rate", "signal", "seed")
        settings = {name: getattr(options, name) for name in names}
        measure.write_results(options.json, "cpu", rows, settings=settings)


if __name__ == "__main__":
    measure.with_allocator("benchmarks.monitor_eigenvalue", sys.argv[1:])
    main()
