"""Tensor dropout on All-CNN-C: the error of the gradient against the memory that it saves.

Run as ``python -m benchmarks.tensor_dropout --json results.json --plot plot.svg`` (extras ``demo``
and ``plots``); ``--help`` lists the options. Inputs are patches of 32 pixels from the photographs
that come with scikit-learn, of random places and labels; the network learns for ``--steps`` steps
first. A row is a keep rate and the indices sampled: in-channels, or rows and columns jointly, at
the root of the rate each. Its error is ``‖g' - g‖ / ‖g‖`` for the concatenated gradients of the
convolutions' weights, the median over draws; its memory is what autograd stores in a forward pass,
each storage once and without parameters, over that of the same network without sampling.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.images import patches
from benchmarks.models import PROBLEMS
from tnconv.nn import save_memory, tensor_dropout

RATES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
INDICES: Mapping[str, tuple[str, ...]] = {
    "channels": ("in_channels",),
    "space": ("rows", "columns"),
}


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradients of all weights but biases, concatenated."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    loss = nn.functional.cross_entropy(model(x), y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])


def stored(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd stores in a forward pass."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found, alive = dict[int, int](), list[Tensor]()

    def pack(t: Tensor) -> Tensor:
        alive.append(t)
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(x)
    del output
    return sum(found.values())


def trained(options: argparse.Namespace, generator: torch.Generator) -> nn.Module:
    """The network after some steps of SGD."""
    model = PROBLEMS["allcnnc"].model().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    for _ in range(options.steps):
        x = patches(options.batch, 32, generator)
        y = torch.randint(100, (options.batch,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def row(
    model: nn.Module, x: Tensor, y: Tensor, kind: str, rate: float, options: argparse.Namespace
) -> dict[str, Any]:
    """One keep rate of one kind of sampling."""
    indices = INDICES[kind]
    keep = {index: rate ** (1 / len(indices)) for index in indices}
    sampled = tensor_dropout(save_memory(model), keep, options.sampling)
    exact = gradient(model, x, y)
    errors = [
        float((gradient(sampled, x, y) - exact).norm() / exact.norm()) for _ in range(options.draws)
    ]
    whole = stored(save_memory(model), x)
    memory = median(stored(sampled, x) for _ in range(5)) / whole
    return {"indices": kind, "keep": rate, "error": median(errors), "memory": memory}


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Errors against keep rates, and against memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, at, words in zip(axes, ("keep", "memory"), ("keep rate", "stored memory"), strict=True):
        for kind in INDICES:
            own = [each for each in rows if each["indices"] == kind]
            ax.plot([each[at] for each in own], [each["error"] for each in own], "o-", label=kind)
        ax.set_xlabel(f"{words}, relative to no sampling" if at == "memory" else words)
        ax.set_yscale("log")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("relative error of the gradient")
    axes[0].legend(title="sampled indices")
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20, help="of training before")
    parser.add_argument("--sampling", choices=("bernoulli", "fixed"), default="bernoulli")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = trained(options, generator)
    x = patches(options.batch, 32, generator)
    y = torch.randint(100, (options.batch,), generator=generator)
    rows = []
    for kind in INDICES:
        for rate in RATES:
            rows.append(row(model, x, y, kind, rate, options))
            words = "{indices:>9} keep {keep:.2f} error {error:.3f} memory {memory:.3f}"
            print(words.format(**rows[-1]), flush=True)
    if options.json:
        names = ("batch", "draws", "steps", "sampling")
        settings = {name: getattr(options, name) for name in names}
        measure.write_results(options.json, "cpu", rows, settings=settings)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
