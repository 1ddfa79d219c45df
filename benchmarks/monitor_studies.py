"""Six training runs that fail in a known way, each with the report by which that is seen.

Run as ``python -m benchmarks.monitor_studies --folder docs/monitor``; it takes about a minute. Each
study is a small network on blobs of points, watched by `tnconv.monitor.Monitor`; its alerts are
printed, and a picture of its report is written. A healthy run is there to compare.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from tnconv.monitor import (
    Alpha,
    CriticalBatchSize,
    Distance,
    GradHist1d,
    GradNorm,
    HessTrace,
    LargestSample,
    Loss,
    Monitor,
    NormTest,
    SaturatedUnits,
    UpdateSize,
    read_run,
)
from tnconv.monitor.static_report import static_report

KINDS = (
    *(Alpha(), Distance(), UpdateSize(), GradNorm(), Loss(), NormTest(), CriticalBatchSize()),
    *(LargestSample(), HessTrace(), GradHist1d(), SaturatedUnits()),
)


@dataclass(frozen=True)
class Study:
    """What is wrong with a run, and the alert that has to say so."""

    alert: str | None
    rate: float = 0.5
    batch: int = 32
    scale: float = 1.0
    spread: float = 0.3
    wrong_labels: float = 0.0
    layers: int = 1
    steps: int = 80


STUDIES = {
    "healthy": Study(None),
    "learning rate too small": Study("learning rate too small", rate=1e-3, batch=128, steps=40),
    "learning rate too large": Study(
        "learning rate too large", rate=8.0, batch=128, wrong_labels=0.3, layers=0, steps=60
    ),
    "badly scaled data": Study("inputs badly scaled", scale=255.0, rate=1e-4),
    "vanishing gradients": Study("vanishing gradient", layers=9, rate=0.05),
    "mislabelled data": Study("outlying samples", wrong_labels=0.06, steps=300),
    "batch above the noise scale": Study(
        "batch above the noise scale", batch=2048, spread=1.5, steps=24
    ),
}


def data(study: Study, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points around ten centres; some labels may be wrong."""
    centres = torch.randn(10, 20, generator=torch.Generator().manual_seed(5))
    y = torch.randint(10, (study.batch,), generator=generator)
    x = centres[y] + study.spread * torch.randn(study.batch, 20, generator=generator)
    swap = torch.rand(study.batch, generator=generator) < study.wrong_labels
    other = torch.randint(10, (study.batch,), generator=generator)
    return study.scale * (x + (3 if study.scale > 1 else 0)), torch.where(swap, other, y)


def network(study: Study) -> nn.Sequential:
    """A linear classifier, one hidden layer, or many of sigmoids."""
    if not study.layers:
        return nn.Sequential(nn.Linear(20, 10))
    layers: list[nn.Module] = [nn.Linear(20, 32)]
    for _ in range(study.layers - 1):
        layers += [nn.Sigmoid(), nn.Linear(32, 32)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(32, 10))


def run(name: str, folder: Path | None, seed: int = 0) -> Monitor:
    """A watched run, recorded into a folder; thresholds of alerts were chosen on seed 0."""
    study = STUDIES[name]
    torch.manual_seed(seed)
    model, loss_fn = network(study), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=study.rate)
    monitor = Monitor(model, loss_fn, KINDS, folder=folder)
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(study.steps):
        x, y = data(study, generator)
        with monitor.step():
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
    return monitor


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("docs/monitor"))
    parser.add_argument("--only", help="studies whose name contains this")
    parser.add_argument("--seeds", type=int, nargs="*", help="print alerts of these, no pictures")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names = [name for name in STUDIES if (options.only or "") in name]  # a few seconds each
    if options.seeds is not None:
        for name in names:
            seen = [{a.title for _, a in run(name, None, seed).alerts} for seed in options.seeds]
            print_recognised(name, seen)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        with TemporaryDirectory() as place:
            monitor = run(name, Path(place) / name)
            picture = options.folder / f"{name.replace(' ', '-')}.png"
            static_report(read_run(Path(place) / name), picture)
        told = "; ".join(f"{step} {a.title}" for step, a in monitor.alerts)
        print(f"{name}: {told}", flush=True)


def print_recognised(name: str, seen: Sequence[set[str]]) -> None:
    """On how many seeds the alert that has to come came, and what else did."""
    alert = STUDIES[name].alert
    right = sum(not titles if alert is None else alert in titles for titles in seen)
    others = sorted(set().union(*seen) - {alert})
    print(f"{name}: {right} of {len(seen)}; others: {', '.join(others) or 'none'}", flush=True)


if __name__ == "__main__":
    main()
