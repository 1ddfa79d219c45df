"""What a Hessian diagonal by one recursion costs beside the gradient.

Run as ``python -m benchmarks.hesscale --json results.json``; ``--help`` lists the options. A row is
a network; its numbers are the times of gradient and diagonal together, by the one-line call on an
unmodified model (``tnconv.hesscale(..., backward=True)``), over that of the gradient alone
(``loss.backward()``): medians and minima of interleaved rounds by the process' own clock, on one
thread.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import tnconv
from benchmarks import measure
from benchmarks.models import PROBLEMS

METHODS = ("gn", "hesscale", "bl89", "hesscale+")
Call = Callable[[], object]


def mlp(classes: int, width: int = 512) -> nn.Sequential:
    """Two hidden layers."""
    layers = nn.Linear(784, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
    return nn.Sequential(*layers, nn.Linear(width, classes))


Row = tuple[Callable[[], nn.Module], tuple[int, ...], int, int]
ROWS: dict[str, Row] = {
    "MLP 512, batch 32": (partial(mlp, 10), (784,), 10, 32),
    "MLP 512, batch 32, 1000 classes": (partial(mlp, 1000), (784,), 1000, 32),
    "MLP 512, batch 1": (partial(mlp, 10), (784,), 10, 1),
    "MLP 128, batch 32": (partial(mlp, 10, 128), (784,), 10, 32),
    "MLP 2048, batch 32": (partial(mlp, 10, 2048), (784,), 10, 32),
    "MLP 512, batch 256": (partial(mlp, 10), (784,), 10, 256),
    "3C3D, batch 32": (partial(PROBLEMS["3c3d"].model, "cpu"), (3, 32, 32), 10, 32),
}
"""Networks, the shapes of their samples, classes, and batch sizes."""


def calls(model: nn.Module, x: Tensor, y: Tensor, methods: Sequence[str]) -> dict[str, Call]:
    """The gradient, and the gradient with each method's diagonal."""
    loss_fn = nn.CrossEntropyLoss()

    def forget() -> None:
        for p in model.parameters():
            p.grad = None

    def gradient() -> object:
        forget()
        return loss_fn(model(x), y).backward()

    def both(method: str) -> object:
        forget()
        return tnconv.hesscale(model, loss_fn, x, y, method, backward=True)  # type: ignore[arg-type]

    return {"gradient": gradient} | {method: partial(both, method) for method in methods}


def row(name: str, options: argparse.Namespace) -> dict[str, object]:
    """Ratios over the gradient."""
    make, shape, classes, batch = ROWS[name]
    torch.manual_seed(0)
    model = make()
    x, y = torch.randn(batch, *shape), torch.randint(classes, (batch,))
    made = calls(model, x, y, options.method or METHODS)
    taken: dict[str, list[float]] = {each: [] for each in made}
    for at in range(options.rounds + 1):
        order = random.sample(list(made), len(made))
        for each in order:
            made[each]()
            started = time.process_time()
            made[each]()
            if at:
                taken[each].append(time.process_time() - started)
    base = taken.pop("gradient")
    return {
        "name": name,
        "gradient seconds": median(base),
        "median": {each: round(median(t) / median(base), 3) for each, t in taken.items()},
        "minimum": {each: round(min(t) / min(base), 3) for each, t in taken.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hesscale", description=__doc__)
    parser.add_argument("--row", action="append", choices=ROWS, help="repeatable")
    parser.add_argument("--method", action="append", choices=METHODS, help="repeatable")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write results to this file")
    options = parser.parse_args(arguments)
    measure.with_allocator("benchmarks.hesscale", sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(1)
    found = []
    for name in options.row or ROWS:
        found.append(row(name, options))
        print(found[-1], flush=True)
        if options.json:
            measure.write_results(options.json, "cpu", found, rounds=options.rounds)


if __name__ == "__main__":
    main()
