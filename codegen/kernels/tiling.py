"""How `patch_gram` divides its work among programs: chosen from sizes alone, never measured.

Both the launch and the price follow it.
"""

from dataclasses import dataclass
from math import ceil

import torch

SIDES = (16, 32, 64, 128)  # of tiles of the result; 16 is the least that Triton multiplies (0030)
HALF = 32  # side of a tile whose products take as long as loading its entries (0030) ...
HALF_ON_TENSOR_CORES = 256  # ... and where tensor cores compute them (0030)
MOST_SUMS = 2**16  # bytes of a tile's sums, which shared memory holds to transpose them (0030)
ROW = 128  # bytes of a tile's row: the swizzled rows of shared memory (0030)
PER_UNIT = 4  # programs per multiprocessor that parts of the sum are made for (0030)
LEAST = 512  # positions of a part (0030)
MOST_PARTS = 2**26  # bytes of all parts of the result (0030)


@dataclass(frozen=True)
class Tiling:
    """Tiles of ``block`` rows and columns, summed over ``depth`` positions at a time, in parts.

    Args:
        block: Rows and columns of a tile.
        depth: Positions of one product.
        side: Tiles along a side of the result.
        per_split: Positions of a part of the sum, a multiple of ``depth``.
        splits: How many parts there are.
    """

    block: int
    depth: int
    side: int
    per_split: int
    splits: int

    @property
    def tiles(self) -> int:
        """Those on and above the diagonal."""
        return self.side * (self.side + 1) // 2

    @property
    def entries(self) -> int:
        """Entries of the result that are computed, each with all positions."""
        return self.tiles * self.block**2

    def loaded(self, positions: int) -> int:
        """Entries that are loaded for one group: both factors of each tile."""
        return 2 * self.tiles * self.block * positions


def on_tensor_cores(itemsize: int) -> bool:
    """Whether products of numbers of so many bytes use tensor cores by torch's present flags."""
    return itemsize == 2 or (itemsize == 4 and torch.backends.cuda.matmul.fp32_precision == "tf32")


def tiling(
    rows: int, groups: int, positions: int, itemsize: int, units: int, tensor_cores: bool
) -> Tiling:
    """The tiles that are predicted to take least time, and parts for all multiprocessors.

    Args:
        rows: Rows and columns of one group's result, at least one.
        groups: Results.
        positions: Summed positions of all samples, at least one.
        itemsize: Bytes of an entry.
        units: Multiprocessors of the device.
        tensor_cores: Whether they compute the products.
    """
    depth, half = ROW // itemsize, HALF_ON_TENSOR_CORES if tensor_cores else HALF

    def work(block: int) -> int:
        side = ceil(rows / block)
        return side * (side + 1) * block * (block + half)

    sides = [block for block in SIDES if block**2 * max(4, itemsize) <= MOST_SUMS]
    block = min(sides, key=work)
    side = ceil(rows / block)
    tiles = groups * side * (side + 1) // 2
    parts = min(
        ceil(PER_UNIT * units / tiles),
        ceil(positions / LEAST),
        max(1, MOST_PARTS // (4 * tiles * block**2)),
    )
    per_split = depth * ceil(positions / (depth * parts))
    return Tiling(block, depth, side, per_split, ceil(positions / per_split))
