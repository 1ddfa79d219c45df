"""Prices of depthwise convolution kernels: one channel in each group."""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from tnconv.codegen.prices.conv_probes import native, square
from tnconv.codegen.prices.kinds import Kernel, Kind, coefficient
from tnconv.codegen.prices.movement import Calls
from tnconv.codegen.prices.native_shapes import Convolution, whole
from tnconv.codegen.prices.onednn import has_simd
from tnconv.codegen.prices.tables import Machine


@dataclass(frozen=True)
class DepthwiseConvolution(Kind):
    """``t = launch + rounded · relative · (flops / speed + moved · entry) + pages``.

    ``rounded`` is how much larger the groups are after rounding up to whole SIMD lanes,
    ``relative`` the time of gradients, and of windows as large as images, relative to forward
    kernels of usual windows. Every entry of operands and result takes its time, more so beyond the
    caches. Geometries without SIMD kernels, and weight gradients of large windows, run at speeds of
    their own.
    """

    decisions: ClassVar = ("0006", "0008")
    calls: Calls
    machine: Machine
    entry: float = coefficient(  # entries read or written by a depthwise kernel
        4.2e-10, "s/entry", native("convolution", square(128, 3, groups=128))
    )
    speed: float = coefficient(  # of kernels with SIMD
        8e10, "flop/s", native("convolution", square(128, 7, groups=128))
    )
    uncached: float = coefficient(  # time of an entry beyond the caches, relative to within
        2.0, "times", native("convolution", square(128, 3, groups=128, size=56))
    )
    input_gradient: float = coefficient(  # speed of input gradients relative to forward
        0.9, "times", native("input gradient", square(128, 3, groups=128))
    )
    weight_gradient: float = coefficient(  # speed of weight gradients relative to forward
        1.1, "times", native("weight gradient", square(128, 3, groups=128))
    )
    without_simd: float = coefficient(  # of geometries that SIMD kernels cannot do
        2.9e9, "flop/s", native("convolution", square(32, 15, groups=32))
    )
    large_weight_gradient: float = coefficient(  # weight gradients of large windows
        2e9, "flop/s", native("weight gradient", square(32, 7, groups=32))
    )

    largest: float = coefficient(  # time of windows as large as images, relative to the formula
        1.0, "times", native("convolution", square(16, 28, groups=16))
    )

    def price(self, kind: str, c: Convolution) -> Kernel:
        """One kernel of this kind."""
        machine, moved = self.machine, c.entries.moved
        simd, taps = has_simd(kind, c) or not machine.onednn, prod(c.k)
        speed = self.speed if simd else self.without_simd
        longer = whole(c.groups, machine.lanes) / c.groups
        if kind == "weight gradient" and (taps > machine.taps or not simd):
            speed = self.large_weight_gradient
        elif kind == "weight gradient":
            longer /= self.weight_gradient
        elif kind == "input gradient":
            longer /= self.input_gradient
        if taps > machine.largest:
            longer *= self.largest
        entry = self.entry * (self.uncached if machine.entry * moved > machine.cached else 1)
        seconds = self.calls.launch + longer * (c.flops / speed + moved * entry)
        seconds += self.calls.pages(machine.entry * c.entries.of(kind))
        return Kernel(kind, c.flops, machine.entry * moved, seconds)
