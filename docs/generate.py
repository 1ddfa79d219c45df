"""Pages that come from the code: the gallery of diagrams, and what is known of layers and losses.

``python docs/generate.py FOLDER`` writes them; so does every build of the documentation.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import result_pages
import torch
from torch import Tensor, nn

import tnconv
from tnconv import diagrams, quantities
from tnconv.diagrams import Expression
from tnconv.simplify import simplify

X, W, Y = (8, 4, 16, 16), (6, 4, 3, 3), (8, 6, 16, 16)
LAYER = diagrams.conv(X, W, padding=1)
GALLERY: dict[str, Callable[[], Expression]] = {
    "convolution": lambda: LAYER,
    "transposed convolution": lambda: diagrams.conv_transpose(X, (4, 3, 2, 2), stride=2),
    "linear layer": lambda: diagrams.linear((8, 5, 4), (6, 4)),
    "layer with bias": lambda: diagrams.with_bias(LAYER),
    "unfolded input (im2col)": lambda: diagrams.unfold(X, 3, padding=1),
    "folded patches (col2im)": lambda: diagrams.fold((8, 36, 256), (16, 16), 3, padding=1),
    "unfolded kernel (Toeplitz)": lambda: diagrams.unfolded_kernel((4, 16), (6, 4, 3)),
    "average pooling": lambda: diagrams.avg_pool(X, 2),
    "reflecting padding": lambda: diagrams.pad((2, 3, 8), 1, "reflect"),
    "gradient of the weight": lambda: LAYER.vjp("weight"),
    "gradient of the input": lambda: LAYER.vjp("x"),
    "per-sample gradients": lambda: LAYER.vjp("weight", per_sample=True),
    "Jacobian": lambda: diagrams.linear((8, 3), (4, 3)).jacobian("weight"),
    "squared norms of per-sample gradients": lambda: diagrams.gradient_norms(LAYER),
    "Gram matrix of per-sample gradients": lambda: diagrams.gradient_dots(LAYER),
    "Gauss-Newton diagonal": lambda: diagrams.ggn_diagonal(LAYER, vectors=5),
    "Gauss-Newton block": lambda: diagrams.ggn_block(LAYER, vectors=5),
    "Gauss-Newton vector product": lambda: diagrams.ggn_vector_product(LAYER, vectors=5),
    "neural tangent kernel": lambda: diagrams.ntk_block(LAYER, LAYER),
    "backpropagated diagonal": lambda: diagrams.diagonal_vjp(LAYER),
    "KFAC-expand factor of inputs": lambda: diagrams.kfac_expand(X, 3, padding=1),
    "KFAC-reduce factor of inputs": lambda: diagrams.kfac_reduce(X, 3, padding=1),
    "KFAC-reduce factor of a patch embedding": lambda: diagrams.kfac_reduce(X, 4, stride=4),
    "KFAC-expand factor of gradients": lambda: diagrams.grad_expand(Y),
    "KFAC-reduce factor of gradients": lambda: diagrams.grad_reduce(Y),
}

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "Conv1d": (lambda: nn.Conv1d(3, 4, 3), (4, 3, 9)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3), (4, 3, 6, 6)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), (4, 2, 4, 4, 3)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 3, 2), (4, 2, 3, 3)),
    "BatchNorm2d (evaluation)": (lambda: nn.BatchNorm2d(3).eval(), (4, 3, 2, 2)),
    "LayerNorm": (lambda: nn.LayerNorm(5), (4, 3, 5)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (4, 4, 5)),
    "RMSNorm": (lambda: nn.RMSNorm(5), (4, 3, 5)),
    "PReLU": (lambda: nn.PReLU(), (4, 5)),
    "GRU": (lambda: _First(nn.GRU(5, 3, batch_first=True)), (4, 6, 5)),
    "MultiheadAttention": (lambda: _Self(nn.MultiheadAttention(4, 2, batch_first=True)), (4, 3, 4)),
}
LOSSES: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "MSELoss": (nn.MSELoss(), torch.randn_like),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(), lambda y: torch.zeros(len(y), dtype=torch.int64)),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(), torch.rand_like),
    "NLLLoss": (nn.NLLLoss(), lambda y: torch.zeros(len(y), dtype=torch.int64)),
    "L1Loss": (nn.L1Loss(), torch.randn_like),
    "SmoothL1Loss": (nn.SmoothL1Loss(), torch.randn_like),
    "PoissonNLLLoss": (nn.PoissonNLLLoss(), torch.rand_like),
    "KLDivLoss": (nn.KLDivLoss(reduction="batchmean"), torch.rand_like),
}
QUANTITIES = ("Gradient", "PerSampleGradients", "SquaredNorms", "DotProducts", "SumOfSquares")
QUANTITIES += ("SecondMoment", "Variance", "GGNDiagonal", "HesScale", "KFAC", "KFLR")


class _First(nn.Module):
    """The first of several outputs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.module(x)[0]
        return first


