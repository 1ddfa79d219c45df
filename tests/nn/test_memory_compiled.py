"""Memory-saving layers in compiled programs, forward and backward."""

import copy

import pytest
import torch

from tests.nn.memory_cases import CASES, D, close, pair


@pytest.mark.parametrize(("layer", "shape", "reader"), CASES[::5], ids=str)
def test_compiles(layer, shape, reader):
    _, saving = pair(copy.deepcopy(layer).eval(), reader)
    x = torch.randn(shape, **D, requires_grad=True)
    torch._dynamo.reset()
    y = torch.compile(saving, fullgraph=True, backend="aot_eager")(x)
    close(y, saving(x), 1e-12)
    v = torch.randn_like(y)
    (dx,), (ex,) = (torch.autograd.grad(result, x, v) for result in (saving(x), y))
    close(ex, dx, 1e-10)
