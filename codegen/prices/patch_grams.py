"""The price of our own kernel for Gram matrices of patches."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tnconv.codegen.kernels.tiling import on_tensor_cores, tiling
from tnconv.codegen.prices.kinds import Kernel, Kind, Probe, coefficient
from tnconv.codegen.prices.movement import Calls, on
from tnconv.codegen.prices.products import Product
from tnconv.codegen.prices.tables import Machine, Table

BORDER = 0.4  # instructions of a bound that entries are compared with, of those that load one
SCATTERED = 4.0  # numbers of sixteen bits that are loaded one by one, not in vectors
CALLS = 2  # launches: of tiles, and of the sums of their parts


def _probe(samples: int, channels: int, size: int) -> Probe:
    """Windows of 3 x 3 without padding."""
    positions = (size - 2, size - 2)

    def call(x: Tensor) -> Tensor:
        from tnconv.codegen.kernels.patch_gram import patch_gram

        return patch_gram(x, (3, 3), positions, (1, 1), (0, 0), (1, 1))

    def seconds(table: Table) -> float:
        sizes = samples * positions[0] * positions[1], samples * channels * size * size
        return table[PatchGram].price(1, 9 * channels, *sizes).seconds

    return on((samples, channels, size, size), call=call, seconds=seconds)


@dataclass(frozen=True)
class PatchGram(Kind):
    """``t = 2 launch + max(flops / speed + loaded entry · b, moved / bandwidth)``.

    The upper triangle in tiles, each with all positions; both factors of a tile are loaded entry by
    entry, and b counts what that takes beyond an address. Processors unfold the input instead, and
    take a product for everything.
    """

    decisions: ClassVar = ("0030",)
    calls: Calls
    machine: Machine
    products: Product
    speed: float = coefficient(6e13, "flop/s", _probe(16, 128, 30))  # products of large tiles
    entry: float = coefficient(4e-13, "s/entry", _probe(16, 2, 30))  # loaded into small tiles

    def price(
        self,
        groups: int,
        rows: int,
        positions: int,
        entries: int,
        borders: int = 0,
        scattered: bool = False,
    ) -> Kernel:
        """Of patches with ``rows`` entries.

        Args:
            groups: groups of channels.
            rows: entries of a patch of one group.
            positions: of all samples.
            entries: of the input.
            borders: dimensions in which windows leave the input.
            scattered: whether numbers of sixteen bits are loaded one by one.
        """
        item, units = self.machine.entry, self.machine.units
        if not units:
            seconds = self.products.price(groups, rows, rows, positions).seconds
            return Kernel("patch gram", 2 * groups * rows**2 * positions, item * entries, seconds)
        rows, groups, positions = max(1, rows), max(1, groups), max(1, positions)
        tiles = tiling(rows, groups, positions, item, units, on_tensor_cores(item))
        flops, loaded = 2 * groups * tiles.entries * positions, groups * tiles.loaded(positions)
        taken = (1 + BORDER * borders) * (SCATTERED if scattered else 1.0) * self.entry
        share = min(1.0, groups * tiles.tiles * tiles.splits / units)
        parts = max(4, item) * tiles.splits * groups * tiles.entries if tiles.splits > 1 else 0
        moved = item * (entries + groups * rows**2) + 2 * parts
        work = (flops / self.speed + loaded * taken) / share
        host = CALLS * self.calls.launch
        seconds = self.calls.together(host + max(work, moved / self.calls.bandwidth), host)
        return Kernel("patch gram", flops, moved, seconds, parts)

    probe = staticmethod(_probe)
