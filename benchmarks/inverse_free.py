"""Training steps of inverse-free and root-free optimizers next to those of SGD.

Run as ``python -m benchmarks.inverse_free --json results.json``; ``--help`` lists the options. On
ResNet-20 each optimizer takes steps that precondition alone, and steps that also update factors, in
turns with SGD's, each on a model of its own; a run that updates every 10 steps costs the weighted
mean. `RFAdamW` is timed beside ``torch.optim.AdamW(foreach=True)`` on ResNet-18's parameters alone
(``--only RFAdamW``). Times are of this process, which is what a loaded machine leaves comparable;
both kinds of AdamW's steps are the same step, so what these differ by is the noise.
Rows of a results file that ``--only`` leaves out are kept; ``--rounds 0 --plot plot.png`` draws
them, and measures nothing.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.models import cifar_resnet18, cifar_resnet20
from tnconv.optim import SINGD, RFAdamW, RFShampoo
from tnconv.optim.structures import STRUCTURES

EVERY, WARM = 10, 2
ADAMW = "RFAdamW / AdamW"
Made = Callable[[nn.Module], torch.optim.Optimizer]


def contestants(flavour: Any) -> dict[str, Made]:
    """Each optimizer of a model; every second step updates factors."""

    def singd(structures: str) -> Made:
        return lambda model: SINGD(
            model, 1e-3, damping=0.1, structures=structures, flavour=flavour,
            update_factors_every=2,
        )  # fmt: skip

    found: dict[str, Made] = {f"SINGD {name}": singd(name) for name in STRUCTURES}
    for name in ("dense", "diagonal"):
        found[f"RF-Shampoo {name}"] = lambda model, name=name: RFShampoo(
            model, 1e-3, damping=0.1, structures=name, update_factors_every=2
        )
    found["AdamW"] = lambda model: torch.optim.AdamW(model.parameters(), 1e-3)
    return found | peers(flavour)


def peers(flavour: Any) -> dict[str, Made]:
    """The published packages `singd`, which trains linear and convolutional layers alone, and
    `sirfshampoo`, where they are installed (extra ``peers``).
    """
    try:
        from singd.optim.optimizer import SINGD as Published
        from sirfshampoo.optimizer import SIRFShampoo
    except ImportError:
        return {}
    found: dict[str, Made] = {}
    for name in ("dense", "diagonal", "hierarchical15_15"):
        found[f"published SINGD {name}"] = lambda model, name=name: Published(
            model, lr=1e-3, momentum=0.9, damping=0.1, T=2, structures=(name, name),
            kfac_approx=flavour, warn_unsupported=False,
        )  # fmt: skip
    found["published RF-Shampoo dense"] = lambda model: SIRFShampoo(model, lr=1e-3, lam=0.1, T=2)
    return found


def step_of(made: Made, x: Tensor, y: Tensor) -> Callable[[], None]:
    """A training step of a network of its own."""
    torch.manual_seed(0)
    model = cifar_resnet20(10)
    optimizer = made(model)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def network_rows(names: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Ratios to SGD's step, of medians of interleaved rounds."""
    x, y = torch.rand(options.batch, 3, 32, 32), torch.randint(10, (options.batch,))
    every = contestants(options.flavour)
    steps = {name: step_of(every[name], x, y) for name in names}
    steps["SGD"] = step_of(lambda m: torch.optim.SGD(m.parameters(), 1e-3, momentum=0.9), x, y)
    times: dict[tuple[str, str], list[float]] = {}
    for at in range(options.rounds + WARM):
        for kind in ("factors", "plain"):
            for name in Random(at).sample(sorted(steps), len(steps)):
                start = time.process_time()
                steps[name]()
                if at >= WARM:
                    taken = times.setdefault((name, kind), [])
                    taken.append(time.process_time() - start)
    base = median(times["SGD", "factors"] + times["SGD", "plain"])
    rows: list[dict[str, Any]] = []
    if options.memory:
        peaks = {
            name: max(measure.peak_memory(step) for _ in range(2)) / 2**20
            for name, step in steps.items()
        }
        rows.append({"optimizer": "SGD", "peak_mib": peaks["SGD"]})
    for name in names:
        plain, factors = (median(times[name, kind]) / base for kind in ("plain", "factors"))
        mixed = ((EVERY - 1) * plain + factors) / EVERY
        row = {"optimizer": name, "rounds": options.rounds, "sgd_ms": 1e3 * base}
        row |= {"plain": plain, "factors": factors, f"every {EVERY}": mixed}
        rows.append(row | ({"peak_mib": peaks[name]} if options.memory else {}))
    return rows


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
    return {"optimizer": ADAMW, "rounds": rounds, "ratio": found["RFAdamW"] / found["AdamW"]}


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Time per step and, where it was measured, peak memory of each optimizer over SGD's."""
    from matplotlib.figure import Figure

    mixed = f"every {EVERY}"
    timed = [row for row in rows if mixed in row]
    sgd = next((row["peak_mib"] for row in rows if row["optimizer"] == "SGD"), None)
    figure = Figure((9, 1.3 + 0.27 * len(timed)), layout="constrained")
    left, *right = figure.subplots(1, 1 if sgd is None else 2, sharey=True, squeeze=False)[0]
    places = range(len(timed))
    times = {
        "preconditions alone": ("plain", "|"),
        f"updates factors in 1 of {EVERY} steps": (mixed, "o"),
        "updates factors": ("factors", "x"),
    }
    for words, (kind, marker) in times.items():
        left.plot([row[kind] for row in timed], places, f"C0{marker}", label=words)
    for ax in right:
        ax.plot([row["peak_mib"] / sgd for row in timed], places, "C1o")
        ax.set_xlabel("peak memory over SGD's")
    left.set_xlabel("process time of a step over SGD's")
    left.set_yticks(places, [row["optimizer"] for row in timed])
    left.invert_yaxis()
    for ax in (left, *right):
        ax.axvline(1, color="black", linewidth=0.8)
        ax.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper right", ncols=3)
    figure.savefig(path, dpi=110)


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
    parser.add_argument("--memory", action="store_true", help="peak memory of a step, too")
    parser.add_argument("--json", type=Path, help="write results to this file, and go on from it")
    parser.add_argument("--plot", type=Path, help="draw the file's rows and these to this file")
    options = parser.parse_args(arguments)
    measure.with_allocator(
        "benchmarks.inverse_free", sys.argv[1:] if arguments is None else arguments
    )
    torch.set_num_threads(1)
    if options.rounds:
        measure.touch_pages()
    parts = options.only.split(",")
    names = [n for n in contestants(options.flavour) if any(part in n for part in parts)]
    rows: list[dict[str, Any]] = []
    if options.rounds and any(part in ADAMW for part in parts):
        rows.append(adamw_row(3 * options.rounds))
    if options.rounds and names:
        rows += network_rows(names, options)
    for row in rows:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    known = {row["optimizer"]: row for row in [*measure.read_rows(options.json), *rows]}
    if options.json and rows:
        settings = {"batch": options.batch, "flavour": options.flavour}
        measure.write_results(options.json, "cpu", [*known.values()], options=settings)
    if options.plot:
        plot([*known.values()], options.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
