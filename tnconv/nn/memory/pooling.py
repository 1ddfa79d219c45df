"""Pooling that stores which entries were chosen, or nothing, instead of its input."""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _list_with_default, _ntuple

from tnconv.nn.memory.functions import Maybe, Saving, aten, autocast_dtype, keep


class Pooled(Saving):
    """Gives y its gradient by torch's kernel, which of x reads no more than the shape."""

    @staticmethod
    def forward(
        x: Tensor, y: Tensor, chosen: Maybe, kernel: str, settings: tuple[Any, ...]
    ) -> Tensor:
        return y.detach()  # no view: it may be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, chosen, ctx.kernel, ctx.settings = inputs
        ctx.shape, ctx.out, ctx.channels_last = x.shape, output.shape, _channels_last(x)
        keep(ctx, chosen)

    @staticmethod
    def backward(ctx: Any, v: Maybe) -> tuple[Maybe, ...]:
        (chosen,) = ctx.saved_tensors
        dx = None
        if v is not None:
            like = _like(v, ctx.shape, ctx.channels_last)
            settings = () if "adaptive" in ctx.kernel else ctx.settings
            indices = () if chosen is None else (chosen.long(),)
            dx = getattr(aten, ctx.kernel + "_backward")(v, like, *settings, *indices)
        return dx, None, None, None, None

    @staticmethod
    def tangent(ctx: Any, tx: Maybe, *_: object) -> Maybe:
        if tx is None:
            return None
        (chosen,) = ctx.saved_tensors
        if chosen is None:
            y: Tensor = getattr(aten, ctx.kernel)(tx, *ctx.settings)
            return y
        first = -_dims(ctx.kernel)
        return tx.flatten(first).gather(-1, chosen.long().flatten(first)).view(ctx.out)


def _channels_last(x: Tensor) -> bool:
    """Whether torch would give back the gradient with its channels last."""
    return x.ndim > 3 and x.stride(1) == 1 < x.shape[1]


