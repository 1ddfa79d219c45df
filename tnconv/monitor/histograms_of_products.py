"""Histograms of outer products ``v[n, d] x[n, c]``, most of which are never written out."""

import torch
from torch import Tensor

from tnconv.monitor.histograms import BLOCK, Binning, counted, counted_pairs

SEARCH = 32  # entries that are written out and counted in the time of one search


def counted_products(v: Tensor, x: Tensor, binning: Binning) -> Tensor:
    """How many of the products ``v[n, d] x[n, c]`` are in each bin, int64.

    In row (n, d) as many products are below an edge e as x[n] has entries on one side of
    ``e / v[n, d]``: they are counted by a binary search among the sorted entries, for those edges
    that the row's products reach. Rows that reach very many are written out.

    >>> from tnconv.monitor.needs import Bins
    >>> v, x = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, 0.3, 0.7]])
    >>> counted_products(v, x, Binning(Bins(4, -1.0, 1.0)))
    tensor([1, 1, 3, 1])
    """
    bins, wide = binning.bins.count, torch.float32 if v.device.type == "mps" else torch.float64
    columns, found = x.shape[1], torch.zeros(bins, dtype=torch.int64, device=v.device)
    if not v.numel() or not columns:
        return found
    t, given = v.to(wide) * (binning.scale / binning.width), x.to(wide)
    ends = t * given.amin(1, keepdim=True), t * given.amax(1, keepdim=True)
    lowest, highest = (binning.places(pick(*ends)) for pick in (torch.minimum, torch.maximum))
    first = lowest.clamp_(0, bins - 1).to(torch.int64).add_(1)
    last = highest.clamp_(0, bins - 1).to(torch.int64)
    zero = -1 if binning.zero is None else binning.zero
    crosses = (first <= zero) & (zero <= last)
    searches = last - first + 1 - crosses.to(torch.int64)
    far = searches * SEARCH > columns
    if bool(far.any()):
        found += _written_out(v, x, far, binning)
        last, crosses = last.masked_fill(far, bins), crosses & ~far
        searches = searches.masked_fill(far, 0)
    ended = torch.bincount(last.flatten(), minlength=bins + 1).cumsum(0) * columns
    below = torch.cat([ended.new_zeros(1), ended[:bins]])  # each edge
    below[bins] = (v.numel() - far.sum()) * columns
    if 0 < zero < bins:
        up, down = ((side & crosses).sum(1) for side in (t > 0, t < 0))
        below[zero] += (up * (x < 0).sum(1) + down * (x > 0).sum(1)).sum()
    n, d = searches.nonzero(as_tuple=True)
    if len(n):
        many = searches[n, d] + crosses[n, d].to(torch.int64)
        below.index_add_(0, *_searched(given, n, t[n, d], first[n, d], many, zero, binning.offset))
    return found + below.diff()


def _searched(
    x: Tensor, n: Tensor, t: Tensor, first: Tensor, many: Tensor, zero: int, offset: float
) -> tuple[Tensor, Tensor]:
    """Edges, and how many products of a row are below each of them, but for that at zero.

    All samples are searched in one: keys of sample n are its entries after those of n - 1.

    Args:
        x: of all samples.
        n: the sample of each row.
        t: what multiplies x in a row, in widths of a bin.
        first: the first edge of each row.
        many: how many edges it comes to.
        zero: the edge at zero.
        offset: the bin number of zero.
    """
    rows = torch.repeat_interleave(torch.arange(len(n), device=n.device), many)
    starts = (many.cumsum(0) - many)[rows]
    at = first[rows] + torch.arange(len(rows), device=n.device) - starts
    kept = at != zero
    at, rows = at[kept], rows[kept]
    n, t, columns = n[rows], t[rows], x.shape[1]
    reach = 4 * x.abs().amax() + 1e-300
    keys = (x.sort(1).values + reach * torch.arange(len(x), device=x.device)[:, None]).flatten()
    limits = (at - offset) / t + reach * n
    up = t > 0
    counts = torch.where(
        up,
        torch.searchsorted(keys, limits) - n * columns,
        (n + 1) * columns - torch.searchsorted(keys, limits, right=True),
    )
    return at, counts


def _written_out(v: Tensor, x: Tensor, which: Tensor, binning: Binning) -> Tensor:
    """The histogram of some rows, a few at a time."""
    found = torch.zeros(binning.bins.count, dtype=torch.int64, device=v.device)
    size = max(1, BLOCK // x.shape[1])
    for rows in torch.split(which.nonzero(), size):
        n, d = rows.unbind(1)
        found += counted(v[n, d][:, None] * x[n], binning)
    return found


def counted_product_pairs(
    v: Tensor, x: Tensor, numbers: Tensor, one: Binning, other: int
) -> Tensor:
    """How many pairs of a product and of the number ``(d, c)`` are in each pair of bins.

    Products next to zero are told from signs: for all samples together, by matrix products.
    """
    found = torch.zeros(one.bins.count, other, dtype=torch.int64, device=v.device)
    near, zero, bound = torch.zeros_like(v, dtype=torch.bool), one.zero, one.near_zero
    if zero is not None and bound is not None and v.numel() and x.numel():
        near = v.abs() * x.abs().amax(1, keepdim=True) < bound
        below = (near & (v < 0)).float().T @ (x > 0).float()
        if bool((x < 0).any()):
            below += (near & (v > 0)).float().T @ (x < 0).float()
        whole = near.sum(0)[:, None].expand_as(below)
        for at, weights in ((zero - 1, below), (zero, whole - below)):
            flat = numbers.flatten(), weights.flatten().double()
            found[at] += torch.bincount(*flat, minlength=other).to(torch.int64)
    size = max(1, BLOCK // max(1, x.shape[1]))
    for rows in torch.split((~near).nonzero(), size):
        n, d = rows.unbind(1)
        found += counted_pairs(v[n, d][:, None] * x[n], numbers[d], one, other)
    return found
