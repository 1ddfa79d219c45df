"""Every shipped diagram in more dimensions than torch has, as its program and as its definition."""

from collections.abc import Callable

import pytest
import torch

from tests.strategies import SUMS, ZOO, Case, assert_close, operands_for
from tnconv.codegen import compile
from tnconv.diagrams import Sum

CASES = {
    4: Case(
        (2, 2, 3, 4, 2, 3), (4, 1, 2, 2, 1, 2), (2, 1, 1, 3),
        ((1, 0), (0, 0), (0, 1), (1, 1)), (1, 2, 1, 1), 2,
    ),
    5: Case(
        (1, 2, 2, 3, 2, 1, 3), (2, 2, 1, 2, 2, 1, 2), (1, 2, 1, 1, 2),
        ((0, 0), (1, 0), (0, 0), (1, 1), (0, 1)), (1, 1, 1, 2, 1), 1,
    ),
}  # fmt: skip


SAMPLED: dict[str, Callable[[Case], Sum]] = {
    "sampled_weight_vjp": lambda c: ZOO["conv"](c).vjp("weight").sampled("c", 2).sampled("o3", 1),
    "sampled_input_vjp": lambda c: ZOO["conv"](c).vjp("x").sampled("n", 1).sampled("d", 2),
}
DIAGRAMS = ZOO | SUMS | SAMPLED


@pytest.mark.parametrize("dims", CASES)
@pytest.mark.parametrize("name", sorted(DIAGRAMS))
def test_program_equals_reference(name: str, dims: int) -> None:
    network = DIAGRAMS[name](CASES[dims])
    operands = operands_for(network)
    expected = network.reference(**operands)
    value = compile(network)(**operands)
    assert value.shape == torch.Size(network.shape)
    assert_close(value, expected, 1e-10)
