"""Histograms of many entries, a few at a time: counts add up, entries are read once."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tnconv.monitor.needs import Bins

BLOCK = 2**16  # entries at a time: they stay in the cache
FEW = 2**15  # entries for which a table of pairs of bins is too large
NARROW = 127  # bins whose numbers fit into a byte, two of which make a non-negative int16


@dataclass(frozen=True)
class Binning:
    """Bin numbers of ``scale`` times an entry.

    An edge at zero divides exactly by sign; next to other edges, entries within a rounding error of
    the edge may count on either side.
    """

    bins: Bins
    scale: float = 1.0

    @cached_property
    def width(self) -> float:
        """The width of a bin."""
        return (self.bins.high - self.bins.low) / self.bins.count

    @cached_property
    def zero(self) -> int | None:
        """The bin that begins at zero, where one does."""
        at = -self.bins.low / self.width
        return round(at) if abs(at - round(at)) < 1e-9 * max(1.0, abs(at)) else None

    def numbers(self, entries: Tensor, kind: torch.dtype = torch.int16) -> Tensor:
        """The bin of each entry, as integers."""
        factor = self.scale / self.width
        if (zero := self.zero) is not None:
            found = torch.mul(entries, factor).floor_().clamp_(-zero, self.bins.count - 1 - zero)
            return found.to(kind).add_(zero)
        found = torch.mul(entries, factor).sub_(self.bins.low / self.width).floor_()
        return found.clamp_(0, self.bins.count - 1).to(kind)

    def write(self, entries: Tensor, codes: Tensor, scratch: Tensor) -> None:
        """The bin of each entry as int8, by way of scratch space."""
        space, zero = scratch[: len(entries)], self.zero
        torch.mul(entries, self.scale / self.width, out=space)
        if zero is None:
            space.sub_(self.bins.low / self.width)
        first = 0 if zero is None else zero
        codes[: len(entries)].copy_(space.floor_().clamp_(-first, self.bins.count - 1 - first))
        if first:
            codes[: len(entries)].add_(first)

    @property
    def edges(self) -> Tensor:
        """Of all bins, one more than there are."""
        return torch.linspace(
            self.bins.low, self.bins.high, self.bins.count + 1, dtype=torch.float64
        )


def counted(entries: Tensor, binning: Binning) -> Tensor:
    """How many entries are in each bin, int64; those outside count in the first or the last.

    >>> counted(torch.tensor([-9.0, -1e-30, 0.0, 0.3, 0.7]), Binning(Bins(4, -1.0, 1.0)))
    tensor([1, 1, 2, 1])
    """
    n, flat = binning.bins.count, entries.reshape(-1)
    if n > NARROW or flat.device.type != "cpu" or len(flat) < FEW:
        return torch.bincount(binning.numbers(flat), minlength=n)
    codes = torch.zeros(len(flat) + len(flat) % 2, dtype=torch.int8)
    scratch = flat.new_empty(min(BLOCK, len(flat)))
    for at in range(0, len(flat), BLOCK):
        binning.write(flat[at : at + BLOCK], codes[at : at + BLOCK], scratch)
    pairs = torch.bincount(codes.view(torch.int16), minlength=256 * n).reshape(n, 256)[:, :n]
    found = pairs.sum(0) + pairs.sum(1)
    found[0] -= len(codes) - len(flat)
    return found


def counted_pairs(first: Tensor, numbers: Tensor, one: Binning, other: int) -> Tensor:
    """How many pairs of an entry and a known bin number below ``other`` are in each pair of bins.

    ``first`` is ``(n, j)``, ``numbers`` ``(j)`` the same for all n.
    """
    found = torch.zeros(one.bins.count * other, dtype=torch.int64, device=first.device)
    kind = torch.int16 if one.bins.count * other < 2**15 else torch.int64
    rows = max(1, BLOCK // max(1, first.shape[1]))
    for block in torch.split(first, rows):
        codes = one.numbers(block, kind).mul_(other).add_(numbers.to(kind))
        found += torch.bincount(codes.reshape(-1), minlength=len(found))
    return found.reshape(one.bins.count, other)
