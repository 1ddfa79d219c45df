"""What it costs to know where samples are: ``python -m benchmarks.evidence --json FILE``.

Process time over that of a training step (SGD with momentum), medians of rounds in turns: squared
norms once maps are known; what the first batch takes beside that; what a check takes, in per cent
of the steps between two; the same norms from ``vmap(grad)``, which is what a whole-model fallback
takes; and one backward pass by torch alone from the outputs to all layers, which is the least that
evidence takes.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
COLUMNS = ("known", "evidence", "checks %", "fallback", "pass")


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


class Logits(nn.Module):
    """Those of one of Hugging Face's models, of the last step where there are several."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.model(x).logits
        return found[:, -1] if found.dim() == 3 else found


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


def models() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Networks, each with a batch."""
    yield "convolutions", network(), torch.randn(32, 3, 32, 32)
    yield "ResNet-20", cifar_resnet20(10).eval(), torch.randn(16, 3, 32, 32)
    yield "encoder 128", Encoder(128, 4), torch.randn(16, 32, 128)
    yield "encoder 32", Encoder(32, 2), torch.randn(16, 16, 32)
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]  # not needed here
    try:
        import transformers as t  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    vit = t.ViTConfig(**sizes, intermediate_size=128, image_size=32, patch_size=4, num_labels=3)
    yield "ViT", Logits(t.ViTForImageClassification(vit)).eval(), torch.randn(16, 3, 32, 32)
    gpt = t.GPT2Config(
        **{"vocab_size": 97, "n_positions": 64, "n_embd": 64, "n_layer": 4, "n_head": 4},
        **{"use_cache": False, "bos_token_id": 0, "eos_token_id": 0},
    )
    yield "GPT-2", Logits(t.GPT2LMHeadModel(gpt)).eval(), torch.randint(97, (16, 64))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("--network", action="append", help="repeatable; all by default")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write results to this file")
    options = parser.parse_args(arguments)
    measure.with_allocator("benchmarks.evidence", sys.argv[1:] if arguments is None else arguments)
    measure.touch_pages()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "There is a performance drop")
    rows = [] if options.json is None else measure.read_rows(options.json)
    print(" " * 14, *(f"{each:>8s}" for each in COLUMNS))
    for name, model, x in models():
        if options.network and name not in options.network:
            continue
        figures = row(model, x, torch.randint(3, (len(x),)), options.rounds)
        print(f"{name:14s} ", *(f"{each:8.2f}" for each in figures), flush=True)
        rows = [each for each in rows if each["network"] != name]
        rows.append(
            {"network": name, "rounds": options.rounds, **dict(zip(COLUMNS, figures, strict=True))}
        )
        if options.json:
            measure.write_results(options.json, "cpu", rows)


if __name__ == "__main__":
    main()
