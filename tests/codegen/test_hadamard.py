"""Tensors with the same legs are multiplied first, so that routes find two tensors."""

import pytest
from hypothesis import given

from tests.strategies import Case, assert_close, geometries, operands_for
from tnconv import compile
from tnconv.codegen.routes.native import INPUT_GRADIENT, WEIGHT_GRADIENT
from tnconv.diagrams import conv, diagonal_vjp

pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.mark.parametrize("operand", ["x", "weight"])
def test_pullbacks_of_diagonals_by_torchs_kernels(operand: str) -> None:
    @given(case=geometries(empty=False))
    def check(case: Case) -> None:
        layer = conv(case.input_shape, case.weight_shape, **case.kwargs)
        network = diagonal_vjp(layer, operand)
        operands = operands_for(network)
        program = compile(network)
        assert_close(program(**operands), network.reference(**operands), 1e-10)

    check()


def test_the_square_of_an_operand_is_one_tensor() -> None:
    layer = conv((8, 16, 32, 32), (32, 16, 3, 3), padding=1)
    for operand in ("x", "weight"):
        program = compile(diagonal_vjp(layer, operand))
        assert program.steps[0].kernel.kind == "elementwise"
        assert len(program.steps) == 2
        assert program.steps[1].operation in (WEIGHT_GRADIENT, INPUT_GRADIENT)
