"""Combinations of the rows of one parameter: at once, one after the other, and within limits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tnconv
from tests.strategies import assert_close
from tnconv.operators.low_rank import JacobianRows, combinations
from tnconv.operators.low_rank.combinations import combined
from tnconv.quantities.second_order import columns

pytestmark = pytest.mark.usefixtures("float64")


@st.composite
def rows(draw: st.DrawFn) -> JacobianRows:
    """Rows of a convolution of a random geometry before a linear layer."""
    groups, dims = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    how = {"stride": draw(st.integers(1, 2)), "padding": draw(st.integers(0, 1)), "groups": groups}
    layer = kind(2 * groups, 4, draw(st.integers(1, 3)), **how)
    x = torch.rand(draw(st.integers(1, 4)), 2 * groups, *[5] * dims)
    size = layer(x).flatten(1).shape[1]
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(size, 3))
    source = columns("mc", draw(st.integers(1, 3)), None)
    return JacobianRows.of(model, nn.CrossEntropyLoss(), x, torch.zeros(len(x)).long(), source)


@settings(max_examples=settings().max_examples // 4)
@given(rows=rows(), count=st.integers(1, 5), way=st.sampled_from([0.0, 1.25, float("inf")]),
       at_a_time=st.sampled_from([2, 16]), limit=st.sampled_from([None, 1, 2**20]))  # fmt: skip
def test_combinations(
    rows: JacobianRows, count: int, way: float, at_a_time: int, limit: int | None
) -> None:
    """Every way is the sum over explicit rows; one byte of room is too little for all at once."""
    coefficients = torch.randn(count, rows.vectors, rows.samples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(combinations, "MIXED", way)
        patch.setattr(combinations, "AT_A_TIME", at_a_time)
        for term in rows.terms.values():
            expected = torch.einsum("fmn,mn...->f...", coefficients, term.gradients)
            for _ in range(2):  # by the baseline tier, and by a searched program
                found = combined(term, coefficients, limit)
                assert_close(found.reshape(expected.shape), expected, 1e-10)
            explicit = type(term).known(term.gradients, term.vectors)
            assert_close(combined(explicit, coefficients, limit), expected, 1e-10)


@pytest.mark.parametrize(
    ("way", "limit", "expected"),
    [(float("inf"), None, True), (0.0, None, False), (float("inf"), 1, False)],
)
def test_which_way(
    monkeypatch: pytest.MonkeyPatch, way: float, limit: int | None, expected: bool
) -> None:
    """All at once, unless one after the other is predicted to be faster, or to fit alone."""
    monkeypatch.setattr(combinations, "MIXED", way)
    tnconv.cache_clear()
    x, source = torch.rand(3, 2, 5, 5), columns("mc", 2, None)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 3))
    rows = JacobianRows.of(model, nn.CrossEntropyLoss(), x, torch.zeros(3).long(), source)
    found = combinations._looked_up(rows.terms["0.weight"], torch.randn(4, 2, 3), limit)
    assert (found is not None) is expected
