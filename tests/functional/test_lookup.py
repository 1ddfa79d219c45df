"""Which operands lie with their channels last, as programs are looked up."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tnconv.codegen.lowering import layouts
from tnconv.functional.lookup import channels_last


@given(data=st.data(), dims=st.sampled_from([3, 4, 4, 5, 5, 6]))
def test_channels_last_is_told_by_strides(data: st.DataObject, dims: int) -> None:
    """Also where torch maps functions, and in dimensions of size one, whose strides vary."""
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims))
    moved = layouts.channels_moved(dims)
    order = data.draw(st.permutations(range(dims)) | st.just(moved))
    array = torch.rand([sizes[dim] for dim in order]).permute(
        [order.index(dim) for dim in range(dims)]
    )
    if data.draw(st.booleans()):
        array = array.narrow(data.draw(st.integers(0, dims - 1)), 0, 1)
    if data.draw(st.booleans()):
        strides = [
            stride if size > 1 else data.draw(st.integers(0, 9))
            for size, stride in zip(array.shape, array.stride(), strict=True)
        ]
        array = array.as_strided(array.shape, strides)
    last = 3 < dims < 6 and array.stride() == layouts.channels_last(array.shape)
    expected = (0,) if last and not array.is_contiguous() else ()
    assert channels_last((array,)) == expected
    found: list[tuple[int, ...]] = []
    stacked = array.expand(2, *array.shape)
    torch.vmap(lambda each: found.append(channels_last((each,))) or each)(stacked)
    assert found == [expected]
