"""Studies of low-rank Gauss-Newton matrices, on photographs whose rotation is to be told.

Run as ``python -m benchmarks.low_rank_studies estimates --json found.json --plot found.png``.

* ``estimates``: errors of the leading eigenvalues and of a damped Newton step, of sampled columns
  and of subsets of the batch, against the time that they take.
* ``noise``: signal to noise of slopes and curvatures along leading eigenvectors while SGD trains.
* ``optimizer``: `tnconv.optim.LowRankNewton` with constant and with noise-aware damping beside SGD
  and KFAC, each with the best of a few settings.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

import tnconv
from benchmarks import measure
from benchmarks.images import rotated
from tnconv.operators.low_rank import noise_aware, relative
from tnconv.optim import KFAC, LowRankNewton

LOSS = nn.CrossEntropyLoss()
SIZE = 16  # pixels
TRAIN = 1024
Row = dict[str, Any]


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


def batches(size: int, steps: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches of one set of photographs' patches."""
    x, y = rotated(TRAIN, SIZE, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + seed)
    for _ in range(steps):
        at = torch.randint(TRAIN, (size,), generator=generator)
        yield x[at], y[at]


def trained(steps: int) -> nn.Sequential:
    """The network after some steps of SGD."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for x, y in batches(64, steps):
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()
    return model


def estimates(batch: int = 64, draws: int = 3, k: int = 10) -> list[Row]:
    """Errors and times of sampled columns and of subsets, relative to the exact matrix."""
    model, (x, y) = trained(100), next(batches(batch, 1, 9))
    everything = {"curvature_samples": None, "gradient_samples": list(range(batch))}
    settings: list[Row] = [{"fisher": "type-2"}]
    settings += [{"fisher": "mc", "samples": samples} for samples in (1, 4, 16)]
    settings += [{"fisher": "type-2", "subset": size} for size in (4, 16)]
    settings += [{"fisher": "mc", "samples": 1, "subset": size} for size in (4, 16)]

    def found(setting: Row, draw: int) -> tuple[Tensor, Tensor, float]:
        how: Row = everything | {key: v for key, v in setting.items() if key != "subset"}
        generator = torch.Generator().manual_seed(draw)
        if size := setting.get("subset"):
            how["curvature_samples"] = torch.randperm(batch, generator=generator)[:size]
        start = time.process_time()
        ggn = tnconv.low_rank_ggn(model, LOSS, x, y, generator=generator, **how)
        values = ggn.eigvalsh()[:k].clone()
        taken = time.process_time() - start
        steps = ggn.newton_step(relative(0.1), min(k, ggn.block.rank))
        return values, torch.cat([s.flatten() for s in steps.values()]), taken

    for _ in range(3):
        exact, step, _ = found(settings[0], 0)  # programs are searched for
    rows = []
    for setting in settings:
        every = [found(setting, draw) for draw in range(draws + 2)][2:]
        spectrum = [float((v - exact[: len(v)]).abs().sum() / exact.sum()) for v, *_ in every]
        steps = [float((s - step).norm() / step.norm()) for _, s, _ in every]
        seconds = median(taken for *_, taken in every)
        rows.append(
            {**setting, "spectrum": mean(spectrum), "step": mean(steps), "seconds": seconds}
        )
    for row in rows:
        row["cost"] = row["seconds"] / rows[0]["seconds"]
    return rows


def noise(steps: int = 200, every: int = 10, batch: int = 64, k: int = 6) -> list[Row]:
    """Means over standard errors of slopes and curvatures along the k leading eigenvectors."""
    model, rows = network(), list[Row]()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for at, (x, y) in enumerate(batches(batch, steps + 1)):
        if not at % every:
            ggn = tnconv.low_rank_ggn(model, LOSS, x, y)
            found = ggn.directional_derivatives(k=min(k, ggn.block.rank))
            row: Row = {"step": at, "loss": float(LOSS(model(x), y).detach())}
            for name, each in (("slopes", found.slopes), ("curvatures", found.curvatures)):
                row[name] = (each.mean(0).abs() / (each.std(0) / len(each) ** 0.5)).tolist()
            rows.append(row)
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()
    return rows


Make = Callable[[nn.Module, nn.Module], torch.optim.Optimizer]


def low_rank(damping: Any, complement: float) -> Make:
    """`LowRankNewton` with a damping and a step size for what its directions do not span."""
    return lambda model, loss: LowRankNewton(model, loss, damping=damping, complement_lr=complement)


OPTIMIZERS: dict[str, dict[str, Make]] = {
    "SGD": {
        f"lr {lr}": lambda m, loss, lr=lr: torch.optim.SGD(m.parameters(), lr, momentum=0.9)  # type: ignore[misc]
        for lr in (0.03, 0.1)
    },
    "KFAC": {
        f"lr {lr}": lambda m, loss, lr=lr: KFAC(m, lr=lr, damping=0.1)  # type: ignore[misc]
        for lr in (0.03, 0.1)
    },
    "LowRankNewton, constant damping": {
        f"damping {damping}, complement {lr}": low_rank(damping, lr)
        for damping in (0.3, 3.0)
        for lr in (0.1,)
    },
    "LowRankNewton, noise-aware damping": {
        f"complement {lr}": low_rank(noise_aware(50, 0.1, torch.Generator().manual_seed(3)), lr)
        for lr in (0.1,)
    },
}


def optimizer(steps: int = 100, batch: int = 64, seeds: int = 1) -> list[Row]:
    """Training losses, of the setting whose last losses are least."""
    rows = []
    losses(OPTIMIZERS["SGD"]["lr 0.03"], 2, batch, 0)  # photographs and kernels are made once
    for name, settings in OPTIMIZERS.items():
        tried = {}
        for setting, make in settings.items():
            start = time.process_time()
            runs = [losses(make, steps, batch, seed) for seed in range(seeds)]
            curve = [mean(at) for at in zip(*runs, strict=True)]
            tried[setting] = {"losses": curve, "seconds": time.process_time() - start}
        best = min(tried, key=lambda setting: mean(tried[setting]["losses"][-20:]))
        print(name, best, flush=True)
        final = {setting: mean(each["losses"][-20:]) for setting, each in tried.items()}
        rows.append({"optimizer": name, "setting": best, "final": final, **tried[best]})
    return rows


def losses(make: Make, steps: int, batch: int, seed: int) -> list[float]:
    """The loss of every step's batch; a run that diverges keeps its last loss."""
    model, loss_fn, found = network(), nn.CrossEntropyLoss(), list[float]()
    chosen = make(model, loss_fn)
    for x, y in batches(batch, steps, seed):
        chosen.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        chosen.step()
        found.append(min(float(loss.detach().nan_to_num(10.0, 10.0)), 10.0))
    return found


