"""What a step holds under activation checkpointing: ``python -m benchmarks.checkpoints [JSON]``.

Peak bytes of a training step of 24 convolutions, by torch's own account of its allocations: with
SGD and with KFAC, plain and with every four layers in a non-reentrant checkpoint. KFAC keeps the
inputs of layers as the graph keeps what it saved, so that they are freed, and recomputed, with a
checkpoint's segment; before the first factors there are no inverses, so the third step is measured.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.kfac_step import step_of
from benchmarks.measure import peak_memory
from tnconv.optim import KFAC

LAYERS, SEGMENT, CHANNELS = 24, 4, 16
BATCH, SIZE = 32, 32


class Deep(nn.Module):
    """Convolutions of one size, in segments."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.segments = nn.ModuleList(
            nn.Sequential(
                *(each for _ in range(SEGMENT)
                  for each in (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU()))
            )
            for _ in range(LAYERS // SEGMENT)
        )  # fmt: skip
        self.head = nn.Linear(CHANNELS, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for segment in self.segments:
            x = checkpoint(segment, x, use_reentrant=False) if self.checkpointed else segment(x)
        found: Tensor = self.head(x.mean((2, 3)))
        return found


def sgd(model: nn.Module, loss_fn: nn.Module) -> torch.optim.Optimizer:
    """Without curvature."""
    return torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)


def kfac(fisher: str) -> Callable[[nn.Module, nn.Module], torch.optim.Optimizer]:
    """With factors in every step."""

    def made(model: nn.Module, loss_fn: nn.Module) -> torch.optim.Optimizer:
        return KFAC(model, 1e-3, fisher=fisher, loss_fn=loss_fn)  # type: ignore[arg-type]

    return made


OPTIMIZERS = {
    "SGD": sgd,
    "KFAC, empirical": kfac("empirical"),
    "KFAC, sampled columns": kfac("mc"),
}


def peak(name: str, checkpointed: bool) -> float:
    """MiB of the third step."""
    torch.manual_seed(0)
    model, loss_fn = Deep(checkpointed), nn.CrossEntropyLoss()
    x, y = torch.rand(BATCH, 3, SIZE, SIZE), torch.randint(10, (BATCH,))
    step = step_of(model, OPTIMIZERS[name](model, loss_fn), loss_fn, x, y)
    step(), step()
    return peak_memory(step) / 2**20


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {}
    for name in OPTIMIZERS:
        plain, saved = (peak(name, checkpointed) for checkpointed in (False, True))
        found[name] = {"plain": plain, "checkpointed": saved}
        print(f"{name:24s} {plain:6.0f} MiB, with checkpoints {saved:6.0f} MiB", flush=True)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
