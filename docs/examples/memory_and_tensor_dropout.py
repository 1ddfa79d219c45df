"""Less memory: layers that store what is needed, and tensor dropout
=================================================================

Torch stores the input of every layer, also where the layer is frozen. `save_memory` swaps layers
in that store what the requested gradients need; tensor dropout stores a part, and the gradient is
right on average.
"""

import torch
from torch import nn

import tnconv


def stored(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that a forward pass leaves for the backward pass, each tensor once."""
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(kept.values())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)]
    return nn.Sequential(*convolutions)


# %%
# Fine-tuning: only the first layer learns, so that the inputs of the others need not be stored.
x, model = torch.randn(8, 16, 32, 32), network()
for layer in model[1:]:
    layer.requires_grad_(False)
before = stored(model, x)
after = stored(tnconv.nn.save_memory(model), x)
print(f"stored {before:,} bytes, and {after:,} with save_memory")
assert after < before

# %%
# Tensor dropout: a quarter of the positions of the channels.
full = network()
dropped = tnconv.nn.tensor_dropout(network(), keep=0.25)
print(f"stored {stored(full, x):,} bytes, and {stored(dropped, x):,} with tensor dropout")