class _Self(_First):
    """Attention of a sequence to itself."""

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.module(x, x, x, need_weights=False)[0]
        return first


def write(folder: Path) -> None:
    """All generated pages."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    (folder / "gallery.md").write_text(gallery(folder / "pictures"))
    (folder / "coverage.md").write_text(coverage())
    (folder / "results.md").write_text(result_pages.results())


def gallery(pictures: Path) -> str:
    """Every diagram: picture, equation, simplified picture, source, and a call."""
    parts = [
        "# Gallery of diagrams\n",
        "Each picture, equation and program is made by the library.",
    ]
    return "\n".join([*parts, *(section(name, make, pictures) for name, make in GALLERY.items())])


def section(name: str, make: Callable[[], Expression], pictures: Path) -> str:
    network, stem = make(), "".join(c if c.isalnum() else "_" for c in name)
    program = tnconv.compile(network)
    simplified = simplify(network).views
    drawn = [
        network.draw(pictures / f"{stem}.svg"),
        simplified.draw(pictures / f"{stem}_after.svg"),
    ]
    operands = ", ".join(f"{n}=torch.rand{shape}" for n, shape in network.operands.items())
    given = {n: torch.rand(shape) for n, shape in network.operands.items()}
    y = program(**given)
    assert y.shape == network.shape
    images = [f"![{name}](pictures/{path.name})" for path in drawn]
    return (
        f"\n## {name[:1].upper()}{name[1:]}\n\n```text\n{network}\n```\n\n{images[0]}\n\n"
        f"Simplified:\n\n```text\n{simplified}\n```\n\n{images[1]}\n\n"
        f"```python\n{program.source}```\n\n"
        f"`contraction({operands}).shape` is `{tuple(y.shape)}`.\n"
    )


def coverage() -> str:
    """Tables that are found out by trying."""
    parts = [
        "# Coverage\n",
        "Found out by trying, when this page was made: ✓ stands for a result, ✗ for a refusal in "
        "words. A layer without a diagram runs again for each sample (slow, and said so) where a "
        "quantity allows it.\n",
        "## Layers and quantities\n",
        _table({name: dict(_tried_layer(*row)) for name, row in LAYERS.items()}),
        "## Losses and quantities\n",
        _table({name: dict(_tried_loss(*row)) for name, row in LOSSES.items()}),
    ]
    return "\n".join(parts)


def _table(rows: Mapping[str, Mapping[str, bool]]) -> str:
    head = [f"| | {' | '.join(QUANTITIES)} |", f"|---|{'---|' * len(QUANTITIES)}"]
    body = [
        f"| {name} | {' | '.join('✓' if found[q] else '✗' for q in QUANTITIES)} |"
        for name, found in rows.items()
    ]
    return "\n".join([*head, *body, ""])


def _tried_layer(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> Iterator[tuple[str, bool]]:
    x = torch.rand(shape)
    for name in QUANTITIES:
        model = nn.Sequential(make(), nn.Flatten())
        yield name, _works(model, nn.MSELoss(), x, torch.rand_like(model(x).detach()), name)


def _tried_loss(loss: nn.Module, targets: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, bool]]:
    x, model = torch.rand(4, 5), nn.Linear(5, 3)
    for name in QUANTITIES:
        yield name, _works(model, loss, x, targets(model(x).detach()), name)


def _works(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, name: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = tnconv.compute(model, loss, x, y, [getattr(quantities, name)()])
        except (ValueError, TypeError, NotImplementedError, RuntimeError):
            return False
    return any(len(values) for values in found.values.values())


if __name__ == "__main__":
    write(Path(sys.argv[1]))
