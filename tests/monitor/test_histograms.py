"""Histograms are numpy's, whatever way they are counted in."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tnconv.monitor import histograms, histograms_of_products
from tnconv.monitor.histograms import Binning, counted, counted_pairs
from tnconv.monitor.histograms_of_products import counted_product_pairs, counted_products
from tnconv.monitor.needs import Bins

SPREADS = (1e-9, 1e-3, 0.2, 5.0)


@pytest.fixture
def always_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few entries are counted as many are, in several blocks."""
    for name, size in (("PIECE", 8), ("FEW_PIECES", 4), ("MANY_PIECES", 8)):
        monkeypatch.setattr(histograms, name, size)
    for module in (histograms, histograms_of_products):
        monkeypatch.setattr(module, "BLOCK", 64)
        monkeypatch.setattr(module, "FEW", 1)


@st.composite
def binnings(draw: st.DrawFn) -> Binning:
    """With an edge at zero inside, at an end, or none; scales of either sign."""
    ends = st.sampled_from([(-2.0, 2.0), (-1.0, 3.0), (-0.7, 1.3), (0.0, 1.0), (0.25, 0.5)])
    bins = Bins(draw(st.sampled_from([1, 4, 40, 100, 200])), *draw(ends))
    return Binning(bins, draw(st.sampled_from([1.0, 32.0, -0.3])))


def entries(seed: int, *shape: int) -> Tensor:
    """Of rows with different spreads, with exact zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    spreads = torch.tensor(SPREADS)[torch.randint(4, (shape[0], 1), generator=generator)]
    found = spreads * torch.randn(shape, generator=generator)
    kept = torch.rand(shape, generator=generator) < 0.8
    return torch.where(kept, found, found.sign() * 0.0)


def expected(values: Tensor, binning: Binning) -> Any:
    edges, scaled = binning.edges.numpy(), values.double().numpy().reshape(-1) * binning.scale
    clipped = np.clip(scaled, edges[0], edges[-1])
    return np.histogram(clipped, edges)[0]


def close(found: Tensor, wanted: Any, values: Tensor, binning: Binning) -> bool:
    """Equal but for entries within rounding errors of an edge; around zero exactly."""
    same = found.sum() == values.numel()
    if (zero := binning.zero) is not None and 0 < zero < binning.bins.count:
        same &= int(found[:zero].sum()) == int((values * binning.scale < 0).sum())
    return bool(same) and np.abs(np.cumsum(found.numpy()) - np.cumsum(wanted)).max() <= 1


@pytest.mark.usefixtures("always_large")
@settings(max_examples=25)
@given(binning=binnings(), seed=st.integers(0, 999), rows=st.integers(1, 9), some=st.booleans())
def test_entries(binning: Binning, seed: int, rows: int, some: bool) -> None:
    """With ``some``, most are within a bin of zero."""
    values = entries(seed, rows, 37)
    if some:
        values[1:] *= 1e-6
        values.view(-1)[5::61] *= 1e6
    assert close(counted(values, binning), expected(values, binning), values, binning)


@pytest.mark.usefixtures("always_large", "float64")
@settings(max_examples=25)
@given(
    binning=binnings(),
    seed=st.integers(0, 999),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 50)),
    rectified=st.booleans(),
)
def test_products(
    binning: Binning, seed: int, shape: tuple[int, int, int], rectified: bool
) -> None:
    """Searched, and by turns written out."""
    n, d, c = shape
    v, x = entries(seed, n, d), entries(seed + 1, n, c)
    x = x.relu() if rectified else x
    products = v[:, :, None] * x[:, None]
    wanted = expected(products, binning)
    for cost in (0, 3, 10**6):
        histograms_of_products.SEARCH, before = cost, histograms_of_products.SEARCH
        found = counted_products(v, x, binning)
        histograms_of_products.SEARCH = before
        assert close(found, wanted, products, binning)


@pytest.mark.usefixtures("always_large", "float64")
@settings(max_examples=25)
@given(binning=binnings(), seed=st.integers(0, 999), rows=st.integers(1, 5))
def test_pairs(binning: Binning, seed: int, rows: int) -> None:
    """Of entries and of products, with the bins of parameters."""
    numbers = torch.randint(7, (6, 11), generator=torch.Generator().manual_seed(seed))
    v, x = entries(seed, rows, 6), entries(seed + 1, rows, 11)
    each = v[:, :, None] * x[:, None]
    own = [counted_pairs(each.flatten(1), numbers.flatten(), binning, 7)]
    own.append(counted_product_pairs(v, x, numbers, binning, 7))
    for found in own:
        for at in range(7):
            chosen = each[:, numbers == at]
            assert close(found[:, at], expected(chosen, binning), chosen, binning)
