"""Histograms of many entries, a few at a time: counts add up, entries are read once."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tnconv.monitor.needs import Bins

BLOCK = 2**20  # entries at a time: few calls, whose results stay in the cache
FEW = 2**15  # entries for which a table of pairs of bins is too large
FEW_PIECES = 64  # that tell whether it is worth looking at all pieces
MANY_PIECES = 1024  # above which it is worth looking at a few first
PIECE = 512  # entries that are told from their signs if all of them are next to zero
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

    @property
    def offset(self) -> float:
        """The place of zero, in widths of a bin: an integer where zero is an edge."""
        return -self.bins.low / self.width if self.zero is None else float(self.zero)

    def places(self, multiples: Tensor) -> Tensor:
        """The bin of each number of widths from zero, as if there were bins everywhere."""
        if self.zero is None:
            return (multiples + self.offset).floor_()
        return multiples.floor().add_(self.zero)  # signs stay, however small

    @property
    def near_zero(self) -> float | None:
        """The magnitude below which an entry's sign tells its bin, where zero is an edge."""
        if self.zero is None or not 0 < self.zero < self.bins.count or not self.scale > 0:
            return None
        return min(1.0, 0.999 * self.width / max(self.scale, 1e-300))

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
        bins = self.bins
        found = torch.linspace(bins.low, bins.high, bins.count + 1, dtype=torch.float64)
        if self.zero is not None and 0 <= self.zero <= bins.count:
            found[self.zero] = 0.0
        return found


def counted(entries: Tensor, binning: Binning) -> Tensor:
    """How many entries are in each bin, int64; those outside count in the first or the last.

    >>> counted(torch.tensor([-9.0, -1e-30, 0.0, 0.3, 0.7]), Binning(Bins(4, -1.0, 1.0)))
    tensor([1, 1, 2, 1])
    """
    flat = entries.reshape(-1)
    flat = flat if flat.dtype.itemsize > 2 else flat.float()
    if flat.device.type != "cpu" or len(flat) < FEW:
        return _by_number(flat, binning)
    zero, bound = binning.zero, binning.near_zero
    if zero is None or bound is None:
        return _by_pairs(flat, binning)
    whole = len(flat) - len(flat) % PIECE
    pieces = flat[:whole].reshape(-1, PIECE)
    if len(pieces) > MANY_PIECES:
        some = _near(pieces[:: len(pieces) // FEW_PIECES], bound)
        if 2 * int(some.sum()) < len(some):
            return _by_pairs(flat, binning)
    near = _near(pieces, bound)
    close = int(near.sum())
    if 2 * close < len(pieces):
        return _by_pairs(flat, binning)
    negative = _negative(pieces)
    if close == len(pieces):
        found = flat.new_zeros(binning.bins.count, dtype=torch.int64)
    else:
        far = near.logical_not_()
        found = _by_pairs(pieces.index_select(0, far.nonzero().view(-1)).view(-1), binning)
        negative.masked_fill_(far, 0.0)
    if whole < len(flat):
        found += _by_number(flat[whole:], binning)
    below = int(negative.sum(dtype=torch.float64))
    found[zero - 1].add_(below)
    found[zero].add_(close * PIECE - below)
    return found


def _by_number(flat: Tensor, binning: Binning) -> Tensor:
    return torch.bincount(binning.numbers(flat), minlength=binning.bins.count)


def _by_pairs(flat: Tensor, binning: Binning) -> Tensor:
    """Two bytes make one number, which halves what is counted."""
    n = binning.bins.count
    if n > NARROW or len(flat) < FEW:
        return _by_number(flat, binning)
    codes = torch.zeros(len(flat) + len(flat) % 2, dtype=torch.int8)
    scratch = flat.new_empty(min(BLOCK, len(flat)))
    for at in range(0, len(flat), BLOCK):
        binning.write(flat[at : at + BLOCK], codes[at : at + BLOCK], scratch)
    pairs = torch.bincount(codes.view(torch.int16), minlength=256 * n).reshape(n, 256)[:, :n]
    found = pairs.sum(0) + pairs.sum(1)
    found[0] -= len(codes) - len(flat)
    return found


def _near(pieces: Tensor, bound: float) -> Tensor:
    """Which pieces have no entry of at least that magnitude."""
    return (pieces.amax(1) < bound) & (pieces.amin(1) > -bound)


def _negative(pieces: Tensor) -> Tensor:
    """How many entries of each piece are negative, if all are of a magnitude below 1.

    Their floors are -1, those of others 0.
    """
    rows = max(1, BLOCK // PIECE)
    if len(pieces) <= rows:
        return pieces.floor().sum(1).neg_()
    scratch = pieces.new_empty(rows, PIECE)
    blocks = torch.split(pieces, rows)
    return -torch.cat([torch.floor(b, out=scratch[: len(b)]).sum(1) for b in blocks])


def counted_pairs(first: Tensor, numbers: Tensor, one: Binning, other: int) -> Tensor:
    """How many pairs of an entry and a known bin number below ``other`` are in each pair of bins.

    ``first`` is ``(n, j)``, ``numbers`` the same or ``(j)`` for all n. In columns all of whose
    entries are next to zero, signs tell the bins: they are counted first, the numbers once.
    """
    found = torch.zeros(one.bins.count, other, dtype=torch.int64, device=first.device)
    zero, bound, columns = one.zero, one.near_zero, first.shape[1] if first.dim() > 1 else 0
    if zero is None or bound is None or numbers.dim() > 1 or first.numel() < FEW:
        return _pairs(first, numbers, one, found)
    near = (first.amax(0) < bound) & (first.amin(0) > -bound)
    if 2 * int(near.sum()) < columns:
        return _pairs(first, numbers, one, found)
    below = -torch.floor(first).sum(0)[near]
    for at, weights in ((zero - 1, below), (zero, len(first) - below)):
        counts = torch.bincount(numbers[near], weights.double(), minlength=other)
        found[at] += counts.to(torch.int64)
    far = ~near
    return _pairs(first[:, far], numbers[far], one, found)


def _pairs(first: Tensor, numbers: Tensor, one: Binning, found: Tensor) -> Tensor:
    """Add the counts of pairs, a few rows at a time."""
    bins, other = found.shape
    kind = torch.int16 if bins * other < 2**15 else torch.int64
    rows = max(1, BLOCK // max(1, first.shape[1]))
    for at in range(0, len(first), rows):
        own = numbers if numbers.dim() == 1 else numbers[at : at + rows]
        codes = one.numbers(first[at : at + rows], kind).mul_(other).add_(own.to(kind))
        found += torch.bincount(codes.reshape(-1), minlength=bins * other).reshape(bins, other)
    return found
