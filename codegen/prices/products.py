"""Prices of matrix products: batches of GEMMs, and Gram matrices computed by blocks."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from tnconv.codegen.prices.kinds import Kernel, Kind, Probe, coefficient
from tnconv.codegen.prices.movement import Calls, Copy, on
from tnconv.codegen.prices.tables import Machine, bytes_per_entry

MOST_TILES = 2  # that a remainder of columns takes, however long (0005)
DIVIDING = 2  # threads that divide the rows of a product; more were not measured (0011)
CALLS = 2  # per block column of a Gram matrix: the product's slices, and the copies (0011)


def _product(
    *sizes: int,
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    call: Callable[[Tensor, Tensor], object] = torch.matmul,
    **how: bool,
) -> Probe:
    """A batch of products of sizes (batch, m, n, k), of tensors of other shapes if given."""
    batch, m, n, k = sizes
    left, right = shapes or ((batch, m, k), (batch, k, n))
    return on(
        *(left, right),
        call=call,
        seconds=lambda table: table[Product].price(batch, m, n, k, **how).seconds,
    )


@dataclass(frozen=True)
class Product(Kind):
    """``t = launch + max(flops / speed, moved / bandwidth) + bytes(b m n) / written + b member``.

    A batch of b products of sizes m, n, k; ``speed = gemm · s(r) s(n) s(k) · f(n)``, where
    ``s(x) = x / (x + half)`` is the efficiency of small sizes and f that of a remainder of columns.
    Two threads divide the rows of a single product among each other: r is the share of one.
    Products of factors that both lie along the summed entries are dot products, at a speed of at
    least ``dots · k / (k + half_dot)``. Batches with too few blocks for all multiprocessors of an
    accelerator run on some of them. New pages, rows of results that are not aligned, and
    columns of a factor that conflict in caches come on top.
    """

    decisions: ClassVar = ("0005", "0006", "0007", "0008", "0011")
    calls: Calls
    machine: Machine
    threads: int
    gemm: float = coefficient(  # a large product
        1.05e11, "flop/s", _product(1, 768, 768, 768, shapes=((768, 768),) * 2)
    )
    dots: float = coefficient(  # long dot products
        2e10,
        "flop/s",
        on(
            (256, 8, 512),
            call=lambda x: x @ x.mT,
            seconds=lambda table: table[Product].price(256, 8, 8, 512, along=True).seconds,
        ),
    )
    half: float = coefficient(  # size m, n or k at which a product reaches half of its speed
        12.0, "entries", _product(1, 8, 512, 4096, shapes=((8, 4096), (4096, 512)))
    )
    half_dot: float = coefficient(  # summed entries at which dot products reach half of theirs
        20.0,
        "entries",
        on(
            (2048, 6, 32),
            call=lambda x: x @ x.mT,
            seconds=lambda table: table[Product].price(2048, 6, 6, 32, along=True).seconds,
        ),
    )
    written: float = coefficient(  # bytes of the result ...
        1e10, "bytes/s", _product(1, 2048, 2048, 8, shapes=((2048, 8), (8, 2048)))
    )
    written_in_blocks: float = coefficient(  # ... and of one that is computed in blocks of rows
        1e11,
        "bytes/s",
        _product(
            *(1, 2048, 2048, 8),
            shapes=((64, 32, 8), (8, 2048)),
            call=lambda x, y: x @ y.expand(64, 8, 2048),
            in_blocks=True,
        ),
    )
    member: float = coefficient(  # products of a batch
        3e-8,
        "s/entry",
        on(
            (16384, 1, 16),
            call=lambda x: x @ x.mT,
            seconds=lambda table: table[Product].price(16384, 1, 1, 16, along=True).seconds,
        ),
    )
    unaligned: float = coefficient(  # entries of results whose rows are not aligned
        7e-10, "s/entry", _product(1, 512, 5329, 64, shapes=((512, 64), (64, 5329)))
    )
    conflicting: float = coefficient(  # entries of a factor whose columns conflict in a cache
        5.5e-10,
        "s/entry",
        _product(
            *(8, 1024, 64, 256),
            shapes=((8, 256, 1024), (8, 256, 64)),
            call=lambda x, y: x.mT @ y,
            conflict=True,
        ),
    )
    remainder: float = coefficient(  # columns beyond whole tiles, relative to those in tiles
        3.0, "times", _product(1, 1024, 18, 1024, shapes=((1024, 1024), (1024, 18)))
    )

    def price(
        self,
        batch: int,
        m: int,
        n: int,
        k: int,
        in_blocks: bool = False,
        along: bool = False,
        conflict: bool = False,
        across: bool = False,
    ) -> Kernel:
        """``(batch, m, k) @ (batch, k, n)``.

        Args:
            batch: how many products.
            m: rows of the result.
            n: columns of the result.
            k: summed entries.
            in_blocks: whether a single product is a batch of blocks of rows to torch.
            along: whether both factors lie along the summed entries.
            conflict: whether columns of the first factor conflict in caches.
            across: whether both factors lie across the summed entries: then remainders of columns
                count, however few rows there are (0027).
        """
        calls, entry = self.calls, self.machine.entry
        flops = 2 * batch * m * n * k
        rows = m / DIVIDING if batch == 1 and self.threads > 1 else m
        speed = self.gemm * _efficiency(rows, self.half) * _efficiency(n, self.half)
        speed *= _efficiency(k, self.half)
        speed *= self._in_tiles(n) if across or m >= self.machine.tile else 1.0
        speed = max(speed, self.dots * _efficiency(k, self.half_dot)) if along else speed
        speed *= self._occupied(batch, m, n)
        moved, written = entry * batch * (m * k + k * n + m * n), entry * batch * m * n
        writing = written / (self.written_in_blocks if in_blocks else self.written)
        seconds = calls.launch + max(flops / speed, moved / calls.bandwidth) + writing
        seconds += calls.pages(written) + batch * self.member
        seconds += batch * m * k * self.conflicting if conflict else 0.0
        if m > 1 and n >= self.machine.tile and n * entry % self.machine.aligned:
            seconds += batch * m * n * self.unaligned
        return Kernel("matmul", flops, moved, calls.together(seconds))

    def least(self, flops: int) -> float:
        """A lower bound of what products of so many operations take, in any shapes."""
        return flops / max(self.gemm, self.dots)

    def _occupied(self, batch: int, m: int, n: int) -> float:
        """Share of the multiprocessors that have a block of a batch of products to compute.

        The sum of a single product is divided among all of them.
        """
        machine = self.machine
        blocks = batch * ceil(m / machine.block) * ceil(n / machine.block)
        return min(1.0, blocks / machine.units) if machine.units and batch > 1 and blocks else 1.0

    def _in_tiles(self, columns: int) -> float:
        """Column efficiency: full tiles run at full speed, a remainder of r takes as long as more.

        ``min(remainder · r, 2 · tile)`` columns, to be exact.
        """
        tile = self.machine.tile
        whole, rest = divmod(columns, tile)
        took = tile * whole + min(self.remainder * rest, MOST_TILES * tile)
        return columns / took if columns else 1.0


def _efficiency(size: float, half: float) -> float:
    """Share of full speed that a dimension of this size leaves."""
    return size / (size + half) if size else 1.0


def _by_blocks(x: Tensor) -> Tensor:
    """The `gram` function of an emitted program, for four block columns of a 512 x 512 result."""
    full = x.new_empty(512, 512)
    for start in range(0, 512, 128):
        columns = x[start:] @ x[start : start + 128].mT
        full[start:, start : start + 128] = columns
        full[start : start + 128, start + 128 :] = columns[128:].mT
    return full


@dataclass(frozen=True)
class Gram(Kind):
    """``t = Σ_blocks t_product(m - start, m / blocks, k) + t_copies + 2 blocks launch``.

    A product of mirrored halves: a block column is computed without the rows that earlier block
    columns have mirrored. Half of the entries are computed, half are copied. Threads divide the
    rows of a product among each other, so the blocks are columns.
    """

    decisions: ClassVar = ("0005", "0011", "0032")
    checks: ClassVar = (
        on(
            (512, 512),
            call=_by_blocks,
            seconds=lambda table: table[Gram].price(1, 512, 512, 4).seconds,
        ),
    )
    calls: Calls
    copies: Copy
    products: Product

    def price(self, batch: int, m: int, k: int, blocks: int) -> Kernel:
        """``(batch, m, k) @ (batch, k, m)`` in so many block columns."""
        tile = self.products.machine.tile
        starts = [*(m * at // blocks // tile * tile for at in range(blocks)), m]
        kernels = [
            self.products.price(batch, m - start, stop - start, k)
            for start, stop in pairwise(starts)
        ]
        entries, row = batch * m * m // 2, m // blocks
        kernels += [self.copies.price(entries, row), self.copies.price(entries, row, m)]
        return Kernel(
            "symmetric matmul",
            sum(kernel.flops for kernel in kernels),
            sum(kernel.bytes for kernel in kernels),
            sum(kernel.seconds for kernel in kernels) + CALLS * blocks * self.calls.launch,
            bytes_per_entry() * batch * starts[2] * m,  # the first two block columns
        )
