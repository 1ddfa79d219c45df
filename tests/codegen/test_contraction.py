"""Products of two tensors are written as they are wanted."""

import torch

from tests.strategies import assert_close, operands_for
from tnconv.codegen import compile
from tnconv.diagrams import linear, per_sample_gradients


def test_outer_products_need_no_copy_of_the_result() -> None:
    """Per-sample gradients ``v[n, d] x[n, c]``, where x comes first and d is wanted before c."""
    network = per_sample_gradients(linear((8, 96), (64, 96)))
    program, operands = compile(network), operands_for(network)
    assert [step.shape for plan in program.terms[0][:1] for step in plan.steps] == [(8, 64, 96)]
    value = program(**operands)
    assert value.is_contiguous() and value.shape == torch.Size((8, 64, 96))
    assert_close(value, network.reference(**operands), 1e-12)