def _like(v: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    """What has no entries of its own, unless the kernel should see where its channels are."""
    if not channels_last:
        return v.new_empty(()).expand(shape)
    channels, *others = shape[1:]
    return v.new_empty((shape[0], *others, channels)).movedim(-1, 1)


def _dims(kernel: str) -> int:
    return next(int(letter) for letter in kernel if letter.isdigit())


def _max_pool(x: Tensor, kernel: str, *settings: Any) -> tuple[Tensor, Tensor]:
    """Values and indices; stores the indices, in four bytes each."""
    y, chosen = getattr(aten, kernel)(x.detach(), *settings)
    small = chosen.int() if prod(x.shape[-_dims(kernel) :]) < 2**31 else chosen
    return Pooled.run(x, y, small, kernel, settings), chosen


def _avg_pool(x: Tensor, kernel: str, *settings: Any) -> Tensor:
    """Values; stores nothing."""
    y = getattr(aten, kernel)(x.detach(), *settings)
    result: Tensor = Pooled.run(x, y, None, kernel, settings)
    return result


class _Pool(nn.Module):
    """Torch's kernels have two or three dimensions: one gets a second one, of size one."""

    dims: int

    def _lifted(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-2) if self.dims == 1 else x

    def _lowered(self, y: Tensor) -> Tensor:
        return y.squeeze(-2) if self.dims == 1 else y

    def _tuple(self, setting: Any, added: int) -> tuple[int, ...]:
        given = tuple(_ntuple(self.dims)(setting))  # type: ignore[no-untyped-call]
        return (added, *given) if self.dims == 1 else given

    def _sizes(self, x: Tensor, output_size: Any) -> tuple[int, ...]:
        given = _ntuple(self.dims)(output_size)  # type: ignore[no-untyped-call]
        sizes = _list_with_default(list(given), list(x.shape))
        return (1, *sizes) if self.dims == 1 else tuple(sizes)

    @property
    def _kernel(self) -> str:
        return f"{max(self.dims, 2)}d"

    def stores_input(self) -> bool:
        return False


def _cast_by_autocast(x: Tensor) -> bool:
    """Autocast on a CPU pools volumes in single precision, unless indices are wanted."""
    return x.device.type == "cpu" and autocast_dtype(x) is not None and x.dtype != torch.float64


class _MaxPool(_Pool, nn.modules.pooling._MaxPoolNd):
    def forward(self, input: Tensor) -> Any:
        if not input.requires_grad:
            return super().forward(input)
        settings = (
            self._tuple(self.kernel_size, 1),
            self._tuple(self.stride, 1),
            self._tuple(self.padding, 0),
            self._tuple(self.dilation, 1),
            self.ceil_mode,
        )
        kernel = f"max_pool{self._kernel}_with_indices"
        y, chosen = map(self._lowered, _max_pool(self._lifted(input), kernel, *settings))
        if self.return_indices:
            return y, chosen
        return y.float() if self.dims == 3 and _cast_by_autocast(input) else y


class _AvgPool(_Pool):
    kernel_size: Any
    stride: Any
    padding: Any
    ceil_mode: bool
    count_include_pad: bool
    divisor_override: int | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not input.requires_grad:
            return super().forward(input)  # type: ignore[no-any-return]
        settings = (
            self._tuple(self.kernel_size, 1),
            self._tuple(self.stride, 1),
            self._tuple(self.padding, 0),
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )
        return self._lowered(_avg_pool(self._lifted(input), f"avg_pool{self._kernel}", *settings))


class _AdaptiveMaxPool(_Pool, nn.modules.pooling._AdaptiveMaxPoolNd):
    def forward(self, input: Tensor) -> Any:
        if not input.requires_grad:
            return super().forward(input)
        sizes = self._sizes(input, self.output_size)
        kernel = f"adaptive_max_pool{self._kernel}"
        y, chosen = map(self._lowered, _max_pool(self._lifted(input), kernel, sizes))
        return (y, chosen) if self.return_indices else y


class _AdaptiveAvgPool(_Pool, nn.modules.pooling._AdaptiveAvgPoolNd):
    def forward(self, input: Tensor) -> Tensor:
        sizes = self._sizes(input, self.output_size)
        if not input.requires_grad or set(sizes) == {1}:  # a mean, which torch stores nothing for
            return super().forward(input)  # type: ignore[no-any-return]
        kernel = f"_adaptive_avg_pool{self._kernel}"
        input = input.float() if self.dims == 3 and _cast_by_autocast(input) else input
        return self._lowered(_avg_pool(self._lifted(input), kernel, sizes))


class MaxPool1d(_MaxPool, nn.MaxPool1d):
    """``torch.nn.MaxPool1d`` that stores the indices alone."""

    dims = 1


class MaxPool2d(_MaxPool, nn.MaxPool2d):
    """``torch.nn.MaxPool2d`` that stores the indices alone."""

    dims = 2


class MaxPool3d(_MaxPool, nn.MaxPool3d):
    """``torch.nn.MaxPool3d`` that stores the indices alone."""

    dims = 3


class AvgPool1d(_AvgPool, nn.AvgPool1d):
    """``torch.nn.AvgPool1d`` that stores nothing."""

    dims = 1


class AvgPool2d(_AvgPool, nn.AvgPool2d):
    """``torch.nn.AvgPool2d`` that stores nothing."""

    dims = 2


class AvgPool3d(_AvgPool, nn.AvgPool3d):
    """``torch.nn.AvgPool3d`` that stores nothing."""

    dims = 3


class AdaptiveMaxPool1d(_AdaptiveMaxPool, nn.AdaptiveMaxPool1d):
    """``torch.nn.AdaptiveMaxPool1d`` that stores the indices alone."""

    dims = 1


class AdaptiveMaxPool2d(_AdaptiveMaxPool, nn.AdaptiveMaxPool2d):
    """``torch.nn.AdaptiveMaxPool2d`` that stores the indices alone."""

    dims = 2


class AdaptiveMaxPool3d(_AdaptiveMaxPool, nn.AdaptiveMaxPool3d):
    """``torch.nn.AdaptiveMaxPool3d`` that stores the indices alone."""

    dims = 3


class AdaptiveAvgPool1d(_AdaptiveAvgPool, nn.AdaptiveAvgPool1d):
    """``torch.nn.AdaptiveAvgPool1d`` that stores nothing."""

    dims = 1


class AdaptiveAvgPool2d(_AdaptiveAvgPool, nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d`` that stores nothing."""

    dims = 2


class AdaptiveAvgPool3d(_AdaptiveAvgPool, nn.AdaptiveAvgPool3d):
    """``torch.nn.AdaptiveAvgPool3d`` that stores nothing."""

    dims = 3
