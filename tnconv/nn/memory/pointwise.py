"""Activations and dropout: known results, and the least that determines their gradients.

The result is computed by torch, outside of differentiation; a function here gives it its gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnconv.nn.memory.functions import Maybe, Saving, aten, keep


def packed(mask: Tensor) -> Tensor:
    """Eight entries to a byte."""
    flat = mask.reshape(-1).to(torch.uint8)
    entries = flat.shape[0]  # where it is symbolic, len() would fix it
    columns = (entries + 7) // 8
    rows = F.pad(flat, (0, 8 * columns - entries)).view(8, columns)
    bits = rows[0]
    for at in range(1, 8):
        bits = bits | rows[at] << at
    return bits


def unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `packed`, with entries 0 and 1."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)[:, None]
    return (bits >> places & 1).view(-1)[: shape.numel()].view(shape)


class Gate(Saving):
    """``dx = on v`` where the mask is set, ``dx = off v`` elsewhere; stores one bit an entry."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, bits: Tensor, on: float, off: float) -> Tensor:
        return y.detach()  # no view: it may be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, bits, ctx.on, ctx.off = inputs
        ctx.shape = x.shape
        keep(ctx, bits)

    @staticmethod
    def backward(ctx: Any, v: Maybe) -> tuple[Maybe, ...]:
        (bits,) = ctx.saved_tensors
        dx = None if v is None else _gated(v, bits, ctx.on, ctx.off)
        return dx, None, None, None, None

    @staticmethod
    def tangent(ctx: Any, tx: Maybe, *_: Maybe) -> Maybe:
        (bits,) = ctx.saved_tensors
        return None if tx is None else _gated(tx, bits, ctx.on, ctx.off)


def _gated(v: Tensor, bits: Tensor, on: float, off: float) -> Tensor:
    """What is switched off is zero, be it infinite."""
    mask = unpacked(bits, v.shape).to(v.dtype)
    if off:
        return v * (off + (on - off) * mask)
    dx: Tensor = aten.threshold_backward(v, mask, 0)
    return dx if on == 1 else dx * on


class FromOutput(Saving):
    """``dx = v f'(x)`` where y = f(x) determines f'(x); stores y."""

    entrywise = True

    @staticmethod
    def forward(x: Tensor, y: Tensor, name: str, *settings: float) -> Tensor:
        return y.detach()  # no view: it may be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.rule, *ctx.settings = inputs
        keep(ctx, output)

    @staticmethod
    def backward(ctx: Any, v: Maybe) -> tuple[Maybe, ...]:
        (y,) = ctx.saved_tensors
        dx = None if v is None else _DERIVATIVES[ctx.rule](v, y, *ctx.settings)
        return dx, *(None,) * (2 + len(ctx.settings))

    @staticmethod
    def tangent(ctx: Any, tx: Maybe, *_: Maybe) -> Maybe:
        (y,) = ctx.saved_tensors
        return None if tx is None else _DERIVATIVES[ctx.rule](tx, y, *ctx.settings)


def _elu(v: Tensor, y: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
    dx: Tensor = aten.elu_backward(v, alpha, scale, input_scale, True, y)
    return dx


def _leaky_relu(v: Tensor, y: Tensor, slope: float) -> Tensor:
    dx: Tensor = aten.leaky_relu_backward(v, y, slope, True)
    return dx


def _softplus(v: Tensor, y: Tensor, beta: float, threshold: float) -> Tensor:
    """``y = log(1 + exp(beta x)) / beta``, thus ``dy/dx = 1 - exp(-beta y)``."""
    return v * torch.where(y * beta > threshold, 1.0, -torch.expm1(-beta * y))


_DERIVATIVES: dict[str, Callable[..., Tensor]] = {
    "elu": _elu,
    "leaky_relu": _leaky_relu,
    "softplus": _softplus,
}


def slope_from_output(rule: str, y: Tensor, *settings: float) -> Tensor:
    """``f'(x)`` of an activation, where ``y = f(x)``."""
    return _DERIVATIVES[rule](torch.ones_like(y), y, *settings)
