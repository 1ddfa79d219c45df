"""Linear layers that store for backward the weight, the input, both or nothing."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tnconv.nn.memory.functions import Bilinear, Maybe, Shapes, autocast_dtype, cast


@dataclass(frozen=True, eq=False)
class Linear:
    """``y[n, d] = Σ_c x[n, c] w[d, c]`` for any number of dimensions n."""

    dtype: torch.dtype | None = None
    channel: int = -1
    reads_input: ClassVar[bool] = True

    def __call__(self, x: Tensor, w: Maybe, b: Maybe = None) -> Tensor:
        assert w is not None
        return F.linear(x, w, b)

    def push(self, tangent_x: Tensor, w: Maybe) -> Tensor:
        return self(tangent_x, w)

    def pull(self, v: Tensor, x: Maybe, w: Maybe, shapes: Shapes) -> tuple[Maybe, Maybe]:
        dx = None if w is None else v @ w.conj()
        dw = None if x is None else _rows(v).mT @ _rows(x).conj()
        return dx, dw


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def linear(x: Tensor, w: Tensor, b: Maybe) -> Tensor:
    """A linear layer; under autocast too, it stores nothing of a frozen one."""
    dtype = autocast_dtype(x)
    y: Tensor = Bilinear.run(Linear(dtype), cast(x, dtype), w, b)
    return y