def plot_estimates(rows: Sequence[Mapping[str, Any]], axes: Sequence[Any]) -> None:
    """Errors against cost, both relative to the exact matrix."""
    for ax, what in zip(axes, ("spectrum", "step"), strict=True):
        for label, chosen in {
            "sampled columns": lambda r: r["fisher"] == "mc" and "subset" not in r,
            "subsets, exact": lambda r: r["fisher"] == "type-2" and "subset" in r,
            "subsets, one sample": lambda r: r["fisher"] == "mc" and "subset" in r,
        }.items():
            some = [row for row in rows if chosen(row)]
            ax.plot([r["cost"] for r in some], [r[what] for r in some], "o-", label=label)
            for r in some:
                ax.annotate(r.get("subset", r.get("samples")), (r["cost"], r[what]))
        ax.set(xlabel="time / exact", ylabel=f"relative error of the {what}", yscale="log")
        ax.legend()


def plot_noise(rows: Sequence[Mapping[str, Any]], axes: Sequence[Any]) -> None:
    """Signal to noise over steps, one line for each direction."""
    for ax, what in zip(axes, ("slopes", "curvatures"), strict=True):
        for k in range(max(len(row[what]) for row in rows)):
            some = [(row["step"], row[what][k]) for row in rows if len(row[what]) > k]
            ax.plot(*zip(*some, strict=True), label=f"direction {k + 1}")
        ax.set(xlabel="step", ylabel=f"{what}: mean / standard error", yscale="log")
        ax.axhline(1, color="grey", linewidth=0.5)
        ax.legend()


def plot_optimizer(rows: Sequence[Mapping[str, Any]], axes: Sequence[Any]) -> None:
    """Losses over steps and over time, means over ten steps."""
    for row in rows:
        each = [mean(row["losses"][max(0, at - 9) : at + 1]) for at in range(len(row["losses"]))]
        seconds = [row["seconds"] * at / len(each) for at in range(len(each))]
        axes[0].plot(each, label=f"{row['optimizer']} ({row['setting']})")
        axes[1].plot(seconds, each)
    axes[0].set(xlabel="step", ylabel="loss, mean of ten batches", yscale="log")
    axes[1].set(xlabel="process seconds of all seeds", yscale="log")
    how = {"loc": "outside upper center", "ncols": 2, "fontsize": "small"}
    axes[0].figure.legend(*axes[0].get_legend_handles_labels(), **how)


STUDIES = {
    "estimates": (estimates, plot_estimates),
    "noise": (noise, plot_noise),
    "optimizer": (optimizer, plot_optimizer),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.low_rank_studies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("study", choices=STUDIES)
    result.add_argument("--json", type=Path, help="write results to this file")
    result.add_argument("--plot", type=Path, help="draw them to this file")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    study, draw = STUDIES[options.study]
    rows = study()
    for row in rows:
        print({key: value for key, value in row.items() if key != "losses"}, flush=True)
    if options.json:
        measure.write_results(options.json, "cpu", rows)
    if options.plot:
        from matplotlib.figure import Figure

        figure = Figure((11, 4.5), layout="constrained")
        draw(rows, figure.subplots(1, 2))
        figure.savefig(options.plot, dpi=120)


if __name__ == "__main__":
    main()
