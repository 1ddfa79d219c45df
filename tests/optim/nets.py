"""Small networks and training loops that the tests of optimizers share."""

import torch
from torch import Tensor, nn

from tnconv.optim import KFAC


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 25, 3),
    )


def batch(samples: int = 6) -> tuple[Tensor, Tensor]:
    return torch.rand(samples, 2, 5, 5), torch.randint(3, (samples,))


def train(
    model: nn.Module,
    optimizer: KFAC,
    steps: int,
    seed: int = 0,
    loss_fn: nn.Module | None = None,
) -> list[float]:
    """A plain loop over random batches from a seed; the losses."""
    torch.manual_seed(seed)
    loss_fn, losses = loss_fn or nn.CrossEntropyLoss(), []
    for _ in range(steps):
        x, y = batch()
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def factors(optimizer: KFAC, *weights: Tensor) -> list[Tensor]:
    """A and B of some parameters."""
    return [optimizer.state[weight][name] for weight in weights for name in "AB"]
