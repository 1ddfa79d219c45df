"""Convolutions, linear layers and normalizations that store for backward only what it needs.

That is decided at every call by which operands are differentiable then: the input for the weight's
gradient, the weight for the input's, nothing for the bias's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from tnconv.nn.convolution import output_padding
from tnconv.nn.memory.linear import linear
from tnconv.nn.memory.normalization import normalization
from tnconv.nn.memory.saving_convolution import convolution


class _Convolution(_ConvNd):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        pads, padding = self._pads
        if any(map(any, pads)):
            input = padded(input, pads, self.padding_mode)
        settings = (self.stride, padding, self.dilation, self.groups)
        return convolution(input, weight, bias, *settings)

    @property
    def _pads(self) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
        """What is padded before, left and right per dimension, and what the convolution pads."""
        sides = self._reversed_padding_repeated_twice
        both = list(zip(sides[-2::-2], sides[::-2], strict=True))
        if self.padding_mode != "zeros":
            return both, (0,) * len(both)
        return [(0, right - left) for left, right in both], tuple(left for left, _ in both)

    def stores_input(self) -> bool:
        return self.weight.requires_grad and not any(map(any, self._pads[0]))


def padded(x: Tensor, pads: list[tuple[int, int]], mode: str) -> Tensor:
    """``F.pad``, which in some modes would store its input."""
    first = x.ndim - len(pads)
    fits = all(max(pad) < size for pad, size in zip(pads, x.shape[first:], strict=True))
    if mode not in ("reflect", "replicate") or not fits:
        sides = [side for pad in reversed(pads) for side in pad]
        return F.pad(x, sides, "constant" if mode == "zeros" else mode)
    for dim, (left, right) in enumerate(pads, first):
        size = x.shape[dim]
        if mode == "reflect":
            before = x.narrow(dim, 1, left).flip(dim)
            after = x.narrow(dim, size - 1 - right, right).flip(dim)
        else:
            before = x.narrow(dim, 0, 1).expand(*_resized(x, dim, left))
            after = x.narrow(dim, size - 1, 1).expand(*_resized(x, dim, right))
        x = torch.cat([before, x, after], dim)
    return x


def _resized(x: Tensor, dim: int, size: int) -> list[int]:
    return [*x.shape[:dim], size, *x.shape[dim + 1 :]]


class _Transposed(_ConvTransposeNd):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        extra = output_padding(self, input, output_size)
        numbers: Any = (self.stride, self.padding, self.dilation, self.groups, extra)
        return convolution(input, self.weight, self.bias, *numbers)

    def stores_input(self) -> bool:
        """Where the weight learns."""
        return self.weight.requires_grad


class Conv1d(_Convolution, nn.Conv1d):
    """``torch.nn.Conv1d`` that stores what the call's differentiable operands need."""


class Conv2d(_Convolution, nn.Conv2d):
    """``torch.nn.Conv2d`` that stores what the call's differentiable operands need.

    >>> layer = Conv2d(3, 8, 3).requires_grad_(False)
    >>> stored = []
    >>> with torch.autograd.graph.saved_tensors_hooks(stored.append, lambda _: None):
    ...     y = layer(torch.rand(2, 3, 9, 9, requires_grad=True))
    >>> [t is layer.weight for t in stored]
    [True]
    """


class Conv3d(_Convolution, nn.Conv3d):
    """``torch.nn.Conv3d`` that stores what the call's differentiable operands need."""


class ConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` that stores what the call's differentiable operands need."""


class ConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` that stores what the call's differentiable operands need."""


class ConvTranspose3d(_Transposed, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` that stores what the call's differentiable operands need."""


class Linear(nn.Linear):
    """``torch.nn.Linear`` that stores, under autocast too, what the call's operands need."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)

    def stores_input(self) -> bool:
        """Where the weight learns."""
        return self.weight.requires_grad


def _only_bias(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether normalizing has no differentiable operand but the bias, which needs nothing."""
    others = x.requires_grad or (weight is not None and weight.requires_grad)
    return bias is not None and bias.requires_grad and not others


def _plus(y: Tensor, bias: Tensor, channel: int) -> Tensor:
    """In the dtype of y, which can be narrower."""
    if channel == 1:
        bias = bias.view(-1, *[1] * (y.ndim - 2))
    return (y + bias).to(y.dtype)


class _Batch(_BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        if not (self.training or self.running_mean is None or self.running_var is None):
            self._check_input_dim(input)  # type: ignore[no-untyped-call]
            statistics = (self.running_mean, self.running_var)
            return normalization(input, *statistics, self.weight, self.bias, self.eps)
        if not _only_bias(input, self.weight, self.bias):
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        mean, var, momentum = None, None, 0.0
        if self.training and self.track_running_stats:
            mean, var, momentum = self.running_mean, self.running_var, self._counted()
        y = F.batch_norm(input, mean, var, self.weight, None, True, momentum, self.eps)
        return _plus(y, self.bias, 1)

    def _counted(self) -> float:
        """The weight of this batch in the running statistics: a mean's if there is no momentum."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                return 1.0 / float(self.num_batches_tracked)
        return self.momentum or 0.0

    def stores_input(self) -> bool:
        moments = self.training or self.running_mean is None
        return moments or (self.weight is not None and self.weight.requires_grad)


class BatchNorm1d(_Batch, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d``: by running statistics, stores no input if the weight is frozen."""


class BatchNorm2d(_Batch, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d``: by running statistics, stores no input if the weight is frozen."""


class BatchNorm3d(_Batch, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d``: by running statistics, stores no input if the weight is frozen."""


class _Instance(_InstanceNorm):
    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None and self.running_var is not None:
            statistics = (self.running_mean, self.running_var)
            return normalization(input, *statistics, self.weight, self.bias, self.eps)
        y: Tensor = super()._apply_instance_norm(input)  # type: ignore[no-untyped-call]
        return y

    def stores_input(self) -> bool:
        moments = self.training or self.running_mean is None
        return moments or (self.weight is not None and self.weight.requires_grad)


class InstanceNorm1d(_Instance, nn.InstanceNorm1d):
    """``torch.nn.InstanceNorm1d``: by running statistics, as `BatchNorm1d`."""


class InstanceNorm2d(_Instance, nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d``: by running statistics, as `BatchNorm2d`."""


class InstanceNorm3d(_Instance, nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d``: by running statistics, as `BatchNorm3d`."""


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` that stores nothing where only the bias is differentiable."""

    def forward(self, input: Tensor) -> Tensor:
        if not _only_bias(input, self.weight, self.bias):
            return super().forward(input)
        y = F.layer_norm(input, self.normalized_shape, self.weight, None, self.eps)
        return _plus(y, self.bias, -1)

    def stores_input(self) -> bool:
        """Always: the statistics need it."""
        return True


class GroupNorm(nn.GroupNorm):
    """``torch.nn.GroupNorm`` that stores nothing where only the bias is differentiable."""

    def forward(self, input: Tensor) -> Tensor:
        if not _only_bias(input, self.weight, self.bias):
            return super().forward(input)
        y = F.group_norm(input, self.num_groups, self.weight, None, self.eps)
        return _plus(y, self.bias, 1)

    def stores_input(self) -> bool:
        """Always: the statistics need it."""
        return True
