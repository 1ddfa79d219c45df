"""The strides that the planner assumes are those of torch."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.codegen.test_mirrored import natively
from tnconv.codegen.lowering.layouts import of_entries
from tnconv.codegen.lowering.strided import operand
from tnconv.codegen.lowering.writer import FLIP, Writer
from tnconv.diagrams import conv

Shape = tuple[int, ...]


@st.composite
def operands(draw: st.DrawFn, count: int) -> tuple[Shape, list[torch.Tensor]]:
    """A shape, and tensors in any order of memory that broadcast to it."""
    shape = draw(st.lists(st.integers(2, 4), min_size=1, max_size=4))
    kept = [draw(st.sets(st.sampled_from(range(len(shape))))) for _ in range(count - 1)]
    kept.append(set(range(len(shape))).difference(*kept) | {0})
    tensors = []
    for dims in kept:
        order = draw(st.permutations(range(len(shape))))
        sizes = [shape[dim] if dim in dims else 1 for dim in order]
        tensors.append(torch.empty(sizes).permute([order.index(dim) for dim in range(len(shape))]))
    return tuple(shape), tensors


@given(operands(1))
def test_results_of_one_operand(case: tuple[Shape, list[torch.Tensor]]) -> None:
    shape, (tensor,) = case
    whole = tensor.expand(shape).clone(memory_format=torch.preserve_format)
    strides = of_entries(shape, [whole.stride()])
    assert strides == (whole * 2).stride() == whole.flip(0).stride()


@given(operands(2))
def test_results_of_operands_that_broadcast(case: tuple[Shape, list[torch.Tensor]]) -> None:
    shape, tensors = case
    result = tensors[0] * tensors[1]
    assert result.shape == shape
    strides = [tensor.expand(shape).stride() for tensor in tensors]
    assert of_entries(shape, strides) == result.stride()


def test_overlapping_windows_are_summed_one_dimension_at_a_time() -> None:
    """Torch sums the dimension of the smallest step first, here in short rows."""
    images = operand(0, (8, 32, 32))
    windows = images.unfold(1, 5, 1).unfold(2, 5, 1)
    writer, total = Writer().sum(windows, (3, 4))
    assert [step.shape for step in writer.steps] == [(8, 28, 28, 5), (8, 28, 28)]
    assert total.shape == (8, 28, 28)
    apart = images.unfold(1, 4, 4).unfold(2, 4, 4)
    assert len(Writer().sum(apart, (3, 4))[0].steps) == 1


def test_mirrored_kernels_keep_their_order() -> None:
    network = conv((8, 32, 20, 20), (3, 32, 5, 5), padding=2).vjp("x")
    mirrored = next(p for p in natively(network) if p.steps[0].operation is FLIP)
    entries = 8 * 32 * 20 * 20 + 2 * 3 * 32 * 5 * 5  # the result, the kernel, and torch's copy
    assert mirrored.peak_memory() >= 4 * entries
