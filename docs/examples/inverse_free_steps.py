"""Second-order steps without inverses: SINGD
==========================================

KFAC inverts its factors, which takes single precision. SINGD updates square roots of the inverses
by products alone, and the roots can be structured: diagonal, block-diagonal, hierarchical, ...
"""

import torch
from torch import nn

from tnconv.optim import SINGD

torch.manual_seed(0)
images = torch.randn(256, 1, 8, 8)
labels = (images[:, 0, :4].mean((1, 2)) > images[:, 0, 4:].mean((1, 2))).long()


def train(**options: object) -> tuple[list[float], SINGD]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    optimizer, losses = SINGD(model, lr=0.05, **options), []
    for start in range(0, 256, 64):
        batch = slice(start, start + 64)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(round(loss.item(), 3))
    return losses, optimizer


# %%
# A structure for the factor of inputs and one for that of gradients.
for structures in (("dense", "dense"), ("hierarchical", "diagonal"), ("diagonal", "diagonal")):
    losses, optimizer = train(structures=structures)
    print(structures, losses)

# %%
# What the factors hold can be asked before the first step.
print(optimizer.memory())
