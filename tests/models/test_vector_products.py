"""Vector-Jacobian products of several outputs: as autograd has them, and without its imports."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.graph import get_gradient_edge

from tests.strategies import assert_close
from tnconv.models.vector_products import vector_products

pytestmark = pytest.mark.usefixtures("float64")


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.complex128]


@given(
    count=st.integers(1, 3),
    shared=st.booleans(),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=3, max_size=3),
    seed=st.integers(0, 9),
)
def test_products_are_those_of_autograd(
    count: int, shared: bool, dtypes: list[torch.dtype], seed: int
) -> None:
    """Of leaves, of an output itself, of values between and of what nothing depends on."""
    torch.manual_seed(seed)
    x, unused = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    between = torch.tanh(x)
    outputs = [between * k if shared else torch.randn(2, 3) @ between for k in range(1, count + 1)]
    outputs = [y.to(dtype) for y, dtype in zip(outputs, dtypes, strict=False)]
    vectors = [torch.randn_like(y) for y in outputs]
    inputs = [x, unused, get_gradient_edge(between), get_gradient_edge(outputs[0])]
    how = {"retain_graph": True, "allow_unused": True}
    expected = torch.autograd.grad(outputs, inputs, vectors, **how)
    for _ in range(2):  # the graph stays
        with torch.no_grad():
            found = vector_products(outputs, inputs, vectors)
        for one, other in zip(found, expected, strict=True):
            assert (one is None) is (other is None)
            if one is not None and other is not None:
                assert_close(one, other, 1e-12)
    assert found[1] is None and not any(each.requires_grad for each in found if each is not None)


PROGRAM = """
import sys, torch, tnconv
from torch import nn
model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
batch = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
tnconv.low_rank_ggn(model, nn.CrossEntropyLoss(), *batch).eigvalsh()
print(*({"sympy", "torch._dynamo"} & sys.modules.keys()))
"""


def test_a_batch_imports_no_symbolic_algebra() -> None:
    """``torch.autograd.grad`` with vectors would: a tenth of a small network's peak memory."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stdout + run.stderr
