"""KFAC in a training loop of one's own
====================================

The optimizer is dropped into an ordinary loop; its variants are options.
"""

import inspect

import torch
from torch import nn

from tnconv.optim import KFAC

torch.manual_seed(0)
images = torch.randn(256, 1, 8, 8)
labels = (images[:, 0, :4].mean((1, 2)) > images[:, 0, 4:].mean((1, 2))).long()


def network() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 2)]
    return nn.Sequential(*layers)


def train(**options: object) -> list[float]:
    """Nothing in the loop is particular to KFAC but the optimizer."""
    model, losses = network(), []
    optimizer = KFAC(model, **options)
    for start in range(0, 256, 64):
        optimizer.zero_grad()
        batch = slice(start, start + 64)
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %%
# The defaults, and what can be chosen.
print("KFAC", train())
print(*inspect.signature(KFAC).parameters, sep=", ")

# %%
# EKFAC: the eigenvalues of the factors are replaced by second moments in their eigenbasis.
print("EKFAC", train(inverse="ekfac"))
