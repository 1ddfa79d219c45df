"""Convolutions that store for backward the weight, the input, both or nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tnconv.nn.memory.functions import Bilinear, Maybe, Shapes, aten, autocast_dtype, cast


@dataclass(frozen=True, eq=False)
class Convolution:
    """``y[n, gd, o] = Σ_{c,k,i} x[n, gc, i] Π[k, o, i] w[gd, c, k]``, or its transpose."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    dtype: torch.dtype | None = None
    channel: int = 1
    reads_input: ClassVar[bool] = True

    def __call__(self, x: Tensor, w: Maybe, b: Maybe = None) -> Tensor:
        settings = (self.stride, self.padding, self.dilation, self.transposed)
        y: Tensor = aten.convolution(x, w, b, *settings, self.output_padding, self.groups)
        return y

    def push(self, tangent_x: Tensor, w: Maybe) -> Tensor:
        return self(tangent_x, w)

    def pull(self, v: Tensor, x: Maybe, w: Maybe, shapes: Shapes) -> tuple[Maybe, Maybe]:
        assert shapes.w is not None
        if x is None and not self._placeholder(shapes):
            assert w is not None
            return self._adjoint(v, w, shapes.x), None
        x = v.new_empty(shapes.x) if x is None else x
        w = v.new_empty(shapes.w) if w is None else w
        settings = (self.stride, self.padding, self.dilation, self.transposed)
        needs = [*shapes.needs, False]
        rest = (*settings, self.output_padding, self.groups, needs)
        dx, dw, _ = aten.convolution_backward(v, x, w, None, *rest)
        return dx, dw

    def _placeholder(self, shapes: Shapes) -> bool:
        """Whether torch's gradient kernel is the faster one, although x has to be made up.

        It was, at equal peak memory, for single taps without a stride and for groups of channels.
        """
        assert shapes.w is not None
        single = set(shapes.w[2:]) | set(self.stride) == {1}
        return single or (self.groups > 1 and 1 not in shapes.w[:2])

    def _adjoint(self, v: Tensor, w: Tensor, x_shape: torch.Size) -> Tensor:
        """``dx[n, gc, i] = Σ_{d,o,k} v[n, gd, o] Π[k, o, i] w[gd, c, k]`` without x.

        A stride leaves out inputs, which a transposed convolution gives back as output padding.
        """
        extra = [0] * len(self.stride)
        if not self.transposed:
            sizes = zip(x_shape[2:], v.shape[2:], w.shape[2:], *self._geometry, strict=True)
            extra = [i - ((o - 1) * s + d * (k - 1) + 1 - 2 * p) for i, o, k, s, p, d in sizes]
        settings = (self.stride, self.padding, self.dilation, not self.transposed)
        dx: Tensor = aten.convolution(v, w, None, *settings, extra, self.groups)
        for dim, size in enumerate(x_shape[2:], 2):  # output padding can be a stride or more
            dx = dx.narrow(dim, 0, size) if dx.shape[dim] > size else dx
        return dx

    @property
    def _geometry(self) -> tuple[tuple[int, ...], ...]:
        return self.stride, self.padding, self.dilation


def convolution(
    x: Tensor,  # (n, g·c, *i) or (g·c, *i)
    w: Tensor,  # (g·d, c, *k), or (g·c, d, *k) if transposed
    b: Maybe,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_padding: Sequence[int] | None = None,
) -> Tensor:
    """A convolution, or with ``output_padding`` a transposed one, that stores what it needs."""
    if x.is_complex() and w.is_complex():
        settings = (stride, padding, dilation, groups, output_padding)
        return _complex(x, w, b, *settings)
    if x.ndim == w.ndim - 1:
        settings = (stride, padding, dilation, groups, output_padding)
        return convolution(x.unsqueeze(0), w, b, *settings).squeeze(0)
    transposed, extra = output_padding is not None, output_padding or [0] * len(stride)
    dtype = autocast_dtype(x)
    numbers = (tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(extra), groups)
    y: Tensor = Bilinear.run(Convolution(*numbers, dtype), cast(x, dtype), w, b)
    return y


def _complex(x: Tensor, w: Tensor, b: Maybe, *settings: Any) -> Tensor:
    """Three real ones: ``(x + iy)(w + iz) = (xw - yz) + i((x + y)(w + z) - xw - yz)``."""
    parts = (None, None) if b is None else (b.real, b.imag)
    both = None if b is None else b.real + b.imag
    real = convolution(x.real, w.real, parts[0], *settings)
    imag = convolution(x.imag, w.imag, parts[1], *settings)
    mixed = convolution(x.real + x.imag, w.real + w.imag, both, *settings)
    return torch.complex(real - imag, mixed - real - imag)
