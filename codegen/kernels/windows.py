"""Gram matrices of patches by torch's own kernels, and their derivatives."""

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Ints = Sequence[int]


class Windows(NamedTuple):
    """Windows of an input ``(n, (g c), *i)``: ``i = s·o + d·k - p`` in each dimension."""

    kernel_size: Ints
    positions: Ints
    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int = 1

    def rows(self, x: Tensor) -> int:
        """Entries of a patch of one group."""
        return x.shape[1] // self.groups * prod(self.kernel_size)


def unfolded_gram(x: Tensor, windows: Windows) -> Tensor:
    """``A[g, (c k), (c' k')]``: a product of the unfolded input with itself."""
    samples, groups, dims = x.shape[0], windows.groups, len(windows.kernel_size)
    rows, summed = windows.rows(x), samples * prod(windows.positions)
    if 0 in windows.positions:
        patches = x.reshape(-1)[:0]
    else:
        x = _spanned(x, _parts(x, windows))
        sizes = zip(windows.kernel_size, windows.stride, windows.dilation, strict=True)
        for dim, (k, s, d) in enumerate(sizes, 2):
            x = x.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
        x = x.reshape(samples, groups, x.shape[1] // groups, *x.shape[2:])
        taps, outputs = range(3 + dims, 3 + 2 * dims), range(3, 3 + dims)
        patches = x.permute(1, 2, *taps, 0, *outputs)
    patches = patches.reshape(groups, rows, summed)
    return patches @ patches.mT


def gram_vjp(x: Tensor, gradient: Tensor, windows: Windows) -> Tensor:
    """``dx = Uᵀ((dA + dAᵀ) U)`` with U the unfolded input: one convolution for each tap.

    By torch's differentiable operations alone, so that there are further derivatives.
    """
    kernel_size, positions, stride, _, dilation, groups = windows
    if 0 in positions:
        return torch.zeros_like(x)
    channels, taps = x.shape[1] // groups, prod(kernel_size)
    kernels = (gradient + gradient.mT).reshape(groups, channels, taps, channels, *kernel_size)
    parts = _parts(x, windows)
    spanned = _spanned(x, parts)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(kernel_size) - 1]
    total = torch.zeros_like(spanned)
    for at, tap in enumerate(product(*map(range, kernel_size))):
        kernel = kernels[:, :, at].reshape(x.shape[1], channels, *kernel_size)
        values = convolve(spanned, kernel, None, stride, 0, dilation, groups)
        steps = zip(tap, positions, stride, dilation, strict=True)
        places = [slice(d * k, d * k + s * (o - 1) + 1, s) for k, o, s, d in steps]
        total[(slice(None), slice(None), *places)] += values
    outside: list[int] = []
    for dim, part in enumerate(parts, 2):
        total = total.narrow(dim, part.before, part.length)
        outside = [part.first, x.shape[dim] - part.first - part.length, *outside]
    return F.pad(total, outside)


class Part(NamedTuple):
    """The inputs of one dimension that windows can read, and zeros of windows around them."""

    first: int
    length: int
    before: int
    after: int


def _parts(x: Tensor, windows: Windows) -> list[Part]:
    found = []
    for size, k, o, s, p, d in zip(x.shape[2:], *windows[:5], strict=True):
        span = s * (o - 1) + d * (k - 1) + 1
        first = min(max(0, -p), size)
        length = max(0, min(size, span - p) - first)
        before = first + p if length else 0
        found.append(Part(first, length, before, span - before - length))
    return found


def _spanned(x: Tensor, parts: Sequence[Part]) -> Tensor:
    """Just what the windows span."""
    sides: list[int] = []
    for dim, part in enumerate(parts, 2):
        x = x.narrow(dim, part.first, part.length)
        sides = [part.before, part.after, *sides]
    return F.pad(x, sides)
