"""Prices of kernels that move entries: copies and elementwise operations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tnconv.codegen.prices.kinds import Kernel, Kind, Probe, Random, coefficient
from tnconv.codegen.prices.tables import Machine, Table
from tnconv.codegen.prices.timing import Call


def on(
    *shapes: tuple[int, ...], call: Callable[..., object], seconds: Callable[[Table], float]
) -> Probe:
    """The call on random tensors of these shapes."""

    def prepared(random: Random) -> Call:
        operands = [random(*shape) for shape in shapes]
        return lambda: call(*operands)

    return Probe(prepared, seconds)


def _copying(shape: tuple[int, ...], view: Callable[[Tensor], Tensor], *loops: int) -> Probe:
    """A contiguous copy of a view: entries, then the inner loops as in `Copy.price`."""
    return on(
        shape,
        call=lambda x: view(x).contiguous(),
        seconds=lambda table: table[Copy].price(*loops).seconds,
    )


@dataclass(frozen=True)
class Calls(Kind):
    """``t = launch + moved / bandwidth + [written > fresh_from] written / fresh``.

    What every call takes, whatever it computes. Large results need newly mapped pages, which cost
    more than most kernels. On accelerators the host prepares the next call while a kernel runs, so
    that a call takes the longer of the two.
    """

    decisions: ClassVar = ("0011",)
    machine: Machine
    launch: float = coefficient(  # of any call
        4e-6,
        "s/call",
        on((8,), call=lambda x: x * x, seconds=lambda t: t[Elementwise].price(8, 16).seconds),
    )
    bandwidth: float = coefficient(  # bytes read plus bytes written
        3e10,
        "bytes/s",
        on((2**22,), call=torch.clone, seconds=lambda t: t[Copy].price(2**22, 2**22).seconds),
    )
    fresh: float = coefficient(  # into newly mapped pages
        6e9,
        "bytes/s",
        on((2**24,), call=torch.clone, seconds=lambda t: t[Copy].price(2**24, 2**24).seconds),
    )

    def moving(self, moved: int) -> float:
        """Seconds of a call that moves so many bytes and computes next to nothing."""
        return self.launch + moved / self.bandwidth

    def pages(self, written: int) -> float:
        """Seconds for the new pages of a result of so many bytes."""
        return written / self.fresh if written > self.machine.fresh_from else 0.0

    def together(self, seconds: float, host: float | None = None) -> float:
        """Seconds of a call whose ``host`` part, the launch by default, may overlap with the rest.

        ``seconds`` is the sum of both.
        """
        if not self.machine.overlaps:
            return seconds
        host = self.launch if host is None else host
        return max(host, seconds - host)


@dataclass(frozen=True)
class Copy(Kind):
    """``t = launch + moved / bandwidth + n (step + row / r) + l loop + pages``.

    A strided copy of n entries in l loops over rows of r entries. ``step`` is 0 for a contiguous
    read, ``near`` or ``far`` for steps within or beyond a cache line, and ``conflict`` if more
    entries compete for a cache set than it has ways before the next entry of a line is read.
    """

    decisions: ClassVar = ("0008", "0011")
    calls: Calls
    machine: Machine
    near: float = coefficient(  # entries read in steps within a cache line
        3e-10, "s/entry", _copying((2048, 1024), lambda x: x[:, ::2], 2**20, 512, 2)
    )
    far: float = coefficient(  # entries read in steps beyond a cache line
        7e-10, "s/entry", _copying((1000, 999), lambda x: x.mT, 999_000, 1000, 999)
    )
    conflict: float = coefficient(  # entries read in steps that conflict in a cache
        2.2e-9,
        "s/entry",
        on(
            (16, 64, 1024),
            call=lambda x: x.mT.contiguous(),
            seconds=lambda table: table[Copy].price(2**20, 64, 1024, competing=64).seconds,
        ),
    )
    row: float = coefficient(  # rows: the start of an innermost loop
        1.5e-9, "s/entry", _copying((2**18, 8), lambda x: x[:, :3], 3 * 2**18, 3)
    )
    loop: float = coefficient(  # loops over rows
        2.5e-8,
        "s/entry",
        _copying(
            (2**7, 2**7, 8, 8),
            lambda x: x[..., :3, :3].permute(1, 0, 2, 3),
            *(9 * 2**14, 3, 1, 3),
        ),
    )

    def price(
        self,
        entries: int,
        row: int,
        step: int = 1,
        rows: int | None = None,
        competing: int = 1,
        read: int | None = None,
    ) -> Kernel:
        """Write ``entries``, gathered as in `gathering` from as many, or from ``read``."""
        moved = self.machine.entry * (entries + (entries if read is None else read))
        seconds = self.calls.moving(moved) + self.calls.pages(self.machine.entry * entries)
        seconds += self.gathering(entries, row, step, rows, competing)
        return Kernel("copy", 0, moved, self.calls.together(seconds))

    def gathering(
        self, entries: int, row: int, step: int, rows: int | None = None, competing: int = 1
    ) -> float:
        """Extra time of a strided gather over a contiguous copy.

        Args:
            entries: how many are gathered in all.
            row: entries of the innermost loop.
            step: distance of its entries, in entries.
            rows: rows of one loop over rows; without a number, all rows are one loop.
            competing: entries that fall into one cache set before the next of a line is read.
        """
        row = max(1, row)
        loops = 0.0 if rows is None else entries / (row * max(1, rows))
        return entries * (self.stepping(step, competing) + self.row / row) + self.loop * loops

    def conflicts(self, step: int) -> bool:
        """Whether entries so far apart compete for the same cache set."""
        apart = self.machine.conflict
        return apart > 0 and step * self.machine.entry % apart == 0

    def stepping(self, step: int, competing: int = 1) -> float:
        """Extra seconds per entry that is read in steps."""
        if step <= 1:
            return 0.0
        if competing > self.machine.ways:
            return self.conflict
        return self.near if step * self.machine.entry < self.machine.line else self.far


@dataclass(frozen=True)
class Elementwise(Kind):
    """``t = launch + moved / bandwidth + pages``: one operation per entry of the result.

    Arithmetic takes no longer than memory traffic.
    """

    decisions: ClassVar = ("0011",)
    checks: ClassVar = (
        on(
            *((2**20,),) * 2,
            call=torch.mul,
            seconds=lambda table: table[Elementwise].price(2**20, 2**21).seconds,
        ),
    )
    calls: Calls
    machine: Machine

    def price(self, entries: int, read: int) -> Kernel:
        """For entries of the result, or for those that a reduction reads."""
        moved = self.machine.entry * (entries + read)
        seconds = self.calls.moving(moved) + self.calls.pages(self.machine.entry * entries)
        return Kernel("elementwise", max(entries, read), moved, self.calls.together(seconds))
