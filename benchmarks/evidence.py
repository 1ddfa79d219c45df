"""What it costs to know where samples are: ``python -m benchmarks.evidence``.

Times over that of a gradient step: squared norms once it is known, the first batch's evidence, and
per-sample gradients by ``vmap(grad)``, which is what a whole-model fallback takes.
"""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import tnconv
from tnconv.models import samples
from tnconv.quantities import SquaredNorms

LOSS = nn.CrossEntropyLoss()


class Encoder(nn.Module):
    """Parameters without layers: projections of attention."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.encoder(x).mean(1))
        return found


def network() -> nn.Module:
    """Convolutions, all in the ordinary place."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 3)),
    )


def seconds(work: Callable[[], object], times: int = 5) -> float:
    """The median, after one call to warm up."""
    work()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return median(taken)


def row(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Known, evidence and fallback, over a step."""
    values = {name: p.detach() for name, p in model.named_parameters()}

    def one(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return LOSS(functional_call(model, p, (x[None],)), y[None])

    def known() -> object:
        return tnconv.compute(model, LOSS, x, y, [SquaredNorms()])

    def first() -> object:
        samples._KNOWN.clear()
        return known()

    step = seconds(lambda: LOSS(model(x), y).backward())
    later, whole = seconds(known), seconds(first)
    fallback = seconds(lambda: vmap(grad(one), (None, 0, 0))(values, x, y))
    return later / step, (whole - later) / step, fallback / step


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{'':12s} {'known':>8s} {'evidence':>9s} {'fallback':>9s}")
    for name, model, shape in (
        ("convolutions", network(), (32, 3, 32, 32)),
        ("encoder", Encoder(), (16, 16, 32)),
    ):
        figures = row(model, torch.randn(shape), torch.randint(3, (shape[0],)))
        print(f"{name:12s} " + " ".join(f"{each:8.2f}x" for each in figures))
