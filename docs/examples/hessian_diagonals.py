"""Diagonals of the Hessian
========================

The exact diagonal costs many passes; HesScale approximates it in one beside the gradient's.
"""

import torch
from torch import nn

import tnconv
from tnconv import quantities

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
loss_fn = nn.CrossEntropyLoss()
x, y = torch.randn(32, 6), torch.randint(3, (32,))

# %%
# Each method against the exact diagonal, relative to its norm. In the last layer all that know the
# loss's Hessian are exact.
exact = tnconv.hessian_diagonal(model, loss_fn, x, y)
size = sum(float(each.abs().sum()) for each in exact.values())
for method in ("hesscale", "gn", "bl89"):
    found = tnconv.hesscale(model, loss_fn, x, y, method=method)
    error = sum(float((found[name] - exact[name]).abs().sum()) for name in exact)
    print(f"{method:>8}: error {error / size:.3f}")

# %%
# Beside other quantities, also for each sample.
result = tnconv.compute(model, loss_fn, x, y, [quantities.HesScale(), quantities.Variance()])
print(result)
