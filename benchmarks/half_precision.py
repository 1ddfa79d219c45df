"""Training in pure bfloat16 beside float32: loss curves and failures of second-order optimizers.

Run as ``python -m benchmarks.half_precision --json found.json --plot found.png`` (extras ``demo``
and ``plots``); rows of the file that ``--only`` leaves out are kept. A small convolutional network
learns which way patches of photographs were turned. In
bfloat16 its parameters, activations, gradients and all state of the optimizer are (the logits'
cross-entropy is computed in float32, and KFAC inverts in float32: torch has no Cholesky
decomposition in bfloat16). Settings are those of short trials in float32, for SINGD and RF-Shampoo
one setting for all structures; both precisions train from the same weights with the same batches.
A row is an optimizer: the losses of every seed in both precisions, and the ratio of the mean losses
of the last 100 steps. A run stops at a loss, a parameter or a state that is not finite, or at an
error, which the row names.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import inf
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.images import rotated
from tnconv.optim import KFAC, SINGD, RFAdamW, RFShampoo
from tnconv.optim.structures import STRUCTURES

SIZE, ZOOM, TRAIN, BATCH, LAST = 8, 16, 2**13, 16, 100
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Make = Callable[[nn.Module], torch.optim.Optimizer]


def contestants() -> dict[str, Make]:
    """Each optimizer; factors are updated every 5 steps."""
    found: dict[str, Make] = {
        "SGD": lambda m: torch.optim.SGD(m.parameters(), 0.03, momentum=0.9),
        "AdamW": lambda m: torch.optim.AdamW(m.parameters(), 3e-3),
        "RF-AdamW": lambda m: RFAdamW(m.parameters(), 0.1, batch_size=BATCH),
        "KFAC, Cholesky": lambda m: KFAC(
            m, 0.1, damping=0.1, factor_dtype=next(m.parameters()).dtype,
            update_factors_every=5, update_inverses_every=5,
        ),
    }  # fmt: skip
    natural: dict[str, Any] = {"lr": 3e-3, "damping": 0.1, "factor_lr": 0.05}
    for name in STRUCTURES:
        found[f"SINGD {name}"] = lambda m, name=name: SINGD(
            m, structures=name, update_factors_every=5, **natural
        )
    for name in ("dense", "diagonal"):
        found[f"RF-Shampoo {name}"] = lambda m, name=name: RFShampoo(
            m, structures=name, update_factors_every=5, **natural
        )
    return found


def network() -> nn.Sequential:
    """Two convolutions with stride, and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (SIZE // 4) ** 2, 4),
    )


@cache
def data() -> tuple[Tensor, Tensor]:
    """The patches that all runs draw batches from."""
    return rotated(TRAIN, SIZE, torch.Generator().manual_seed(0), ZOOM)


def train(make: Make, dtype: torch.dtype, seed: int, steps: int) -> dict[str, Any]:
    """The losses of every step, and why it stopped, if it did."""
    model = network().to(dtype)
    optimizer = make(model)
    generator, (images, labels) = torch.Generator().manual_seed(seed), data()
    losses, failure = list[float](), None
    for step in range(steps):
        at = torch.randint(TRAIN, (BATCH,), generator=generator)
        x, y = images[at].to(dtype), labels[at]
        try:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x).float(), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        except RuntimeError as error:
            failure = f"step {step}: {str(error).splitlines()[0]}"
            break
        losses.append(loss.item())
        if not step % 50 or step == steps - 1 or not losses[-1] < 1e3:
            bad = _not_finite(model, optimizer)
            if bad or not losses[-1] < 1e3:
                failure = f"step {step}: " + (bad or f"loss {losses[-1]:.3g}")
                break
    return {"losses": losses, "failure": failure}


def _not_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """Which parameter, or which kind of the optimizer's state, is not finite."""
    for name, parameter in model.named_parameters():
        own = {"parameter": parameter} | optimizer.state.get(parameter, {})
        for kind, value in own.items():
            if torch.is_tensor(value) and not value.isfinite().all():
                return f"{kind} of {name} is not finite"
    return None


def final(run: Mapping[str, Any]) -> float:
    """The mean loss of the last steps, infinite if the run stopped."""
    return inf if run["failure"] else mean(run["losses"][-LAST:])


def row(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One optimizer in both precisions."""
    make = contestants()[name]
    runs = {
        precision: [train(make, dtype, seed, options.steps) for seed in range(options.seeds)]
        for precision, dtype in DTYPES.items()
    }
    ends = {precision: [final(run) for run in each] for precision, each in runs.items()}
    ratios = [half / full for half, full in zip(ends["bfloat16"], ends["float32"], strict=True)]
    return {
        "optimizer": name,
        "final": ends,
        "ratio": ratios,
        "failures": {p: [run["failure"] for run in each] for p, each in runs.items()},
        "losses": {p: [smoothed(run["losses"]) for run in each] for p, each in runs.items()},
    }


def smoothed(losses: Sequence[float], over: int = 20) -> list[float]:
    """The mean loss of every ``over`` successive steps."""
    return [round(mean(losses[at : at + over]), 5) for at in range(0, len(losses), over)]


def plot(rows: Sequence[Mapping[str, Any]], path: Path, over: int = 20) -> None:
    """Losses over steps of the first seed, one panel for each optimizer."""
    from matplotlib.figure import Figure

    columns = 4
    lines = -(-len(rows) // columns)
    figure = Figure((11, 2.1 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for ax, each in zip(axes, rows, strict=False):
        for precision, style in (("float32", "-"), ("bfloat16", "--")):
            curve = each["losses"][precision][0]
            ax.plot([over * (at + 1) for at in range(len(curve))], curve, style, label=precision)
        ax.set_title(f"{each['optimizer']}, {each['ratio'][0]:.2f}", fontsize="small")
        ax.set_yscale("log")
        ax.grid(alpha=0.3)
    for ax in axes[len(rows) :]:
        ax.set_visible(False)
    axes[0].legend(fontsize="x-small")
    figure.supxlabel("step")
    figure.supylabel("training loss, means of 20 batches")
    figure.savefig(path, dpi=110)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.half_precision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--only", default="", help="parts of optimizers' names, commas between")
    result.add_argument("--steps", type=int, default=1000)
    result.add_argument("--seeds", type=int, default=1)
    result.add_argument("--json", type=Path, help="write results to this file, and go on from it")
    result.add_argument("--plot", type=Path, help="draw them to this file")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    parts = options.only.split(",")
    known = read_rows(options.json)
    for name in contestants() if options.steps else ():
        if any(part in name for part in parts):
            known[name] = row(name, options)
            left = {key: value for key, value in known[name].items() if key != "losses"}
            print(left, flush=True)
            if options.json:
                settings = {"steps": options.steps, "seeds": options.seeds}
                known = read_rows(options.json) | {name: known[name]}
                measure.write_results(options.json, "cpu", [*known.values()], settings=settings)
    if options.plot:
        plot([known[name] for name in contestants() if name in known], options.plot)


def read_rows(path: Path | None) -> dict[str, dict[str, Any]]:
    """The rows of a results file, by optimizer."""
    return {each["optimizer"]: each for each in measure.read_rows(path)}


if __name__ == "__main__":
    main()
