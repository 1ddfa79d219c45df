"""Watching a training run
=======================

The monitor shows gradients, their noise, curvature and step sizes while a network trains, on a
schedule, and says when something looks wrong.
"""

import torch
from torch import nn

from tnconv.monitor import Monitor

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x = torch.randn(256, 10)
y = x[:, :3].argmax(1)

# %%
# `economy` is one of the sets of quantities; the training step itself stays as it is.
monitor = Monitor(model, loss_fn, quantities="economy", every=2)
for start in range(0, 256, 32):
    with monitor.step():
        optimizer.zero_grad()
        loss_fn(model(x[start : start + 32]), y[start : start + 32]).backward()
        optimizer.step()

# %%
# Records are plain numbers and arrays, a dictionary for each step.
print(len(monitor.records), "records of", sorted(monitor.records[0]))
print([round(record["Loss"], 3) for record in monitor.records if "Loss" in record])
print("alerts:", [alert.title for _, alert in monitor.alerts] or "none")
