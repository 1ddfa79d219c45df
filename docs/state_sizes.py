"""The page `state-sizes.md`: bytes of optimizers' states, from layers' shapes alone.

``python docs/state_sizes.py FILE`` writes it. Layers are made on the device "meta": nothing is
computed, and no parameter exists.
"""

import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from tnconv.optim import KFAC, SINGD, RFAdamW, RFShampoo

Layers = Iterator[nn.Module]


def resnet(bottleneck: bool, depths: tuple[int, ...]) -> Layers:
    """ResNet-18 and ResNet-50 (He et al. 2016)."""
    yield from _normed(3, 64, 7)
    channels = 64
    for width, depth in zip((64, 128, 256, 512), depths, strict=True):
        out = 4 * width if bottleneck else width
        for at in range(depth):
            if bottleneck:
                sizes = (channels, width, 1), (width, width, 3), (width, out, 1)
            else:
                sizes = (channels, width, 3), (width, width, 3)
            for size in sizes:
                yield from _normed(*size)
            if not at and channels != out:
                yield from _normed(channels, out, 1)
            channels = out
    yield nn.Linear(channels, 1000)


def _normed(inputs: int, outputs: int, kernel: int) -> Layers:
    yield nn.Conv2d(inputs, outputs, kernel, bias=False)
    yield nn.BatchNorm2d(outputs)


def vgg16() -> Layers:
    """VGG-16 (Simonyan and Zisserman 2015)."""
    widths = 3, 64, 64, 128, 128, *[256] * 3, *[512] * 6
    for inputs, outputs in pairwise(widths):
        yield nn.Conv2d(inputs, outputs, 3)
    for inputs, outputs in ((512 * 49, 4096), (4096, 4096), (4096, 1000)):
        yield nn.Linear(inputs, outputs)


def convnext_t() -> Layers:
    """ConvNeXt-T (Liu et al. 2022), without the scales of its blocks."""
    widths = 96, 192, 384, 768
    yield from (nn.Conv2d(3, 96, 4), nn.LayerNorm(96))
    for at, (width, depth) in enumerate(zip(widths, (3, 3, 9, 3), strict=True)):
        if at:
            yield from (nn.LayerNorm(widths[at - 1]), nn.Conv2d(widths[at - 1], width, 2))
        for _ in range(depth):
            yield from (nn.Conv2d(width, width, 7, groups=width), nn.LayerNorm(width))
            yield from (nn.Linear(width, 4 * width), nn.Linear(4 * width, width))
    yield from (nn.LayerNorm(768), nn.Linear(768, 1000))


def vit_b() -> Layers:
    """ViT-B/16 (Dosovitskiy et al. 2021), without its embeddings of positions."""
    yield nn.Conv2d(3, 768, 16)
    for _ in range(12):
        yield from (nn.LayerNorm(768), nn.Linear(768, 3 * 768), nn.Linear(768, 768))
        yield from (nn.LayerNorm(768), nn.Linear(768, 3072), nn.Linear(3072, 768))
    yield from (nn.LayerNorm(768), nn.Linear(768, 1000))


NETWORKS: dict[str, Callable[[], Layers]] = {
    "ResNet-18": lambda: resnet(False, (2, 2, 2, 2)),
    "ResNet-50": lambda: resnet(True, (3, 4, 6, 3)),
    "VGG-16": vgg16,
    "ConvNeXt-T": convnext_t,
    "ViT-B": vit_b,
}
STRUCTURES = "dense", "diagonal", "block_diagonal", "hierarchical", "lower_triangular"
STRUCTURES += "triangular_top_left", "triangular_toeplitz"
OPTIMIZERS: dict[str, Callable[[nn.Module], float]] = {
    "SGD with momentum": lambda model: 1.0,
    "AdamW": lambda model: 2.0,
    "RFAdamW": lambda model: RFAdamW(model.parameters(), batch_size=1).memory().ratio,
    "KFAC": lambda model: KFAC(model).memory().ratio,
    **{
        f"SINGD, {name}": lambda model, name=name: SINGD(model, structures=name).memory().ratio
        for name in STRUCTURES
    },
    "SINGD, hierarchical, α = 0": lambda model: (
        SINGD(model, structures="hierarchical", riemannian_momentum=0.0).memory().ratio
    ),
    **{
        f"RFShampoo, {name}": lambda model, name=name: (
            RFShampoo(model, structures=name).memory().ratio
        )
        for name in ("dense", "diagonal")
    },
}


def page() -> str:
    """A row for each optimizer, a column for each network."""
    with torch.device("meta"):
        models = {name: nn.Sequential(*make()) for name, make in NETWORKS.items()}
    millions = [
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}" for model in models.values()
    ]
    lines = [
        "# Sizes of optimizers' states\n",
        "Bytes of the state over bytes of the parameters, as `optimizer.memory().ratio` tells",
        "before the first step, from layers' shapes alone (this page is written by",
        "`python docs/state_sizes.py docs/state-sizes.md`). All have momentum, 1.0 of each",
        "number, and the defaults otherwise: `KFAC` keeps factors and their inverses, in blocks of",
        "at most 2048 rows; `SINGD` keeps K and C with a Riemannian momentum of each, so that",
        "without one (`α = 0`) structures take half of what is above 1; `RFShampoo` splits axes of",
        "more than 2048 rows.\n",
        f"| | {' | '.join(models)} |",
        f"|---|{'---|' * len(models)}",
        f"| million parameters | {' | '.join(millions)} |",
    ]
    for name, ratio in OPTIMIZERS.items():
        found = [f"{ratio(model):.2f}" for model in models.values()]
        lines.append(f"| {name} | {' | '.join(found)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
