"""What it costs to know where samples are: ``python -m benchmarks.evidence [JSON]``.

Process time over that of a training step (SGD with momentum), medians of rounds in turns: squared
norms once maps are known; what the first batch takes beside that; what a check takes, in per cent
of the steps between two; the same norms from ``vmap(grad)``, which is what a whole-model fallback
takes; and one backward pass by torch alone from the outputs to all layers, which is the least that
evidence takes.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, grad, vmap

import tnconv
from benchmarks import measure
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
    """Process time of each, after one round to warm up.

    Every second round goes backwards: the first to call this library after torch's own step runs
    with caches full of other code.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    for at in range(rounds + 1):
        for name, work in [*works.items()][:: -1 if at % 2 else 1]:
            start = time.process_time()
            work()
            if at:
                taken[name].append(time.process_time() - start)
    return {name: median(each) for name, each in taken.items()}


def row(model: nn.Module, x: Tensor, y: Tensor, rounds: int = 30) -> tuple[float, ...]:
    """Known, evidence, checks (per cent), fallback, and a pass by torch alone, over a step."""
    values = {name: p.detach() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9)

    def one(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return LOSS(functional_call(model, p, (x[None],)), y[None])

    def step() -> None:
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()

    def known() -> object:
        return tnconv.compute(model, LOSS, x, y, [SquaredNorms()])

    def first() -> object:
        samples._KNOWN.clear()
        return known()

    def check() -> object:
        for each in samples._KNOWN[model].values():
            each.batches = samples.EVERY
        return known()

    def fallback() -> object:
        found = vmap(grad(one), (None, 0, 0))(values, x, y)
        return {name: (g * g).flatten(1).sum(1) for name, g in found.items()}

    works = {"step": step, "first": first, "known": known, "check": check, "fallback": fallback}
    with every_layer(deepcopy(model), x) as (output, ends):
        v, how = torch.randn_like(output), {"retain_graph": True, "allow_unused": True}
        works["pass"] = lambda: torch.autograd.grad(output, ends, v, **how)
        found = medians(works, rounds)
    each, checks = found["known"], 100 * (found["check"] - found["known"]) / samples.EVERY
    parts = each, found["first"] - each, checks, found["fallback"], found["pass"]
    return tuple(part / found["step"] for part in parts)


@contextmanager
def every_layer(model: nn.Module, x: Tensor) -> Iterator[tuple[Tensor, list[GradientEdge]]]:
    """A model's output, and where the gradients after its layers arrive."""
    ends: list[GradientEdge] = []

    def note(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            ends.append(get_gradient_edge(output))

    layers = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    handles = [layer.register_forward_hook(note) for layer in layers]
    output = model(x)
    for handle in handles:
        handle.remove()
    yield output, ends


if __name__ == "__main__":
    measure.with_allocator("benchmarks.evidence", sys.argv[1:])
    measure.touch_pages()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "There is a performance drop")
    columns = ("known", "evidence", "checks %", "fallback", "pass")
    print(" " * 14, *(f"{each:>8s}" for each in columns))
    found = {}
    for name, model, shape in (
        ("convolutions", network(), (32, 3, 32, 32)),
        ("ResNet-20", cifar_resnet20(10).eval(), (16, 3, 32, 32)),
        ("encoder 128", Encoder(128, 4), (16, 32, 128)),
        ("encoder 32", Encoder(32, 2), (16, 16, 32)),
    ):
        figures = row(model, torch.randn(shape), torch.randint(3, (shape[0],)))
        print(f"{name:14s} ", *(f"{each:8.2f}" for each in figures), flush=True)
        found[name] = dict(zip(columns, figures, strict=True))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
