"""Normalization by running statistics, which is linear in the input and in the weight."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tnconv.nn.memory.functions import Bilinear, Maybe, Shapes, sum_but


@dataclass(frozen=True, eq=False)
class Normalization:
    """``y[n, c, i] = (x[n, c, i] - mean[c]) / sqrt(var[c] + eps) w[c]``, by running statistics."""

    eps: float
    dtype: torch.dtype | None = None
    channel: int = 1
    reads_input: ClassVar[bool] = True

    def __call__(self, x: Tensor, w: Maybe, b: Maybe, mean: Tensor, var: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, w, b, False, 0.0, self.eps)

    def push(self, tangent_x: Tensor, w: Maybe, mean: Tensor, var: Tensor) -> Tensor:
        return self(tangent_x, w, None, torch.zeros_like(mean), var)

    def pull(
        self, v: Tensor, x: Maybe, w: Maybe, shapes: Shapes, mean: Tensor, var: Tensor
    ) -> tuple[Maybe, Maybe]:
        dx = dw = None
        mean, var = _wide(mean), _wide(var)
        scale = torch.rsqrt(var + self.eps)
        if shapes.needs[0]:
            dx = (v * _per_channel(scale if w is None else scale * w, v)).to(v.dtype)
        if x is not None:
            dw = sum_but(v * (x - _per_channel(mean, x)), self.channel) * scale
        return dx, dw


def _wide(t: Tensor) -> Tensor:
    """What torch's kernels compute in, where they are given half of it."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _per_channel(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.ndim - 2))


def normalization(x: Tensor, mean: Tensor, var: Tensor, w: Maybe, b: Maybe, eps: float) -> Tensor:
    """A batch normalization by running statistics; it stores x if w is differentiable."""
    y: Tensor = Bilinear.run(Normalization(eps), x, w, b, mean, var)
    return y
