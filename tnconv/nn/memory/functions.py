"""What is linear in input and weight: each is stored for the other's gradient alone."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

aten = torch.ops.aten
Maybe = Tensor | None


class Saving(Function):
    """What all functions here share: batching rules, and a tangent where torch can trace one.

    ``torch.compile`` takes no function with a ``jvp``, so that one sits in a subclass.
    """

    generate_vmap_rule = True
    entrywise = False  # whether it is a function of single entries, each by itself

    @classmethod
    def run(cls, *args: object) -> Any:
        kind = cls if torch.compiler.is_compiling() else _with_tangent(cls)
        return kind.apply(*args)


@cache
def _with_tangent(cls: Any) -> Any:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        cls.setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)

    methods = {"setup_context": staticmethod(setup_context), "jvp": staticmethod(cls.tangent)}
    return type(cls.__name__, (cls,), methods)


def keep(ctx: Any, *tensors: Maybe, with_tangents: tuple[Maybe, ...] = ()) -> None:
    """Store what backward needs, and what tangents need where there can be any.

    Then both lists have to be the same one: torch's batching rule knows the batched dimensions of
    the last list alone.
    """
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        tensors = with_tangents or tensors
        ctx.save_for_forward(*tensors)
    ctx.save_for_backward(*tensors)


class Operation(Protocol):
    """``y = f(x, w) + b`` with f linear in w and affine in x, given constants that f reads.

    Operations are equal by identity: before torch 2.13, dynamo hashes a callable while it is built,
    when a dataclass has no fields to hash yet.
    """

    @property
    def channel(self) -> int:
        """The dimension of y that b adds to."""

    @property
    def reads_input(self) -> bool:
        """Whether the weight's gradient needs x itself, not constants alone."""

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
    """Stores x if w is differentiable and needs it, w if x is, and for b nothing."""

    @staticmethod
    def forward(op: Operation, x: Tensor, w: Maybe, b: Maybe, *constants: Tensor) -> Tensor:
        y = op(x, cast(w, op.dtype), cast(b, op.dtype), *constants)
        return y.detach()  # no view: it may be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        op, x, w, _, *constants = inputs
        dx, dw = ctx.needs_input_grad[1:3]
        w_shape = None if w is None else w.shape
        ctx.op, ctx.shapes = op, Shapes(x.shape, w_shape, output.shape, (dx, dw))
        needed = constants if dx or dw else [None] * len(constants)
        operands = (x if dw and op.reads_input else None, w if dx else None)
        keep(ctx, *operands, *needed, with_tangents=(x, w, *constants))

    @staticmethod
    def backward(ctx: Any, v: Maybe) -> tuple[Maybe, ...]:
        x, w, *constants = ctx.saved_tensors
        rest = (None,) * len(constants)
        if v is None:
            return None, None, None, None, *rest
        op, shapes, dx, dw = ctx.op, ctx.shapes, None, None
        with no_autocast(v):
            if any(shapes.needs):
                x, w = x if shapes.needs[1] else None, w if shapes.needs[0] else None
                dx, dw = op.pull(v, x, cast(w, op.dtype), shapes, *constants)
            db = sum_but(v, op.channel) if ctx.needs_input_grad[3] else None
        return None, dx, dw, db, *rest

    @staticmethod
    def tangent(ctx: Any, _: None, tx: Maybe, tw: Maybe, tb: Maybe, *__: None) -> Maybe:
        x, w, *constants = ctx.saved_tensors
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


def sum_but(v: Tensor, channel: int) -> Tensor:
    """The sum over all dimensions but one."""
    dims = [dim for dim in range(v.ndim) if dim != channel % v.ndim]
    return v.sum(dims) if dims else v


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    enabled = _has_autocast(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled else None


def _has_autocast(kind: str) -> bool:
    if torch.compiler.is_compiling():  # dynamo follows the question below from torch 2.12 on
        return kind != "meta"
    return torch.amp.is_autocast_available(kind)


def no_autocast(v: Tensor) -> AbstractContextManager[object]:
    """Torch's gradient kernels run in their operands' dtypes, wherever backward is called."""
    if autocast_dtype(v) is None:
        return nullcontext()
    return torch.autocast(v.device.type, enabled=False)
