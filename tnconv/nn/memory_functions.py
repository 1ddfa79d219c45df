"""Layers that are linear in input and weight: each is stored for the other's gradient alone."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

aten = torch.ops.aten
Maybe = Tensor | None


class Saving(Function):
    """What all functions here share: batching rules, and a tangent where torch can trace one.

    ``torch.compile`` takes no function with a ``jvp``, so that one sits in a subclass.
    """

    generate_vmap_rule = True

    @classmethod
    def run(cls, *args: object) -> Any:
        kind = cls if torch.compiler.is_compiling() else _with_tangent(cls)
        return kind.apply(*args)


@cache
def _with_tangent(cls: Any) -> Any:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        cls.setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(*(t for t in inputs if t is None or isinstance(t, Tensor)))

    methods = {"setup_context": staticmethod(setup_context), "jvp": staticmethod(cls.tangent)}
    return type(cls.__name__, (cls,), methods)


class Operation(Protocol):
    """``y = f(x, w) + b`` with f linear in w and affine in x, given constants that f reads."""

    @property
    def channel(self) -> int:
        """The dimension of y that b adds to."""

    @property
    def dtype(self) -> torch.dtype | None:
        """What the weight and the bias are cast to, at every use."""

    def __call__(self, x: Tensor, w: Maybe, b: Maybe, *constants: Tensor) -> Tensor: ...

    def push(self, tangent_x: Tensor, w: Maybe, *constants: Tensor) -> Tensor:
        """The linear part in x."""

    def pull(
        self, v: Tensor, x: Maybe, w: Maybe, shapes: "Shapes", *constants: Tensor
    ) -> tuple[Maybe, Maybe]:
        """The gradients for x (if w is there, or is nothing) and for w (if x is there)."""


@dataclass(frozen=True)
class Shapes:
    """What is known of operands that are not stored."""

    x: torch.Size
    w: torch.Size | None
    y: torch.Size
    needs: tuple[bool, bool]


class Bilinear(Saving):
    """Stores x if w is differentiable, w if x is, and for b nothing."""

    @staticmethod
    def forward(op: Operation, x: Tensor, w: Maybe, b: Maybe, *constants: Tensor) -> Tensor:
        return op(x, cast(w, op.dtype), cast(b, op.dtype), *constants)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        op, x, w, _, *constants = inputs
        dx, dw = ctx.needs_input_grad[1:3]
        w_shape = None if w is None else w.shape
        ctx.op, ctx.shapes = op, Shapes(x.shape, w_shape, output.shape, (dx, dw))
        constants = constants if dx or dw else [None] * len(constants)
        ctx.save_for_backward(x if dw else None, w if dx else None, *constants)

    @staticmethod
    def backward(ctx: Any, v: Maybe) -> tuple[Maybe, ...]:
        x, w, *constants = ctx.saved_tensors
        rest = (None,) * len(constants)
        if v is None:
            return None, None, None, None, *rest
        op, dx, dw = ctx.op, None, None
        with no_autocast(v):
            if any(ctx.shapes.needs):
                dx, dw = op.pull(v, x, cast(w, op.dtype), ctx.shapes, *constants)
            db = _sum_but(v, op.channel) if ctx.needs_input_grad[3] else None
        return None, dx, dw, db, *rest

    @staticmethod
    def tangent(ctx: Any, _: None, tx: Maybe, tw: Maybe, tb: Maybe, *__: None) -> Maybe:
        x, w, _, *constants = ctx.saved_tensors
        op, shape = ctx.op, ctx.shapes.y
        parts = [] if tx is None else [op.push(tx, cast(w, op.dtype), *constants)]
        parts += [] if tw is None else [op(x, cast(tw, op.dtype), None, *constants)]
        if tb is not None:
            ones = [1] * (len(shape) - 1 - op.channel % len(shape))
            parts.append(cast(tb, op.dtype).view(-1, *ones).expand(shape))
        return sum(parts[1:], start=parts[0]) if parts else None


def cast(t: Any, dtype: torch.dtype | None) -> Any:
    """As autocast does: other floating dtypes than float64."""
    if t is None or dtype is None or t.dtype == torch.float64 or not t.is_floating_point():
        return t
    return t.to(dtype)


def _sum_but(v: Tensor, channel: int) -> Tensor:
    """The sum over all dimensions but one."""
    dims = [dim for dim in range(v.ndim) if dim != channel % v.ndim]
    return v.sum(dims) if dims else v


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled else None


def no_autocast(v: Tensor) -> AbstractContextManager[object]:
    """Torch's gradient kernels run in their operands' dtypes, wherever backward is called."""
    if autocast_dtype(v) is None:
        return nullcontext()
    return torch.autocast(v.device.type, enabled=False)


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Linear:
    """``y[n, d] = Σ_c x[n, c] w[d, c]`` for any number of dimensions n."""

    dtype: torch.dtype | None = None
    channel: int = -1

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


@dataclass(frozen=True)
class Normalization:
    """``y[n, c, i] = (x[n, c, i] - mean[c]) / sqrt(var[c] + eps) w[c]``, by running statistics."""

    eps: float
    dtype: torch.dtype | None = None
    channel: int = 1

    def __call__(self, x: Tensor, w: Maybe, b: Maybe, mean: Tensor, var: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, w, b, False, 0.0, self.eps)

    def push(self, tangent_x: Tensor, w: Maybe, mean: Tensor, var: Tensor) -> Tensor:
        return self(tangent_x, w, None, torch.zeros_like(mean), var)

    def pull(
        self, v: Tensor, x: Maybe, w: Maybe, shapes: Shapes, mean: Tensor, var: Tensor
    ) -> tuple[Maybe, Maybe]:
        dx = dw = None
        scale = torch.rsqrt(var + self.eps)
        if shapes.needs[0]:
            dx = (v * _per_channel(scale if w is None else scale * w, v)).to(v.dtype)
        if x is not None:
            dw = _sum_but(v * (x - _per_channel(mean, x)), 1) * scale
        return dx, dw


def _per_channel(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.ndim - 2))


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


def linear(x: Tensor, w: Tensor, b: Maybe) -> Tensor:
    """A linear layer; under autocast too, it stores nothing of a frozen one."""
    dtype = autocast_dtype(x)
    y: Tensor = Bilinear.run(Linear(dtype), cast(x, dtype), w, b)
    return y


def normalization(x: Tensor, mean: Tensor, var: Tensor, w: Maybe, b: Maybe, eps: float) -> Tensor:
    """A batch normalization by running statistics; it stores x if w is differentiable."""
    y: Tensor = Bilinear.run(Normalization(eps), x, w, b, mean, var)
    return y
