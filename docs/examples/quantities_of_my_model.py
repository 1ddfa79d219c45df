"""Quantities of a model
=====================

Per-sample gradients, their variance, curvature diagonals and Kronecker factors, from one call.
"""

import torch
from torch import nn

import tnconv
from tnconv import quantities

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
x, y = torch.randn(16, 3, 8, 8), torch.randint(10, (16,))
loss = nn.CrossEntropyLoss()

# %%
# What is asked for together shares one forward and one backward pass.
asked = [quantities.SquaredNorms(), quantities.Variance(), quantities.KFAC("reduce")]
result = tnconv.compute(model, loss, x, y, asked)
for name, variance in result[quantities.Variance].items():
    print(name, tuple(variance.shape), f"mean variance {variance.mean():.2e}")
print("norms of the samples' gradients", result.total(quantities.SquaredNorms).sqrt()[:4])
print([tuple(factor.shape) for factor in result[quantities.KFAC]["0.weight"]])

# %%
# In a loop of one's own, the same quantities are watched around it.
with tnconv.observe(model, [quantities.SecondMoment()]) as observation:
    loss(model(x), y).backward()
print([tuple(value.shape) for value in observation.result()[quantities.SecondMoment].values()])

# %%
# Matrices of the whole network are operators.
ggn = tnconv.GGNOperator(model, loss, [(x, y)])
v = torch.randn(ggn.shape[1])
print(ggn.shape, f"v'Gv = {v @ (ggn @ v):.4f}")
