import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import assert_close
from tnconv.optim.inverses import SMALL, Damped, inverse, inverted

shapes = st.sampled_from([(1, 3, 3), (2, 3, 3), (1, 5, 5), (2, 2, 4, 4), (1, 1, 1)])


def positive(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(shape, dtype=dtype)
    return x @ x.mT


@settings(max_examples=15)
@given(
    st.lists(st.tuples(shapes, st.sampled_from([torch.float32, torch.float64])), max_size=6),
    st.booleans(),
)
def test_together_they_are_what_each_is(
    kinds: list[tuple[tuple[int, ...], torch.dtype]], broken: bool
) -> None:
    """Also where one is not definite in float32, and beside inverses that are known."""
    torch.manual_seed(0)
    pairs: list[Damped] = [
        (positive(shape, dtype), torch.full(shape[:-2], 0.1)) for shape, dtype in kinds
    ]
    if broken:
        pairs.append((torch.ones(1, 8, 8), 1e-9))
    pairs.insert(len(pairs) // 2, torch.eye(2)[None])
    found = inverted(pairs, together=True)
    for value, each in zip(found, pairs, strict=True):
        expected = each if isinstance(each, torch.Tensor) else inverse(*each)
        assert value.shape == expected.shape and value.dtype == expected.dtype
        if not broken:
            assert_close(value, expected, 1e-4 if value.dtype == torch.float32 else 1e-9)
        else:
            assert torch.equal(value, expected)


def test_nothing_to_invert() -> None:
    assert inverted([]) == []


def test_small_matrices_of_a_size_are_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [4, 4, SMALL + 1, 4, SMALL + 1]
    calls, original = [], torch.linalg.cholesky_ex

    def counted(matrix: torch.Tensor) -> object:
        calls.append(tuple(matrix.shape))
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    inverted([(torch.eye(size)[None], 1.0) for size in sizes], together=True)
    assert sorted(calls) == [(1, SMALL + 1, SMALL + 1)] * 2 + [(3, 4, 4)]
