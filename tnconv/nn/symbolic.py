"""Traces for every size: what layers do when a graph is recorded whose sizes are symbols."""

import torch
from torch import Tensor


def has_symbolic_sizes(x: Tensor) -> bool:
    """Whether ``torch.compile`` or ``torch.export`` records a call for more sizes than this one.

    A program belongs to one size. Layers then record torch's own operation, which is equal up to
    rounding, instead of one program for each size.
    """
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # imports sympy

    return not all(has_static_value(size) for size in x.shape)
