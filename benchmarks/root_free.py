"""Root-free adaptive methods beside their rooted twins and SGD: does the generalisation gap close?

Run as ``python -m benchmarks.root_free --json found.json --plot found.png`` (extras ``demo`` and
``plots``); rows of the file that ``--only`` leaves out are kept. A convolutional and an attention
network classify handwritten digits: 600 train, 300 validate, and the other 897 test. All
optimizers are tuned alike: each has a grid of six learning rates, about a factor of 3 apart, and
the one with the best accuracy on a validation part (then the least loss on it) after a whole
training with a seed of its own is taken; nothing else is tuned. Then every seed trains anew, with
the same weights, batches and schedule for all optimizers, so that differences between optimizers
are taken seed by seed. The averages of squares of all adaptive methods have the decay 0.95, so that
they have forgotten how they began before the learning rate first falls. No optimizer has weight
decay: a decoupled one is multiplied by learning rates that differ by orders of magnitude between
twins, so AdamW is Adam here. A row is a network and an optimizer; accuracies are in percent.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from math import inf, isfinite, nan
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.images import digits
from benchmarks.training import TUNING_SEED, digits_network
from tnconv.optim import RFAdamW, RFRMSProp

BATCH, PARTS = 64, {"train": 600, "validation": 300, "test": 897}
MOMENTUM, DECAY = 0.9, 0.95
Make = Callable[[nn.Module, float], torch.optim.Optimizer]
OPTIMIZERS: Mapping[str, Make] = {
    "SGD": lambda m, lr: torch.optim.SGD(m.parameters(), lr, MOMENTUM),
    "RMSprop": lambda m, lr: torch.optim.RMSprop(m.parameters(), lr, DECAY, momentum=MOMENTUM),
    "RF-RMSProp": lambda m, lr: RFRMSProp(
        m.parameters(), lr, DECAY, momentum=MOMENTUM, batch_size=BATCH
    ),
    "AdamW": lambda m, lr: torch.optim.AdamW(
        m.parameters(), lr, (MOMENTUM, DECAY), weight_decay=0.0
    ),
    "RF-AdamW": lambda m, lr: RFAdamW(
        m.parameters(), lr, (MOMENTUM, DECAY), weight_decay=0.0, batch_size=BATCH
    ),
}
GRIDS: Mapping[str, tuple[float, ...]] = {
    "SGD": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    "RMSprop": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "RF-RMSProp": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "AdamW": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "RF-AdamW": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
}
TWINS = {"RF-RMSProp": "RMSprop", "RF-AdamW": "AdamW"}


class Attention(nn.Module):
    """Two transformer blocks on the 16 patches of 2 x 2 pixels."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(1, width, 2, 2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True
                )
                for _ in range(2)
            )
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embedding(x).flatten(2).mT + self.positions
        logits: Tensor = self.head(self.blocks(tokens).mean(1))
        return logits


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "convolutions": digits_network,
    "attention": Attention,
}


@cache
def data() -> dict[str, tuple[Tensor, Tensor]]:
    """Images and labels of each part: one random split for all runs."""
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    split = order.split([*PARTS.values()])
    return {name: (images[at], labels[at]) for name, at in zip(PARTS, split, strict=True)}


def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The full batches of an epoch, in a new order in each call of one generator."""
    generator, (images, labels) = torch.Generator().manual_seed(seed), data()["train"]
    while True:
        for at in torch.randperm(len(images), generator=generator).split(BATCH)[:-1]:
            yield images[at], labels[at]


def train(network: str, name: str, lr: float, seed: int, epochs: int) -> dict[str, Any]:
    """The mean loss of every epoch, and loss and accuracy of every part at the end.

    The learning rate falls tenfold at half and at three quarters. Training breaks off at a loss
    that is not below 1000; then every part has the accuracy 0.
    """
    torch.manual_seed(seed)
    model = NETWORKS[network]()
    optimizer = OPTIMIZERS[name](model, lr)
    each = PARTS["train"] // BATCH
    falls = [epochs * each // 2, epochs * each * 3 // 4]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, falls)
    drawn, losses = batches(seed), list[float]()
    for _ in range(epochs * each):
        x, y = next(drawn)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        if not loss.item() < 1e3:
            return {"losses": [], "parts": dict.fromkeys(PARTS, (nan, 0.0))}
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    means = [round(mean(losses[at : at + each]), 6) for at in range(0, len(losses), each)]
    return {"losses": means, "parts": {part: judged(model, part) for part in PARTS}}


@torch.no_grad()
def judged(model: nn.Module, part: str) -> tuple[float, float]:
    """Loss and accuracy; no layer of either network acts differently in evaluation."""
    x, y = data()[part]
    output = model(x)
    right = (output.argmax(1) == y).float().mean()
    return nn.functional.cross_entropy(output, y).item(), round(100 * right.item(), 4)


def tuned(network: str, name: str, epochs: int) -> list[tuple[float, float, float]]:
    """Each learning rate with its accuracy and loss on the validation part."""
    runs = [(lr, train(network, name, lr, TUNING_SEED, epochs)) for lr in GRIDS[name]]
    return [(lr, *run["parts"]["validation"][::-1]) for lr, run in runs]


def best(tuning: Sequence[tuple[float, float, float]]) -> float:
    """The learning rate with the best accuracy, of equals the one with the least loss."""
    return max(tuning, key=lambda of: (of[1], -of[2] if of[2] < inf else -inf))[0]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation over seeds (0 of a single one), and the values."""
    deviation = 0.0
    if len(values) > 1:
        deviation = stdev(values) if isfinite(sum(values)) else nan
    return {"mean": mean(values), "deviation": deviation, "seeds": [*values]}


