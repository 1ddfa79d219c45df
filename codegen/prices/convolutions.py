"""Prices of torch's convolution kernels: forward, weight gradient and input gradient.

Each is priced from the shapes of image, kernel and output. `NativeConvolution` chooses the formula
and adds what the call takes beside the kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

from tnconv.codegen.prices.conv_probes import native, square
from tnconv.codegen.prices.depthwise import DepthwiseConvolution
from tnconv.codegen.prices.kinds import Kernel, Kind, coefficient
from tnconv.codegen.prices.movement import Calls, Copy
from tnconv.codegen.prices.native_shapes import Convolution, whole
from tnconv.codegen.prices.onednn import few_as_they_are, has_simd
from tnconv.codegen.prices.products import Product
from tnconv.codegen.prices.scratch import is_small
from tnconv.codegen.prices.tables import Machine


@dataclass(frozen=True)
class PointwiseConvolution(Kind):
    """``t = t_product(groups, m, n, k) + passes · moved / bandwidth``: a convolution of one tap.

    That is a GEMM on arranged operands: of output channels by positions, or for weight gradients
    of channels by channels. With channels last nothing is to be arranged.
    """

    decisions: ClassVar = ("0007",)
    checks: ClassVar = (native("convolution", square(64, 1)),)
    calls: Calls
    machine: Machine
    products: Product

    def price(self, kind: str, c: Convolution) -> Kernel:
        """One kernel of this kind."""
        entry, moved = self.machine.entry, c.entries.moved
        summed, kept = c.pair(kind)
        positions = c.samples * prod(c.o)
        rows, columns = sorted((summed, kept))
        to_weight = kind == "weight gradient"
        sizes = (rows, columns, positions) if to_weight else (kept, positions, summed)
        passes = 0 if c.channels_last else self.machine.passes
        arranged = passes * entry * moved / self.calls.bandwidth
        seconds = self.products.price(c.groups, *sizes).seconds + arranged
        return Kernel(f"pointwise {kind}", c.flops, entry * moved, seconds)


@dataclass(frozen=True)
class DenseConvolution(Kind):
    """``t = launch + flops / (speed · useful) + passes · moved / bandwidth + pages``.

    Operands and result are arranged once in blocks of SIMD lanes, unless channels are last, which
    lie next to each other as they are. ``useful`` is the share of
    products that count after channels were rounded up to whole blocks: to ``lanes`` for the output
    channels of forward and input-gradient kernels, to ``narrow`` for all others; the few channels
    of a first layer are read as they are. Groups of channels that fill no block run without SIMD,
    at a speed that grows with their output channels. On accelerators that holds for all groups, the
    fewer channels of input and output count, and convolutions of one tap are no other kind.
    """

    decisions: ClassVar = ("0006", "0007")
    calls: Calls
    machine: Machine
    speed: float = coefficient(  # forward and input gradients in whole blocks of channels
        1.25e11, "flop/s", native("convolution", square(64, 3))
    )
    weight_gradient: float = coefficient(  # weight gradients in whole blocks of channels
        1.05e11, "flop/s", native("weight gradient", square(64, 3))
    )
    grouped_output: float = coefficient(  # per output channel of groups without SIMD
        2.6e9, "flop/s", native("convolution", square(48, 3, groups=8))
    )
    grouped_input_gradient: float = coefficient(  # their input gradients relative to forward
        0.7, "times", native("input gradient", square(48, 3, groups=8))
    )

    def price(self, kind: str, c: Convolution) -> Kernel:
        """One kernel of this kind."""
        machine, entry, moved = self.machine, self.machine.entry, c.entries.moved
        summed, kept = c.pair(kind)
        to_weight = kind == "weight gradient"
        few = machine.onednn and few_as_they_are(kind, c) and not is_small(c)
        blocks = summed if few else whole(summed, machine.narrow)
        blocks *= whole(kept, machine.narrow if to_weight else machine.lanes)
        speed = self.weight_gradient if to_weight else self.speed
        speed *= summed * kept / blocks if blocks else 1.0
        if c.grouped and not (machine.onednn and has_simd(kind, c)):
            speed = min(speed, self._without_simd(kind, summed, kept))
        passes = machine.grouped_passes if c.grouped else machine.passes
        passes = 0 if c.channels_last else passes
        arranged = passes * entry * moved / self.calls.bandwidth
        seconds = self.calls.launch + c.flops / speed + arranged
        seconds += self.calls.pages(entry * c.entries.of(kind))
        return Kernel(kind, c.flops, entry * moved, seconds)

    def _without_simd(self, kind: str, summed: int, kept: int) -> float:
        if not self.machine.onednn:
            summed = kept = min(summed, kept)
        if kind == "input gradient":
            return self.grouped_output * summed * self.grouped_input_gradient
        return self.grouped_output * kept


@dataclass(frozen=True)
class NativeConvolution(Kind):
    """``t = copies + slower · t_kernel + primitive + weight_entry |w|``.

    ``copies`` bring operands into torch's order. The kernel is that of a `DepthwiseConvolution`,
    a `PointwiseConvolution` or a `DenseConvolution`; ``slower`` is for strided input gradients, and
    for more taps than outputs. Weight gradients, and weights of one tap of input gradients, are
    brought into torch's order. A single small sample is unfolded and multiplied instead, without
    a primitive of oneDNN.
    """

    decisions: ClassVar = ("0007", "0011")
    calls: Calls
    machine: Machine
    copies: Copy
    depthwise: DepthwiseConvolution
    pointwise: PointwiseConvolution
    dense: DenseConvolution
    primitive: float = coefficient(  # calls of a convolution kernel, beside the launch
        4e-5, "s/call", native("convolution", square(8, 3, size=6))
    )
    weight_entry: float = coefficient(  # entries of weights that gradients bring in order
        1e-9, "s/entry", native("weight gradient", square(512, 3, size=4))
    )
    strided: float = coefficient(  # input gradients of overlapping strided windows
        1.3, "times", native("input gradient", square(64, 3, stride=2))
    )
    apart: float = coefficient(  # input gradients of strided windows that lie apart
        1.6, "times", native("input gradient", square(64, 2, stride=3))
    )
    more_taps: float = coefficient(  # kernels with more taps than outputs
        5.0, "times", native("convolution", square(16, 12, size=14, padding=0))
    )

    def price(self, kind: str, c: Convolution, copies: Sequence[float] = ()) -> Kernel:
        """One kernel after copies of its operands that take so many seconds each."""
        kernel = self._kernel(kind, c)
        seconds, host = sum(copies), self.calls.launch
        seconds += self._slower(kind, c, bool(copies)) * kernel.seconds
        if self.machine.onednn and is_small(c):
            entries = c.samples * c.groups * c.channels[0] * prod(c.o) * prod(c.k)
            seconds += self.copies.price(entries, c.o[-1]).seconds
        else:
            host += self.primitive
            seconds += self.primitive
            arranges = "input gradient" if prod(c.k) == 1 else "weight gradient"
            seconds += self.weight_entry * c.entries.w if kind == arranges else 0.0
        return replace(kernel, seconds=self.calls.together(seconds, host))

    def _kernel(self, kind: str, c: Convolution) -> Kernel:
        if c.depthwise:
            return self.depthwise.price(kind, c)
        if self.machine.onednn and prod(c.k) == 1 and has_simd(kind, c):
            return self.pointwise.price(kind, c)
        return self.dense.price(kind, c)

    def _slower(self, kind: str, c: Convolution, copied: bool) -> float:
        """Relative time of geometries for which torch has only slow code.

        More taps than outputs leave the fast kernels, unless a single output makes a GEMM of the
        whole that nothing is in the way of. Input gradients of strided windows are slow, and
        slowest where the windows do not overlap.
        """
        outputs = prod(c.o)
        in_the_way = outputs > 1 or c.dilated or copied
        if prod(c.k) > outputs and in_the_way and c.channels != (1, 1):
            return self.more_taps
        if kind != "input gradient" or not c.strided:
            return 1.0
        far = all(stride >= size for stride, size in zip(c.strides, c.k, strict=True))
        return self.apart if far else self.strided
