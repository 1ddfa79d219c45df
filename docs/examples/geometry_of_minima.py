"""Sharpness that does not depend on how a network is written
==========================================================

Rescaling two layers of a ReLU network changes no output, but it changes the largest eigenvalue
of the Hessian. Measured with a metric that is carried along, sharpness stays.
"""

import torch
from torch import nn
from torch.func import functional_call

from tnconv.geometry import Euclidean, relu_rescale, sharpness

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
x, y = torch.randn(32, 4).double(), torch.randint(3, (32,))
loss_fn, point = nn.CrossEntropyLoss(), dict(model.named_parameters())

# %%
# A map of parameters: outgoing weights of one layer times ten, incoming ones of the next divided by
# ten.
# It is checked that the outputs stay the same.
rescale = relu_rescale(model, "0", "2", 10.0, x)
other = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
other.load_state_dict(rescale(point))
torch.testing.assert_close(functional_call(model, rescale(point), x), model(x))

# %%
# The same metric written down in both coordinates gives different eigenvalues ...
metric = Euclidean(point)
batches = [(x, y)]
before = sharpness(model, loss_fn, batches, metric, "max_eig")
naive = sharpness(other, loss_fn, batches, Euclidean(dict(other.named_parameters())), "max_eig")
print(f"largest eigenvalue {before:.4f}; after rescaling {naive:.4f}")

# %%
# ... and carried along by the map, the same one.
carried = metric.pushforward(rescale, point)
after = sharpness(other, loss_fn, batches, carried, "max_eig")
print(f"carried along {after:.4f}")
torch.testing.assert_close(before, after, rtol=1e-2, atol=0.0)
