"""What kernels cost, by the table in use: one function for each kind of call.

Formulas and their coefficients are in the docstrings of the kinds of kernels, in other files of
this folder.
"""

from collections.abc import Hashable, Sequence
from typing import Any

from tnconv.codegen.prices.convolutions import NativeConvolution
from tnconv.codegen.prices.kinds import Kernel
from tnconv.codegen.prices.loop_prices import Loop
from tnconv.codegen.prices.movement import Calls, Copy, Elementwise
from tnconv.codegen.prices.native_shapes import Convolution
from tnconv.codegen.prices.patch_grams import PatchGram
from tnconv.codegen.prices.products import Gram, Product
from tnconv.codegen.prices.sums import Fold, OverlappingSum, Reduction
from tnconv.codegen.prices.tables import (
    ITEM,
    SHIPPED,
    Table,
    bytes_per_entry,
    in_use,
    remembered,
    using,
)

__all__ = [
    "ITEM",
    "SHIPPED",
    "Kernel",
    "Table",
    "bytes_per_entry",
    "conflicts",
    "convolution",
    "copy",
    "elementwise",
    "fold",
    "gathering",
    "gram",
    "in_use",
    "launch",
    "least_product",
    "loop",
    "matmul",
    "patch_gram",
    "reduction",
    "remembered",
    "shifted",
    "using",
]


@remembered
def _kernel(kind: type[Any], *call: Hashable) -> Kernel:
    found: Kernel = in_use()[kind].price(*call)
    return found


def matmul(
    batch: int,
    m: int,
    n: int,
    k: int,
    in_blocks: bool = False,
    along: bool = False,
    conflict: bool = False,
    across: bool = False,
) -> Kernel:
    """``(batch, m, k) @ (batch, k, n)``: see `Product.price`."""
    return _kernel(Product, batch, m, n, k, in_blocks, along, conflict, across)


def least_product(flops: int) -> float:
    """Seconds that products of so many operations take at least: see `Product.least`."""
    return in_use()[Product].least(flops)


def gram(batch: int, m: int, k: int, blocks: int) -> Kernel:
    """``(batch, m, k) @ (batch, k, m)`` of mirrored halves in block rows: see `Gram`."""
    return _kernel(Gram, batch, m, k, blocks)


def patch_gram(
    groups: int,
    rows: int,
    positions: int,
    entries: int,
    borders: int = 0,
    scattered: bool = False,
) -> Kernel:
    """Gram matrices of patches by our own kernel: see `PatchGram.price`."""
    return _kernel(PatchGram, groups, rows, positions, entries, borders, scattered)


def copy(
    entries: int,
    row: int,
    step: int = 1,
    rows: int | None = None,
    competing: int = 1,
    read: int | None = None,
) -> Kernel:
    """Write ``entries``, gathered by `gathering` from as many, or from ``read``: see `Copy`."""
    return _kernel(Copy, entries, row, step, rows, competing, read)


def gathering(
    entries: int, row: int, step: int, rows: int | None = None, competing: int = 1
) -> float:
    """Extra seconds of a strided gather over a contiguous copy: see `Copy.gathering`."""
    return in_use()[Copy].gathering(entries, row, step, rows, competing)


def conflicts(step: int) -> bool:
    """Whether entries so far apart compete for the same cache set."""
    return in_use()[Copy].conflicts(step)


def elementwise(entries: int, read: int) -> Kernel:
    """One operation per entry of the result, or of what a reduction reads: see `Elementwise`."""
    return _kernel(Elementwise, entries, read)


def reduction(read: int, written: int, row: int, step: int = 1, outer: bool = False) -> Kernel:
    """A sum over dimensions: see `Reduction.price`."""
    return _kernel(Reduction, read, written, row, step, outer)


def fold(read: int, written: int) -> Kernel:
    """Torch's fold: see `Fold`."""
    return in_use()[Fold].price(read, written)


def shifted(entries: int, written: int, parts: int, row: int, step: int, rows: int) -> Kernel:
    """Parts that are added into zeros: see `OverlappingSum.price`."""
    return in_use()[OverlappingSum].price(entries, written, parts, row, step, rows)


def convolution(kind: str, layer: Convolution, copies: Sequence[float] = ()) -> Kernel:
    """One of torch's convolution kernels: see `NativeConvolution.price`."""
    return in_use()[NativeConvolution].price(kind, layer, copies)


def loop(count: int, steps: float, alone: bool = False) -> float:
    """Seconds of a loop of ``count`` turns whose calls take ``steps`` seconds: see `Loop`."""
    return in_use()[Loop].seconds(count, steps, alone)


def added(entries: int) -> Kernel:
    """Adding entries to a total in one turn of a loop: see `Loop.adding`."""
    return in_use()[Loop].adding(entries)


def cached() -> float:
    """Bytes that stay near a core between two uses."""
    return in_use()[Loop].machine.cached


def launch() -> float:
    """Seconds of any call."""
    return in_use()[Calls].launch
