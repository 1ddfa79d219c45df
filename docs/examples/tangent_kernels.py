"""Tangent kernels, and whether they describe a network
====================================================

A wide network trains like its linearisation, a kernel method. Whether a given network does is a
matter of measurement.
"""

import torch
from torch import nn

from tnconv import ntk

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 2))
x, targets = torch.randn(12, 1, 8, 8), torch.randn(12, 2)

# %%
# The kernel between all samples and outputs, or reduced over the outputs.
kernel = ntk.empirical_ntk(model, x)
print(tuple(kernel.shape), tuple(ntk.empirical_ntk(model, x, reduce="trace").shape))
print(f"effective rank {ntk.effective_rank(ntk.empirical_ntk(model, x, reduce='trace')):.2f}")

# %%
# Train, and compare: how far did the Jacobian move, and what does the linearised model miss?
before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
for _ in range(20):
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), targets).backward()
    optimizer.step()
drift = ntk.jacobian_drift(model, x, before)
print(f"the Jacobian moved by {drift.frobenius:.3f} (Frobenius norm)")
print(f"part that linearisation misses: {ntk.linearization_gap(model, before, x):.3f}")

# %%
# What gradient flow on the kernel predicts for the training data in the limit of long training.
outputs = model(x).detach()
predicted = ntk.ntk_predict(kernel, kernel, targets - outputs, outputs, ridge=0.1)
print(f"mean error of kernel regression: {(predicted.mean - targets).abs().mean():.3f}")
