"""Probes of torch's convolution kernels: small 2-d layers."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from tnconv.codegen.prices.kinds import Probe, Random
from tnconv.codegen.prices.native_shapes import Convolution
from tnconv.codegen.prices.timing import Call

if TYPE_CHECKING:
    from tnconv.codegen.prices.tables import Table


def square(
    channels: int,
    taps: int,
    groups: int = 1,
    size: int = 28,
    stride: int = 1,
    padding: int | None = None,
) -> Convolution:
    """Eight square images, as many channels in as out; padded to keep their size by default."""
    pad = taps // 2 if padding is None else padding
    out = (size + 2 * pad - taps) // stride + 1
    return Convolution(
        (8, channels, size, size),
        (channels, channels // groups, taps, taps),
        (8, channels, out, out),
        groups,
        (stride, stride),
        (1, 1),
        (pad, pad),
    )


def native(kind: str, c: Convolution) -> Probe:
    """Torch's kernel of a kind, without copies."""

    def call(random: Random) -> Call:
        image, weight, given = random(*c.x), random(*c.w), random(*c.y)
        options = list(c.strides), list(c.paddings), list(c.dilations)
        if kind == "convolution":
            return lambda: F.conv2d(image, weight, None, *options, c.groups)
        mask = [kind == "input gradient", kind == "weight gradient", False]
        settings = *options, False, [0, 0], c.groups, mask
        return lambda: torch.ops.aten.convolution_backward(given, image, weight, None, *settings)

    def seconds(table: "Table") -> float:
        from tnconv.codegen.prices.convolutions import NativeConvolution  # has these probes

        return table[NativeConvolution].price(kind, c).seconds

    return Probe(call, seconds)
