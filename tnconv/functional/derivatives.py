"""Derivatives of layers, applied to a cotangent."""

from collections.abc import Sequence

import torch

from tnconv.diagrams.geometry import IntOrTuple, Padding
from tnconv.functional.programs import run


def weight_vjp(
    x: torch.Tensor,  # (n, g·c, *i)
    weight_shape: Sequence[int],  # (g·d, c, *k)
    grad_output: torch.Tensor,  # (n, g·d, *o)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> torch.Tensor:
    """``dw[gd, c, k] = Σ_{n,o,i} x[n, gc, i] Π[k, o, i] v[n, gd, o]``.

    >>> weight_vjp(torch.rand(8, 3, 32, 32), (4, 3, 3, 3), torch.rand(8, 4, 30, 30)).shape
    torch.Size([4, 3, 3, 3])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    settings = (x.shape, weight_shape, stride, padding, dilation, groups)
    return run("weight_vjp", settings, x, grad_output)


def per_sample_weight_grad(
    x: torch.Tensor,  # (n, g·c, *i)
    weight_shape: Sequence[int],  # (g·d, c, *k)
    grad_output: torch.Tensor,  # (n, g·d, *o)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> torch.Tensor:
    """``dw[n, gd, c, k] = Σ_{o,i} x[n, gc, i] Π[k, o, i] v[n, gd, o]``.

    >>> per_sample_weight_grad(torch.rand(8, 3, 9), (4, 3, 3), torch.rand(8, 4, 7)).shape
    torch.Size([8, 4, 3, 3])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    settings = (x.shape, weight_shape, stride, padding, dilation, groups)
    return run("per_sample_weight_grad", settings, x, grad_output)


def input_vjp(
    input_shape: Sequence[int],  # (n, g·c, *i)
    weight: torch.Tensor,  # (g·d, c, *k)
    grad_output: torch.Tensor,  # (n, g·d, *o)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> torch.Tensor:
    """``dx[n, gc, i] = Σ_{d,k,o} w[gd, c, k] Π[k, o, i] v[n, gd, o]``.

    >>> input_vjp((8, 3, 32, 32), torch.rand(4, 3, 3, 3), torch.rand(8, 4, 30, 30)).shape
    torch.Size([8, 3, 32, 32])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    settings = (input_shape, weight.shape, stride, padding, dilation, groups)
    return run("input_vjp", settings, grad_output, weight)
