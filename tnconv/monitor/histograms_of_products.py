"""Histograms of outer products ``v[n, d] x[n, c]``, most of which are never written out."""

import torch
from torch import Tensor

from tnconv.monitor.histograms import BLOCK, Binning, counted, counted_pairs

SEARCH = 32  # entries that are written out and counted in the time of one search
FEW = 2**17  # entries that are written out without further ado


def counted_products(v: Tensor, x: Tensor, binning: Binning) -> Tensor:
    """How many of the products ``v[n, d] x[n, c]`` are in each bin, int64.

    Rows (n, d) whose products are all next to zero are counted by signs. In others as many products
    are below an edge e as x[n] has entries on one side of ``e / v[n, d]``: they are counted by a
    binary search among the sorted entries, for those edges that the row's products reach. Rows that
    reach very many, and few rows, are written out.

    >>> from tnconv.monitor.needs import Bins
    >>> v, x = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, 0.3, 0.7]])
    >>> counted_products(v, x, Binning(Bins(4, -1.0, 1.0)))
    tensor([1, 1, 3, 1])
    """
    found = torch.zeros(binning.bins.count, dtype=torch.int64, device=v.device)
    if not v.numel() or not x.numel():
        return found
    near = _near(v, x, binning)
    if (zero := binning.zero) is not None and near is not None:
        up, down = ((near & side).sum(1) for side in (v > 0, v < 0))
        below = (up * (x < 0).sum(1) + down * (x > 0).sum(1)).sum()
        found[zero - 1] += below
        found[zero] += near.sum() * x.shape[1] - below
    rows = torch.ones_like(v, dtype=torch.bool) if near is None else ~near
    n, d = rows.nonzero(as_tuple=True)
    own = v[n, d]
    if len(n) * x.shape[1] <= FEW:
        return found + _written_out(own, x, n, binning)
    return found + _searched(own, x, n, binning)


def _near(v: Tensor, x: Tensor, binning: Binning) -> Tensor | None:
    """Which rows have products next to zero alone, if their signs tell the bins."""
    if (bound := binning.near_zero) is None:
        return None
    return v.abs() * x.abs().amax(1, keepdim=True) < bound


def _searched(own: Tensor, x: Tensor, n: Tensor, binning: Binning) -> Tensor:
    """The histogram of rows ``own[r] x[n[r]]``, from how many products are below each edge."""
    bins, columns = binning.bins.count, x.shape[1]
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    t, given = own.to(wide) * (binning.scale / binning.width), x.to(wide)
    ends = t * given.amin(1)[n], t * given.amax(1)[n]
    lowest, highest = (binning.places(pick(*ends)) for pick in (torch.minimum, torch.maximum))
    first = lowest.clamp_(0, bins - 1).to(torch.int64).add_(1)
    last = highest.clamp_(0, bins - 1).to(torch.int64)
    many = last - first + 1
    far = many * SEARCH > columns
    found = _written_out(own[far], x, n[far], binning)
    n, t, first, last, many = (each[~far] for each in (n, t, first, last, many))
    ended = torch.bincount(last, minlength=bins).cumsum(0) * columns
    below = torch.cat([ended.new_zeros(1), ended])  # every edge
    if len(n):
        below.index_add_(0, *_edges(given, n, t, first, many, binning.offset))
    return found + below.diff()


def _edges(
    x: Tensor, n: Tensor, t: Tensor, first: Tensor, many: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    """Edges, and how many products of a row are below each of them.

    All samples are searched in one: keys of sample n are its entries after those of n - 1.

    Args:
        x: of all samples.
        n: the sample of each row.
        t: what multiplies x in a row, in widths of a bin.
        first: the first edge of each row.
        many: how many edges it comes to.
        offset: the place of zero.
    """
    rows = torch.repeat_interleave(torch.arange(len(n), device=n.device), many)
    starts = (many.cumsum(0) - many)[rows]
    at = first[rows] + torch.arange(len(rows), device=n.device) - starts
    n, t, columns = n[rows], t[rows], x.shape[1]
    reach = 4 * x.abs().amax() + 1e-300
    keys = (x.sort(1).values + reach * torch.arange(len(x), device=x.device)[:, None]).flatten()
    limits = (at - offset) / t + reach * n
    counts = torch.where(
        t > 0,
        torch.searchsorted(keys, limits) - n * columns,
        (n + 1) * columns - torch.searchsorted(keys, limits, right=True),
    )
    zero = at == offset
    if bool(zero.any()):  # exactly, however small entries are
        signs = torch.where(t > 0, (x < 0).sum(1)[n], (x > 0).sum(1)[n])
        counts = torch.where(zero, signs, counts)
    return at, counts


def _written_out(own: Tensor, x: Tensor, n: Tensor, binning: Binning) -> Tensor:
    """The histogram of some rows, a few at a time."""
    found = torch.zeros(binning.bins.count, dtype=torch.int64, device=x.device)
    size = max(1, BLOCK // x.shape[1])
    for v, at in zip(torch.split(own, size), torch.split(n, size), strict=True):
        if len(at):
            found += counted(v[:, None] * x[at], binning)
    return found


def counted_product_pairs(
    v: Tensor, x: Tensor, numbers: Tensor, one: Binning, other: int
) -> Tensor:
    """How many pairs of a product and of the number ``(d, c)`` are in each pair of bins.

    Products next to zero are told from signs: for all samples together, by matrix products.
    """
    found = torch.zeros(one.bins.count, other, dtype=torch.int64, device=v.device)
    near = _near(v, x, one) if v.numel() and x.numel() else None
    if (zero := one.zero) is not None and near is not None:
        below = (near & (v < 0)).float().T @ (x > 0).float()
        if bool((x < 0).any()):
            below += (near & (v > 0)).float().T @ (x < 0).float()
        whole = near.sum(0)[:, None].expand_as(below)
        for at, weights in ((zero - 1, below), (zero, whole - below)):
            flat = numbers.flatten(), weights.flatten().double()
            found[at] += torch.bincount(*flat, minlength=other).to(torch.int64)
    size = max(1, BLOCK // max(1, x.shape[1]))
    rest = torch.ones_like(v, dtype=torch.bool) if near is None else ~near
    for rows in torch.split(rest.nonzero(), size):
        n, d = rows.unbind(1)
        found += counted_pairs(v[n, d][:, None] * x[n], numbers[d], one, other)
    return found
