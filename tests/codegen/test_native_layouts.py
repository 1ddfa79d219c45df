"""Layouts of operands: plans are made for them, and results have that of torch's own kernels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import Case, assert_close, geometries
from tnconv import compile, functional
from tnconv.codegen.lowering.layouts import is_channels_last
from tnconv.diagrams import conv, kfac_expand

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


@given(
    case=geometries(max_dims=2, empty=False),
    operand=st.sampled_from([None, "weight", "x"]),
    lies=st.sampled_from(["all", "first", "second"]),
    route=st.sampled_from([None, "native", "window", "dense"]),
)
def test_any_operand_with_channels_last(
    case: Case, operand: str | None, lies: str, route: str | None
) -> None:
    """Values stay, and the result lies as its plan says: as an operand of as many dimensions."""
    layer = conv(case.input_shape, case.weight_shape, **case.kwargs)
    network = layer.terms[0] if operand is None else layer.vjp(operand).terms[0]
    names = [*network.operands]
    last = names if lies == "all" else names[lies == "second" :][:1]
    last = [name for name in last if len(network.operands[name]) in FORMATS]
    arrays = {name: torch.randn(shape).double() for name, shape in network.operands.items()}
    for name in last:
        arrays[name] = arrays[name].contiguous(memory_format=torch.channels_last)
    program = compile(network, channels_last=last, **({"routes": [route]} if route else {}))
    found = program(**arrays)
    assert_close(found, network.reference(**arrays), 1e-10)
    (planned,) = program.schedule.outputs
    pairs = zip(found.shape, found.stride(), planned.strides, strict=True)
    assert all(size < 2 or one == other for size, one, other in pairs)
    if any(len(network.operands[name]) == len(network.shape) for name in last):
        assert found.is_contiguous(memory_format=torch.channels_last)


@given(st.permutations(range(4)), st.lists(st.integers(1, 4), min_size=4, max_size=4))
def test_what_torch_takes_as_channels_last(order: list[int], shape: list[int]) -> None:
    array = torch.empty([shape[dim] for dim in order]).permute([order.index(d) for d in range(4)])
    padded = torch.nn.functional.pad(array, (1, 1, 1, 1))
    expected = padded.is_contiguous(memory_format=torch.channels_last)
    if min(shape) > 1:  # others are ambiguous in the result
        assert is_channels_last(tuple(array.shape), array.stride()) == expected


@pytest.mark.parametrize("kernel", [1, 3])
def test_functions_keep_channels_last(kernel: int) -> None:
    """As torch's own, in eager mode, within a traced graph, and in functions that are mapped."""
    x = torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last)
    weight = torch.randn(12, 8, kernel, kernel).to(memory_format=torch.channels_last)
    expected = torch.nn.functional.conv2d(x, weight)
    traced = torch.compile(functional.conv, fullgraph=True, backend="aot_eager")
    for function in (functional.conv, functional.conv, traced):
        found = function(x, weight)
        assert found.stride() == expected.stride()
        assert_close(found, expected, 1e-5)
    mapped = torch.vmap(lambda image: functional.conv(image, weight))(torch.stack([x, x]))
    assert_close(mapped[1], expected, 1e-5)


def test_one_program_serves_batches_with_channels_last() -> None:
    weight = torch.randn(5, 6, 1, 1)
    for batch in (4, 4, 5, 7, 3):
        x = torch.randn(batch, 6, 7, 7).to(memory_format=torch.channels_last)
        found = functional.conv(x, weight)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert_close(found, torch.nn.functional.conv2d(x, weight), 1e-5)


def test_windows_of_few_channels_are_read_from_a_copy() -> None:
    network = kfac_expand((4, 3, 16, 16), 3, padding=1)
    program = compile(network, channels_last=["x"])
    assert program.source.index("x.contiguous()") < program.source.index(".unfold(")
    x = torch.rand(4, 3, 16, 16).to(memory_format=torch.channels_last)
    for plan in program.terms[0]:
        assert_close(program.taking([plan])(x), network.reference(x=x), 1e-4)


def test_products_of_channels_need_no_copy() -> None:
    program = compile(conv((4, 64, 12, 12), (32, 64, 1, 1)), channels_last=["x", "weight"])
    assert [step.operation.name for step in program.steps] == ["matmul"]


@pytest.mark.parametrize(("name", "shape"), [("y", "is no operand"), ("x", r"\(2, 3, 9\)")])
def test_channels_last_of_what_cannot_be(name: str, shape: str) -> None:
    with pytest.raises(ValueError, match=shape):
        compile(kfac_expand((2, 3, 9), 3), channels_last=[name])


def test_one_pixel_is_no_layout() -> None:
    """Both layouts of one pixel have the same strides but for sizes of one: the plain one stays."""
    found = functional.input_vjp((2, 3, 3, 3), torch.randn(4, 3, 3, 3), torch.randn(2, 4, 1, 1))
    assert found.is_contiguous()
