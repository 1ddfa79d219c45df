"""The Gauss-Newton matrix of a batch by its low rank
==================================================

With n samples and c classes, the Gauss-Newton matrix of a batch has rank n·c at most, however many
parameters there are. Its spectrum is that of a Gram matrix of this size.
"""

import torch
from torch import nn

import tnconv

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
loss_fn = nn.CrossEntropyLoss()
x, y = torch.randn(16, 1, 8, 8), torch.randint(3, (16,))

# %%
# Eigenvalues, and eigenvectors in the parameters' shapes.
ggn = tnconv.low_rank_ggn(model, loss_fn, x, y)
print(ggn)
print("leading eigenvalues", [f"{value:.3g}" for value in ggn.eigvalsh()[:4].tolist()])
pairs = ggn.eigh(k=2)
print(pairs)
print({name: tuple(vectors.shape) for name, vectors in pairs.vectors.items()})

# %%
# Slopes and curvatures of every sample along these directions: signal and noise of each.
along = ggn.directional_derivatives(pairs)
print(along)
print("curvature over its deviation", (along.curvatures.mean(0) / along.curvatures.std(0)).tolist())

# %%
# A damped Newton step in their span, and sampled columns where the exact ones are too many.
step = ggn.newton_step(1e-2)
print({name: tuple(value.shape) for name, value in step.items()})
cheap = tnconv.low_rank_ggn(model, loss_fn, x, y, fisher="mc", samples=1)
print("of 16 columns", [f"{value:.3g}" for value in cheap.eigvalsh()[:2].tolist()])
