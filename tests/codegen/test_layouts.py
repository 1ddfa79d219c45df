"""The strides that the planner assumes are those of torch."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tnconv.codegen.arrays import Array, contiguous


@given(
    st.lists(st.integers(2, 4), min_size=1, max_size=4).flatmap(
        lambda shape: st.tuples(st.just(shape), st.permutations(range(len(shape))))
    )
)
def test_elementwise_results(case: tuple[list[int], list[int]]) -> None:
    shape, order = case
    array = Array("x", tuple(shape), contiguous(shape)).permute(order)
    result = Array("y", array.shape, contiguous(array.shape)).laid_out_as(array)
    assert result.strides == (torch.empty(shape).permute(order) * 2).stride()
