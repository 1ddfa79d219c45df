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
    network = conv((8, 192, 8, 8), (192, 192, 3, 3)).vjp("weight", per_sample=True)
    program = compile(network, routes=("window",))
    assert not any("contiguous" in step.code for step in program.steps)
    x, v = (torch.randn(shape, dtype=torch.float64) for shape in program.operands.values())
    weights = [
        torch.nn.grad.conv2d_weight(one, (192, 192, 3, 3), given)
        for one, given in zip(x.split(1), v.split(1), strict=True)
    ]
    operands = dict(zip(program.operands, (x, v), strict=True))
    assert_close(program(**operands), torch.stack(weights), 1e-10)
