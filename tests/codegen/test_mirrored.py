"""Native kernels that are slow for torch, replaced: mirrored convolutions, padding made before."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import ZOO, Case, assert_close, geometries, operands_for
from tnconv import Program, compile
from tnconv.codegen.routes import native
from tnconv.diagrams import Expression, conv

GRADIENT = "torch.ops.aten.convolution_backward"
WIDE = conv((2, 32, 9, 40), (32, 1, 3, 15), padding=(1, 7), groups=32)


def natively(network: Expression) -> list[Program]:
    """A program for each plan by native kernels."""
    (plans,) = compile(network, routes=["native"]).terms
    return [Program(network, ((plan,),), ()) for plan in plans if plan.routes == ("native",)]


def check(network: Expression) -> None:
    operands = operands_for(network)
    expected = network.reference(**operands)
    for program in natively(network):
        assert_close(program(**operands), expected, 1e-10)


@pytest.mark.parametrize("dilation", [1, 2])
def test_input_gradients_of_depthwise_kernels_are_mirrored_convolutions(dilation: int) -> None:
    layer = conv((8, 64, 16, 16), (64, 1, 3, 3), padding=1, dilation=dilation, groups=64)
    program = compile(layer.vjp("x"))
    assert "weight.flip(2, 3)" in program.text and GRADIENT not in program.text
    check(layer.vjp("x"))


def test_strided_input_gradients_are_not() -> None:
    layer = conv((2, 32, 9, 9), (32, 1, 3, 3), stride=2, padding=1, groups=32)
    assert GRADIENT in compile(layer.vjp("x"), routes=["native"]).text


@pytest.mark.parametrize(("channels", "mirrored"), [(3, True), (32, False)])
def test_input_gradients_that_sum_few_channels_are(channels: int, mirrored: bool) -> None:
    network = conv((8, 64, 16, 16), (channels, 64, 5, 5), padding=2).vjp("x")
    program = compile(network, routes=["native"])
    assert (".flip(" in program.text) is mirrored
    assert (GRADIENT in program.text) is not mirrored
    check(network)


def test_wide_padding_of_depthwise_kernels_is_made_before() -> None:
    program = compile(WIDE)
    assert "F.pad(x, (7, 7))" in program.text
    assert "padding=(1, 0)" in program.text
    check(WIDE)


@pytest.mark.parametrize(
    "layer",
    [
        conv((2, 32, 9, 40), (32, 1, 3, 13), padding=(1, 6), groups=32),
        conv((2, 32, 40, 9), (32, 1, 15, 3), padding=(7, 1), groups=32),
        conv((2, 4, 9, 40), (4, 4, 3, 15), padding=(1, 7)),
        conv((2, 4, 5, 5, 40), (4, 1, 3, 3, 15), padding=(1, 1, 7), groups=4),
    ],
    ids=["narrow", "rows", "dense", "volumes"],
)
def test_other_padding_is_left_to_the_kernel(layer: Expression) -> None:
    assert "F.pad" not in compile(layer, routes=["native"]).text


@given(case=geometries(empty=False), margin=st.integers(0, 2))
def test_every_geometry_beyond_the_margin(case: Case, margin: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "MARGIN", margin)
        for name in ("conv", "input_vjp", "weight_vjp"):
            check(ZOO[name](case))


@pytest.mark.parametrize(("c", "d"), [(1, 2), (2, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize("operand", [None, "x", "weight"])
def test_groups_of_few_channels_are_depthwise(c: int, d: int, operand: str | None) -> None:
    layer = conv((4, 32 * c, 24, 24), (32 * d, c, 5, 5), padding=2, groups=32)
    network = layer if operand is None else layer.vjp(operand)
    program = compile(network, routes=["native"])
    groups = 32 * d * (4 if operand == "weight" else c)  # samples, which are summed
    assert f"groups={groups})" in program.text
    check(network)


def test_groups_of_whole_vectors_are_left_alone() -> None:
    layer = conv((4, 256, 24, 24), (256, 8, 3, 3), padding=1, groups=32)
    for network in (layer, layer.vjp("x")):
        assert {len(p.steps) for p in natively(network)} == {1}


@pytest.mark.parametrize(
    ("layer", "adds"),
    [
        (conv((8, 64, 32, 32), (3, 64, 3, 3), padding=1), True),
        (conv((8, 64, 32, 32), (3, 64, 3, 3), padding=((0, 2), (4, 1)), dilation=2), True),
        (conv((8, 64, 32, 32), (3, 64, 3, 3), stride=2), False),
        (conv((8, 64, 32, 32), (32, 64, 3, 3), padding=1), False),
    ],
    ids=["few", "dilated", "strided", "many"],
)
def test_convolutions_to_few_channels_add_products_into_place(layer: Any, adds: bool) -> None:
    program = compile(layer)
    assert ("F.fold(" in program.text) is adds
    operands = operands_for(layer)
    assert_close(program(**operands), layer.reference(**operands), 1e-10)


@pytest.mark.parametrize("operand", ["x", "weight"])
def test_gradients_agree_with_autograd(operand: str) -> None:
    program, expected = compile(WIDE), torch.nn.functional.conv2d
    tensors = operands_for(WIDE)
    tensors[operand].requires_grad_()
    ours = program(**tensors)
    theirs = expected(tensors["x"], tensors["weight"], padding=(1, 7), groups=32)
    cotangent = torch.randn_like(ours)
    found, wanted = (torch.autograd.grad(y, tensors[operand], cotangent) for y in (ours, theirs))
    assert_close(found[0], wanted[0], 1e-10)
