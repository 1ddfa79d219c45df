"""Calibration of accelerators: a measured table of one, scaled by a few ratios.

Kernels of accelerators are asynchronous, and small ones take no longer than their launch, so that
the small probes of processors show nothing but launches. An accelerator is compared with the one
that was measured by a few calls that are large enough to fill it: see decision 0016.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import isfinite, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from tnconv.codegen.prices.conv_probes import native
from tnconv.codegen.prices.kinds import Coefficient, Probe, every_coefficient
from tnconv.codegen.prices.movement import Copy, Elementwise, on
from tnconv.codegen.prices.native_shapes import Convolution
from tnconv.codegen.prices.patch_grams import PatchGram
from tnconv.codegen.prices.products import Product
from tnconv.codegen.prices.tables import Machine, Table

ENTRIES = 2**26  # of a copy that no cache holds
SIZE = 4096  # of the sides of a product
HALVINGS = 30  # of the range of ratios, on a logarithmic scale
PATCH_GRAMS = "patch grams"  # the scale of a kernel of our own, which not all devices run
MOST = 100.0  # times slower or faster than the accelerator that was measured


@dataclass(frozen=True)
class Scale:
    """Coefficients that grow together, and a call that they dominate."""

    names: tuple[str, ...]
    probe: Probe

    def applied(self, table: Table, ratio: float) -> Table:
        """The table of a device that takes ``ratio`` times as long for these kernels."""
        known = _known()
        changed = {}
        for name in self.names:
            factor = 1 / ratio if known[name].unit.endswith("/s") else ratio
            low, high = known[name].bounds
            changed[name] = min(max(low, factor * table.value(name)), high)
        return table.changed(changed)

    def ratio(self, table: Table, seconds: float) -> float | None:
        """The ratio at which the price of the probe is its measured time; None if there is none.

        It is found by bisection, since prices grow with the ratio.
        """
        low, high = 1 / MOST, MOST
        shortest, longest = (self.probe.seconds(self.applied(table, end)) for end in (low, high))
        if not shortest < seconds < longest:
            return None
        for _ in range(HALVINGS):
            middle = sqrt(low * high)
            if self.probe.seconds(self.applied(table, middle)) < seconds:
                low = middle
            else:
                high = middle
        return sqrt(low * high)


@cache
def _known() -> Mapping[str, Coefficient]:
    return {one.name: one for one in every_coefficient()}


def _layer(samples: int, channels: int, size: int) -> Convolution:
    """A convolution with three taps a side that keeps the size."""
    image = (samples, channels, size, size)
    kernel, ones = (channels, channels, 3, 3), (1, 1)
    return Convolution(image, kernel, image, 1, ones, ones, ones)


def _three(x: Tensor) -> Tensor:
    """Three small calls with the views that programs have between them."""
    return (F.pad(x, (1, 1)).unfold(1, 8, 2).permute(1, 0, 2) @ x.mT).sum(1)


SCALES: Mapping[str, Scale] = {
    "launches": Scale(
        ("Calls.launch", "Loop.turn", "NativeConvolution.primitive"),
        on((8, 8), call=_three, seconds=lambda t: 3 * t[Elementwise].price(8, 16).seconds),
    ),
    "memory": Scale(
        (
            *(
                "Calls.bandwidth",
                "Loop.added",
                "Copy.near",
                "Copy.far",
                "Copy.conflict",
                "Copy.row",
            ),
            *("Fold.folded", "Product.written", "Product.written_in_blocks"),
            "DepthwiseConvolution.entry",
        ),
        on(
            (ENTRIES,),
            call=torch.clone,
            seconds=lambda t: t[Copy].price(ENTRIES, ENTRIES).seconds,
        ),
    ),
    "products": Scale(
        ("Product.gemm", "Product.dots"),
        on(
            *((SIZE, SIZE),) * 2,
            call=torch.matmul,
            seconds=lambda t: t[Product].price(1, SIZE, SIZE, SIZE).seconds,
        ),
    ),
    "convolutions": Scale(
        (
            *("DenseConvolution.speed", "DenseConvolution.grouped_output"),
            *("DepthwiseConvolution.speed", "DepthwiseConvolution.without_simd"),
        ),
        native("convolution", _layer(64, 128, 56)),
    ),
    "weight gradients": Scale(
        ("DenseConvolution.weight_gradient", "DepthwiseConvolution.large_weight_gradient"),
        native("weight gradient", _layer(64, 128, 56)),
    ),
    PATCH_GRAMS: Scale(
        ("PatchGram.speed", "PatchGram.entry"), PatchGram.probe(samples=32, channels=64, size=56)
    ),
}
"""In an order in which each probe is explained by the ratios before it and its own."""


def scaled(start: Table, times: Mapping[str, float]) -> tuple[Table, dict[str, str]]:
    """The table whose prices of the probes are their times, and why probes were refused.

    ``times`` are seconds by the names of `SCALES`. A probe that failed, or whose time no ratio up
    to a hundred explains, is refused: the values of ``start`` are kept.
    """
    table, refused = start, dict[str, str]()
    for name, seconds in times.items():
        scale = SCALES[name]
        if not (isfinite(seconds) and seconds > 0):
            refused[name] = "it failed"
        elif (ratio := scale.ratio(table, seconds)) is None:
            relative = seconds / scale.probe.seconds(table)
            refused[name] = f"it takes {relative:.2g} times what an H100 does"
        else:
            table = scale.applied(table, ratio)
    return table, refused


def probes(machine: Machine) -> Iterator[tuple[str, Probe]]:
    """The calls that are to be timed, by the names of their scales."""
    for name, scale in SCALES.items():
        if name != PATCH_GRAMS or machine.own_kernels:
            yield name, scale.probe
