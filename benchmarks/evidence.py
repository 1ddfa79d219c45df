"""What it costs to know where samples are: ``python -m benchmarks.evidence``.

Process time over that of a gradient step, medians of rounds in turns: squared norms once maps are
known, what the first batch takes beside that, what a check of every hundredth batch takes, and
per-sample gradients by ``vmap(grad)``, which is what a whole-model fallback takes.
"""

import time
import warnings
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import tnconv
from benchmarks.models import cifar_resnet20
from tnconv.models import samples
from tnconv.quantities import SquaredNorms

LOSS = nn.CrossEntropyLoss()


class Encoder(nn.Module):
    """Parameters without layers: projections of attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.encoder(x).mean(1))
        return found


def network() -> nn.Module:
    """Convolutions, all in the ordinary place."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 3)),
    )


def medians(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Process time of each, after one round to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for at in range(rounds + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            if at:
                taken[name].append(time.process_time() - start)
    return {name: median(each) for name, each in taken.items()}


def row(model: nn.Module, x: Tensor, y: Tensor, rounds: int = 15) -> tuple[float, ...]:
    """Known, evidence, check and fallback, over a step."""
    values = {name: p.detach() for name, p in model.named_parameters()}

    def one(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return LOSS(functional_call(model, p, (x[None],)), y[None])

    def known() -> object:
        return tnconv.compute(model, LOSS, x, y, [SquaredNorms()])

    def first() -> object:
        samples._KNOWN.clear()
        return known()

    def check() -> object:
        for each in samples._KNOWN[model].values():
            each.batches = samples.EVERY
        return known()

    found = medians(
        {
            "step": lambda: LOSS(model(x), y).backward(),
            "first": first,
            "known": known,
            "check": check,
            "fallback": lambda: vmap(grad(one), (None, 0, 0))(values, x, y),
        },
        rounds,
    )
    more = [found[name] - found["known"] for name in ("first", "check")]
    return tuple(each / found["step"] for each in (found["known"], *more, found["fallback"]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "There is a performance drop")
    print(f"{'':14s} {'known':>8s} {'evidence':>9s} {'check':>8s} {'fallback':>9s}")
    for name, model, shape in (
        ("convolutions", network(), (32, 3, 32, 32)),
        ("ResNet-20", cifar_resnet20(10).eval(), (16, 3, 32, 32)),
        ("encoder 128", Encoder(128, 4), (16, 32, 128)),
        ("encoder 32", Encoder(32, 2), (16, 16, 32)),
    ):
        figures = row(model, torch.randn(shape), torch.randint(3, (shape[0],)))
        print(f"{name:14s} " + " ".join(f"{each:8.2f}x" for each in figures), flush=True)
