"""Products of two tensors are written as they are wanted."""

import torch

from tests.strategies import assert_close, operands_for
from tnconv.codegen import compile
from tnconv.diagrams import conv, linear, per_sample_gradients


def test_outer_products_need_no_copy_of_the_result() -> None:
    """Per-sample gradients ``v[n, d] x[n, c]``, where x comes first and d is wanted before c."""
    network = per_sample_gradients(linear((8, 96), (64, 96)))
    program, operands = compile(network), operands_for(network)
    assert [step.shape for plan in program.terms[0][:1] for step in plan.steps] == [(8, 64, 96)]
    value = program(**operands)
    assert value.is_contiguous() and value.shape == torch.Size((8, 64, 96))
    assert_close(value, network.reference(**operands), 1e-12)


def test_the_copy_of_a_result_in_another_order_is_priced() -> None:
    """Per-sample gradients of few positions: reordering the result would cost most of the time."""
    network = conv((2, 48, 6, 6), (48, 48, 3, 3)).vjp("weight", per_sample=True)
    program = compile(network, routes=("window",))
    assert not any("contiguous" in step.code for step in program.steps)
    operands = operands_for(network)
    assert_close(program(**operands), network.reference(**operands), 1e-10)
