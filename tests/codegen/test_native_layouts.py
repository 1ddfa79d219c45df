"""Native kernels get their operands in one layout, and give results in that of torch's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import Case, assert_close, geometries
from tnconv import compile, functional
from tnconv.diagrams import conv

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@given(case=geometries(max_dims=3, empty=False), last=st.booleans())
def test_input_gradients_in_either_layout(case: Case, last: bool) -> None:
    layer = conv(case.input_shape, case.weight_shape, **case.kwargs)
    network = layer.vjp("x").terms[0]
    arrays = {name: torch.randn(shape).double() for name, shape in network.operands.items()}
    if last and len(case.input_shape) in FORMATS:
        memory_format = FORMATS[len(case.input_shape)]
        arrays = {name: x.contiguous(memory_format=memory_format) for name, x in arrays.items()}
    program = compile(network, routes=["native"])
    assert_close(program(**arrays), network.reference(**arrays), 1e-10)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_layout_is_that_of_torch(groups: int, stride: int) -> None:
    x = torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(12, 8 // groups, 3, 3)
    y = torch.nn.functional.conv2d(x, weight, stride=stride, padding=1, groups=groups)
    grad_output = torch.randn_like(y)
    assert grad_output.is_contiguous(memory_format=torch.channels_last)
    (expected,) = torch.autograd.grad(y, x, grad_output)
    layer = conv(tuple(x.shape), tuple(weight.shape), stride=stride, padding=1, groups=groups)
    program = compile(layer.vjp("x"), routes=["native"])
    found = program(grad_output=grad_output, weight=weight)
    assert found.stride() == expected.stride()
    assert_close(found, expected, 1e-5)
    mapped = torch.vmap(lambda v: program(grad_output=v, weight=weight))
    assert_close(mapped(grad_output[None])[0], expected, 1e-5)


def test_one_pixel_is_no_layout() -> None:
    """Both layouts of one pixel have the same strides but for sizes of one: the plain one stays."""
    found = functional.input_vjp((2, 3, 3, 3), torch.randn(4, 3, 3, 3), torch.randn(2, 4, 1, 1))
    assert found.is_contiguous()
