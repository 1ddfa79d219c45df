"""The same diagrams for other batches."""

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import SUMS, ZOO, Case, geometries
from tnconv.diagrams import Expression, TensorNetwork, conv
from tnconv.diagrams.resizing import resized

ANY = {**ZOO, **SUMS}
UNBATCHED = ("unfolded_kernel", "hessian_vjp", "hessian_vjp_reflect")  # no leg n
OTHER_PAIRS = ("ntk_block",)  # of two batches, of which one stays


@pytest.mark.parametrize("name", sorted({*ANY} - {*UNBATCHED, *OTHER_PAIRS}))
@settings(max_examples=max(1, settings.default.max_examples // 20))
@given(case=geometries(max_dims=2, empty=False), sizes=st.tuples(*[st.integers(2, 9)] * 2))
def test_resized_diagrams_are_those_of_the_other_batch(
    name: str, case: Case, sizes: tuple[int, int]
) -> None:
    before, after = (_of(name, case, size) for size in sizes)
    found = resized([before], "n", sizes[1])
    assert found is not None
    (found_one,) = found
    ratio = Fraction(sizes[0], sizes[1])
    for mine, theirs in zip(found_one.terms, after.terms, strict=True):
        assert mine.with_(scale=1) == theirs.with_(scale=1)
        assert theirs.scale / mine.scale in [ratio**power for power in range(3)]


@pytest.mark.parametrize("name", UNBATCHED)
def test_what_has_no_batch_stays(name: str) -> None:
    assert resized([_of(name, Case((4, 2, 7), (3, 2, 3)), 4)], "n", 5) is None


def test_second_copies_of_one_size_follow_and_others_stay() -> None:
    pair = _of("ntk_block", Case((4, 2, 7), (3, 2, 3)), 4)
    (other,) = resized([pair], "n", 6) or (pair,)
    assert [other.operands[name][0] for name in ("x", "other_x")] == [6, 5]
    same = conv((4, 2, 7), (3, 2, 3)).connect(
        conv((4, 2, 7), (3, 2, 3)).rename_operands({"x": "z", "weight": "other"})
    )
    (other,) = resized([same], "n", 6) or (same,)
    assert other.operands["x"] == other.operands["z"] == (6, 2, 7)


def test_legs_that_are_no_whole_axis_stay() -> None:
    net = conv((4, 2, 7), (3, 2, 3))
    assert resized([net], "i", 9) is None  # a pattern holds it
    assert resized([net.narrow("n", 1, 2)], "n", 3) is None  # a part of the operand
    assert resized([net, net.narrow("n", 1, 2)], "n", 3) is None
    assert resized([net], "z", 3) is None
    assert resized([conv((1, 2, 7), (3, 2, 3))], "n", 3) is None


def _of(name: str, case: Case, size: int) -> Expression:
    made: TensorNetwork = ANY[name](replace(case, input_shape=(size, *case.input_shape[1:])))
    return made