def row(network: str, name: str, epochs: int, seeds: int) -> dict[str, Any]:
    """One optimizer on one network, tuned, with every seed."""
    tuning = tuned(network, name, epochs)
    lr = best(tuning)
    runs = [train(network, name, lr, seed, epochs) for seed in range(seeds)]
    parts = [run["parts"] for run in runs]
    return {
        "network": network,
        "optimizer": name,
        "lr": lr,
        "at the grid's end": lr in (GRIDS[name][0], GRIDS[name][-1]),
        "tuning": tuning,
        "train loss": summary([part["train"][0] for part in parts]),
        "train accuracy": summary([part["train"][1] for part in parts]),
        "test loss": summary([part["test"][0] for part in parts]),
        "test accuracy": summary([part["test"][1] for part in parts]),
        "losses": [run["losses"] for run in runs],
    }


def compared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the test accuracy that each has over SGD, and a root-free method over its twin."""
    known = {(each["network"], each["optimizer"]): each for each in rows}
    found = []
    for (network, name), each in known.items():
        own, more = each["test accuracy"]["seeds"], dict[str, Any]()
        for words, other in (("over SGD", "SGD"), ("over its twin", TWINS.get(name))):
            base = known.get((network, other)) if other not in (None, name) else None
            if base is not None and len(base["test accuracy"]["seeds"]) == len(own):
                pairs = zip(own, base["test accuracy"]["seeds"], strict=True)
                more[words] = summary([round(a - b, 4) for a, b in pairs])
        found.append({**each, **more})
    return found


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Training losses over epochs, and test errors of every seed; a network in each line."""
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(each["network"] for each in rows))
    figure = Figure((9, 3.2 * len(networks)), layout="constrained")
    axes = figure.subplots(len(networks), 2, squeeze=False)
    colours = {"SGD": "C7", "RMSprop": "C0", "RF-RMSProp": "C0", "AdamW": "C1", "RF-AdamW": "C1"}
    for (left, right), network in zip(axes, networks, strict=True):
        own = [each for each in rows if each["network"] == network]
        for at, each in enumerate(own):
            name = each["optimizer"]
            curve = [mean(values) for values in zip(*each["losses"], strict=False)]
            style = "--" if name in TWINS else "-"
            left.plot(range(1, len(curve) + 1), curve, style, color=colours[name], label=name)
            errors = [100 - value for value in each["test accuracy"]["seeds"]]
            hollow = "none" if name in TWINS else colours[name]
            right.plot(errors, [at] * len(errors), "o", color=colours[name], mfc=hollow)
            right.plot(mean(errors), at, "k|", markersize=16)
        left.set(ylabel=f"training loss, {network}", yscale="log")
        right.set_yticks(range(len(own)), [each["optimizer"] for each in own])
        right.invert_yaxis()
        left.grid(alpha=0.3)
        right.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    axes[-1][0].set_xlabel("epoch")
    axes[-1][1].set_xlabel("test error of every seed, and mean, in percent")
    figure.savefig(path, dpi=110)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.root_free",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--only", default="", help="parts of 'network optimizer', commas between")
    result.add_argument("--epochs", type=int, default=30, help="0 draws the file's rows alone")
    result.add_argument("--seeds", type=int, default=4)
    result.add_argument("--json", type=Path, help="write results to this file, and go on from it")
    result.add_argument("--plot", type=Path, help="draw them to this file")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune, train, compare."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    names = [(network, name) for network in NETWORKS for name in OPTIMIZERS]
    parts = options.only.split(",")
    known = {(each["network"], each["optimizer"]): each for each in measure.read_rows(options.json)}
    for key in names if options.epochs else ():
        if not any(part in " ".join(key) for part in parts):
            continue
        known[key] = row(*key, options.epochs, options.seeds)
        rows = compared([known[name] for name in names if name in known])
        lr, test = known[key]["lr"], known[key]["test accuracy"]
        print(
            f"{' '.join(key)}: lr {lr}, test {test['mean']:.2f} ± {test['deviation']:.2f} %",
            flush=True,
        )
        if options.json:
            settings = {"epochs": options.epochs, "seeds": options.seeds, "batch": BATCH}
            more = {"settings": settings, "parts": PARTS, "grids": GRIDS}
            measure.write_results(options.json, "cpu", rows, **more)
    if options.plot:
        plot([known[name] for name in names if name in known], options.plot)


if __name__ == "__main__":
    main()
