"""Gram matrices of patches without an unfolded input: a custom operation of torch.

On devices that Triton compiles for, kernels of our own compute the upper triangle from the input
itself and mirror it (decision 0030). Everywhere else the input is unfolded.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tnconv.codegen.kernels.launching import has_kernel, launched, may_launch
from tnconv.codegen.kernels.windows import Ints, Windows, gram_vjp, unfolded_gram


def patch_gram(
    x: Tensor,
    kernel_size: Ints,
    positions: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int = 1,
) -> Tensor:
    """``A[g, (c k), (c' k')] = Σ_{n,o} x[n, (g c), i(o, k)] x[n, (g c'), i(o, k')]``.

    Here ``i(o, k) = s·o + d·k - p``, in up to three dimensions, and x is zero outside. Sums are
    accumulated in float32, or float64 for float64. Products of float32 numbers are in TF32 only
    where torch's matrix products may be.

    Args:
        x: The input ``(n, (g c), *i)``, with any strides.
        kernel_size: Taps of a window in each dimension.
        positions: How many windows there are.
        stride: Steps between windows.
        padding: Zeros before the input; a negative number crops it.
        dilation: Steps between taps.
        groups: Groups of channels.

    >>> x = torch.ones(1, 1, 2, 4)
    >>> patch_gram(x, (1, 2), (2, 4), (1, 1), (0, 0), (1, 1))
    tensor([[[8., 6.],
             [6., 6.]]])
    """
    windows = Windows(kernel_size, positions, stride, padding, dilation, groups)
    if not has_kernel(x) or _is_transformed():
        return unfolded_gram(x, windows)
    lists = (list(each) for each in windows[:5])
    found: Tensor = torch.ops.tnconv.patch_gram(x, *lists, groups)
    return found


def _is_transformed() -> bool:
    """Whether torch.func transforms here, or derivatives are taken forwards.

    Custom operations have no rules for these.
    """
    forward = torch.autograd.forward_ad._current_level >= 0
    return forward or torch._C._are_functorch_transforms_active()


@torch.library.custom_op("tnconv::patch_gram", mutates_args=())
def operation(
    x: Tensor,
    kernel_size: Sequence[int],
    positions: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`patch_gram`, by our kernels where they can run."""
    windows = Windows(kernel_size, positions, stride, padding, dilation, groups)
    if has_kernel(x) and may_launch(x, windows):
        return launched(x, windows)
    return unfolded_gram(x, windows)


@operation.register_fake
def _(x: Tensor, *numbers: Any) -> Tensor:
    windows = Windows(*numbers)
    rows = windows.rows(x)
    return x.new_empty(windows.groups, rows, rows)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *numbers = inputs
    ctx.save_for_backward(x)
    ctx.windows = Windows(*numbers)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return gram_vjp(x, gradient, ctx.windows), *(None for _ in ctx.windows)


operation.register_autograd(_backward, setup_context=_save)
