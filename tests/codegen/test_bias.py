"""A vector that is added to the channels of a native convolution is its bias."""

import pytest
import torch
from hypothesis import given

from tests.strategies import Case, assert_close, geometries, operands_for
from tnconv import compile
from tnconv.diagrams import conv, conv_transpose, with_bias

pytestmark = pytest.mark.usefixtures("double_precision")


@given(case=geometries(empty=False))
def test_layers_with_a_bias(case: Case) -> None:
    network = with_bias(conv(case.input_shape, case.weight_shape, **case.kwargs))
    operands = operands_for(network)
    assert_close(compile(network)(**operands), network.reference(**operands), 1e-10)


@pytest.mark.parametrize(("shape", "groups"), [((16, 6, 3, 3), 1), ((16, 3, 3, 3), 2)])
def test_the_kernel_adds_it(shape: tuple[int, ...], groups: int) -> None:
    network = with_bias(conv((4, 6, 12, 12), shape, padding=1, groups=groups))
    program = compile(network, routes=["native"])
    assert len(program.steps) == 1
    assert "bias=bias)" in program.text
    operands = operands_for(network)
    expected = torch.conv2d(**operands_of_torch(operands), padding=1, groups=groups)
    assert_close(program(**operands), expected, 1e-10)


def operands_of_torch(operands: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"input": operands["x"], "weight": operands["weight"], "bias": operands["bias"]}


def test_a_convolution_that_another_network_needs_runs_once() -> None:
    layer = conv((4, 6, 12, 12), (16, 6, 3, 3), padding=1)
    network = with_bias(layer)
    program = compile([network, layer], routes=["native"])
    assert program.text.count("F.conv2d(") == 1
    operands = operands_for(network)
    shifted, plain = program(**operands)
    given = operands_of_torch(operands)
    assert_close(shifted, torch.conv2d(**given, padding=1), 1e-10)
    assert_close(plain, torch.conv2d(**given | {"bias": None}, padding=1), 1e-10)


def test_kernels_without_a_bias() -> None:
    network = with_bias(conv_transpose((4, 6, 12, 12), (6, 16, 3, 3)))
    operands = operands_for(network)
    program = compile(network, routes=["native"])
    assert_close(program(**operands), network.reference(**operands), 1e-10)
