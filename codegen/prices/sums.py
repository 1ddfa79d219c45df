"""Prices of sums: over dimensions, and of parts that overlap."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from tnconv.codegen.prices.kinds import Kernel, Kind, coefficient
from tnconv.codegen.prices.movement import Calls, Copy, Elementwise, on
from tnconv.codegen.prices.tables import Machine

CALLS = 2  # per part of an overlapping sum: its slice of the result, and the addition (0011)


@dataclass(frozen=True)
class Reduction(Kind):
    """``t = launch + moved / bandwidth + n (step + total / r) + [outer and large] n outer``.

    A sum of n entries in rows of r. Short rows cost a start each; large sums that keep the last
    dimension jump. Steps move whole cache lines.
    """

    decisions: ClassVar = ("0005", "0008")
    calls: Calls
    copies: Copy
    machine: Machine
    total: float = coefficient(  # rows that are added up
        7e-9,
        "s/entry",
        on(
            (2**17, 5),
            call=lambda x: x.sum(1),
            seconds=lambda table: table[Reduction].price(5 * 2**17, 2**17, 5).seconds,
        ),
    )
    outer: float = coefficient(  # entries of large sums that keep the last dimension
        2e-10,
        "s/entry",
        on(
            (64, 512, 513),
            call=lambda x: x.sum(1),
            seconds=lambda table: (
                table[Reduction].price(64 * 512 * 513, 64 * 513, 513, outer=True).seconds
            ),
        ),
    )

    def price(
        self, read: int, written: int, row: int, step: int = 1, outer: bool = False
    ) -> Kernel:
        """The sum of ``read`` entries to ``written`` ones, in rows of ``row`` in steps of ``step``.

        ``outer`` sums keep the last dimension.
        """
        machine = self.machine
        moved = machine.entry * (read * min(max(1, step), machine.line // machine.entry) + written)
        seconds = self.calls.moving(moved)
        seconds += read * (self.copies.stepping(step) + self.total / max(1, row))
        seconds += read * self.outer if outer and moved > machine.cached else 0.0
        return Kernel("sum", read, moved, self.calls.together(seconds))


@dataclass(frozen=True)
class Fold(Kind):
    """``t = launch + n folded + pages``: torch's fold reads its n entries one by one."""

    decisions: ClassVar = ("0011",)
    calls: Calls
    machine: Machine
    folded: float = coefficient(  # entries read
        1e-9,
        "s/entry",
        on(
            (8, 16 * 9, 56 * 56),
            call=lambda x: F.fold(x, 56, 3, padding=1),
            seconds=lambda table: table[Fold].price(8 * 16 * 9 * 56 * 56, 8 * 16 * 56 * 56).seconds,
        ),
    )

    def price(self, read: int, written: int) -> Kernel:
        """From columns of ``read`` entries to images of ``written``."""
        seconds = self.calls.launch + read * self.folded
        seconds += self.calls.pages(self.machine.entry * written)
        moved = self.machine.entry * (read + written)
        return Kernel("fold", read, moved, self.calls.together(seconds))


def _added(x: Tensor) -> Tensor:
    """Nine windows of images added into place, as `overlap_add` of an emitted program does."""
    result = x.new_zeros(8, 16, 58, 58)
    for at in range(9):
        result[..., at // 3 : at // 3 + 56, at % 3 : at % 3 + 56] += x[..., at, :, :]
    return result


@dataclass(frozen=True)
class OverlappingSum(Kind):
    """``t = t_zeros + scattered (t_copy + gathered) + 2 (parts - 1) launch``.

    Parts are added into zeros. They lie far apart, so that reading and writing rows takes a
    multiple of a copy's time.
    """

    decisions: ClassVar = ("0006", "0011")
    calls: Calls
    copies: Copy
    zeros: Elementwise
    scattered: float = coefficient(  # a scattered addition, relative to a copy
        2.0,
        "times",
        on(
            (8, 16, 9, 56, 56),
            call=_added,
            seconds=lambda table: (
                table[OverlappingSum]
                .price(9 * 8 * 16 * 56 * 56, 8 * 16 * 58 * 58, 9, 56, 1, 56)
                .seconds
            ),
        ),
    )

    def price(
        self, entries: int, written: int, parts: int, row: int, step: int, rows: int
    ) -> Kernel:
        """Parts of ``entries`` entries in all, added into ``written`` zeros.

        Args:
            entries: of all parts.
            written: of the result.
            parts: how many.
            row: entries of a row of a part.
            step: distance of its entries.
            rows: rows of a part that one loop adds.
        """
        zeros = self.zeros.price(written, 0)
        moved = self.copies.price(entries, row, step, rows, read=2 * entries)
        gathered = self.copies.gathering(entries, row, 1, rows)
        adding = self.scattered * (moved.seconds + gathered)
        seconds = zeros.seconds + adding + CALLS * (parts - 1) * self.calls.launch
        return Kernel("sum of shifted parts", entries, zeros.bytes + moved.bytes, seconds)
