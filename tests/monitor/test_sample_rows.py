"""Numbers of single samples that are put together from parts, and distances of parameters."""

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tnconv.monitor.sample_rows import SampleRows
from tnconv.monitor.seen import LARGE, distances

Part = tuple[tuple[int, ...], int, Tensor]
"""Parameters, the first sample, and their rows."""


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[int, list[Part]]:
    """Parts of two parameters: one after the other, the second time, or with samples left out."""
    samples = draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    parts: list[Part] = []
    for at in draw(st.permutations([0, 1])):
        dtype = draw(st.sampled_from([torch.float32, torch.float64]))
        for _ in range(draw(st.integers(1, 2))):
            size = draw(st.integers(1, samples))
            starts = range(0, samples, size)
            kept = [n for n in starts if draw(st.integers(0, 4))] or [0]
            for first in kept:
                count = min(size, samples - first)
                rows = torch.rand(1, count, generator=generator, dtype=dtype)
                parts.append(((at,), first, rows))
    return samples, parts


@given(arrived=arrivals())
def test_parts_add_up(arrived: tuple[int, list[Part]]) -> None:
    """By sample and by parameter, whatever arrives in which order."""
    samples, parts = arrived
    rows = SampleRows(samples, torch.device("cpu"), torch.float64)
    expected = torch.zeros(2, samples, dtype=torch.float64)
    for numbers, first, own in parts:
        rows.add(numbers, first, own)
        expected[numbers[0], first : first + own.shape[1]] += own[0].double()
    how = {"rtol": 1e-12, "atol": 1e-12}
    assert torch.allclose(rows.by_sample(), expected.sum(0), **how)
    assert torch.allclose(rows.added(), expected.sum(0, keepdim=True), **how)
    found = dict(rows.by_parameter())
    by_number = torch.tensor([found[0], found[1]], dtype=torch.float64)
    assert torch.allclose(by_number, expected.sum(1), **how)


@given(
    sizes=st.lists(st.sampled_from([0, 1, 7, LARGE - 1, LARGE + 3]), min_size=1, max_size=5),
    kinds=st.lists(
        st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), min_size=5
    ),
)
def test_distances(sizes: Sequence[int], kinds: Sequence[torch.dtype]) -> None:
    """Of parameters large and small, in any dtypes, each in its place."""
    generator = torch.Generator().manual_seed(0)
    pairs = [
        [torch.randn(size, generator=generator).to(kind) for _ in range(2)]
        for size, kind in zip(sizes, kinds, strict=False)
    ]
    found = distances([a for a, _ in pairs], [b for _, b in pairs])
    for distance, (a, b) in zip(found, pairs, strict=True):
        expected = float((a.double() - b.double()).norm())
        assert abs(distance - expected) <= 1e-5 * max(1.0, expected)
