"""Vector-Jacobian products of several outputs at once, through autograd's engine.

The first ``torch.autograd.grad(outputs, inputs, vectors)`` of a process imports sympy, which takes
33 MiB and half a second (torch 2.13). Gradients of one number need no vectors, and import nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge


class _Ended(torch.autograd.Function):
    """A number whose gradients in the outputs are the vectors."""

    @staticmethod
    def forward(ctx: Any, vectors: Sequence[Tensor], *outputs: Tensor) -> Tensor:
        ctx.vectors = vectors
        return outputs[0].new_zeros((), dtype=torch.float32)  # real, whatever the outputs are

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.vectors


def vector_products(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor | GradientEdge],
    vectors: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """``Σ_k v_kᵀ dy_k/dx`` for each input x, None where no output depends on it; graphs stay."""
    with torch.enable_grad():
        number: Any = _Ended.apply(vectors, *outputs)  # type: ignore[no-untyped-call]
    ends: Any = inputs  # of both kinds
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        number, ends, retain_graph=True, allow_unused=True
    )
    return found
