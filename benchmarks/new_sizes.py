"""What an input of a new size costs, beside plain torch with SGD, for which it is new as well.

Run as ``python -m benchmarks.new_sizes``; ``--help`` lists the options. Three models of equal
layers take a training step on every size in turn: torch's own with SGD, a converted one, and one
that KFAC trains. Sizes of images and sizes of batches are apart: programs for one batch serve
others, programs for one image do not. The first sizes, at which families of programs are searched
for, count in "first"; medians of the rest are compared, and, on the same sizes again, warm steps.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import nn

import tnconv
from benchmarks import measure
from tnconv.optim import KFAC

KINDS = ("sgd", "converted", "kfac")
FIRST = 3  # sizes until programs serve several batches: baseline, search, and writing it for others
BATCH, IMAGE = 4, 24
SIZES = {"image": range(21, 21 + 14), "batch": range(5, 5 + 14)}


def model() -> nn.Module:
    """Two convolutions and a linear layer that take images of any size."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def trained(kind: str) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """A training step of one of `KINDS`."""
    net = tnconv.nn.convert(model()) if kind == "converted" else model()
    optimizer = KFAC(net) if kind == "kfac" else torch.optim.SGD(net.parameters(), 0.01)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def timed(what: str) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of the first and of a third step at every size, for every kind, in turns."""
    tnconv.cache_clear()
    steps = {kind: trained(kind) for kind in KINDS}
    taken: dict[str, dict[str, list[float]]] = {kind: {"new": [], "warm": []} for kind in KINDS}
    for size in SIZES[what]:
        batch, image = (size, IMAGE) if what == "batch" else (BATCH, size)
        x, y = torch.rand(batch, 3, image, image), torch.randint(10, (batch,))
        for kind, step in steps.items():
            times = []
            for _ in range(3 if what == "image" else 2):
                started = time.process_time()
                step(x, y)
                times.append(1e3 * (time.process_time() - started))
            taken[kind]["new"].append(times[0])
            taken[kind]["warm"].append(times[-1])
    return taken


def main(arguments: Sequence[str]) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.new_sizes", description=__doc__)
    parser.add_argument("--what", choices=[*SIZES, "both"], default="both", help="what is new")
    parser.add_argument("--json", type=Path, help="write results to this file")
    options = parser.parse_args(arguments)
    measure.with_allocator("benchmarks.new_sizes", arguments)
    torch.set_num_threads(1)
    trained("sgd")(torch.rand(2, 3, 9, 9), torch.randint(10, (2,)))
    rows = []
    for what in SIZES if options.what == "both" else (options.what,):
        taken = timed(what)
        base = median(taken["sgd"]["new"][FIRST:])
        for kind, times in taken.items():
            row = {
                "what": what,
                "kind": kind,
                "first": max(times["new"][:FIRST]),
                "new": median(times["new"][FIRST:]),
                "worst": max(times["new"][FIRST:]),
                "warm": median(times["warm"][FIRST:]),
            }
            rows.append(row)
            print(
                f"new {what:5} {kind:9} {row['new']:7.1f} ms, {row['new'] / base:5.2f} of SGD's; "
                f"worst {row['worst']:.1f}, among the first {FIRST} {row['first']:.1f}, "
                f"warm {row['warm']:.1f}",
                flush=True,
            )
    if options.json:
        measure.write_results(options.json, "cpu", rows, clock="one thread's CPU time")


if __name__ == "__main__":
    main(sys.argv[1:])
