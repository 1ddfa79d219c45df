"""Large products of few summed entries, by blocks of rows: values, derivatives, memory."""

import pytest
import torch
from torch import Tensor

from tests.derivatives import DERIVATIVES
from tnconv import compile
from tnconv.codegen import Program
from tnconv.codegen.lowering.matrices import LARGE, ROWS
from tnconv.diagrams import kfac_reduce, linear

CHANNELS = LARGE + ROWS[-1]
BATCH = 4


def factor() -> Program:
    found = compile(kfac_reduce((BATCH, CHANNELS, 5, 7), 1))
    assert f"expand({CHANNELS // ROWS[-1]}, {BATCH}, {CHANNELS})" in found.text
    return found


def plain(x: Tensor) -> Tensor:
    half = x.mean((2, 3))
    return (half.mT @ half / len(x)).unsqueeze(0)


def test_products_of_two_operands() -> None:
    network = linear((BATCH, CHANNELS), (2 * LARGE, CHANNELS)).vjp("weight")
    program = compile(network)
    assert f".reshape({2 * LARGE // ROWS[0]}, {ROWS[0]}, {BATCH}) @" in program.text
    torch.manual_seed(0)
    x = torch.randn(BATCH, CHANNELS, dtype=torch.float64)
    v = torch.randn(BATCH, 2 * LARGE, dtype=torch.float64)
    torch.testing.assert_close(program(x=x, grad_output=v), v.mT @ x, rtol=1e-12, atol=1e-12)


def test_sizes_that_blocks_do_not_divide() -> None:
    program = compile(kfac_reduce((BATCH, LARGE + 1, 5, 7), 1))
    assert "expand(" not in program.text
    x = torch.randn(BATCH, LARGE + 1, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(program.run(x), plain(x), rtol=1e-12, atol=1e-12)


def test_derivatives_and_transforms() -> None:
    torch.manual_seed(0)
    run, x = factor().run, torch.randn(BATCH, CHANNELS, 5, 7, dtype=torch.float64)
    tangent = torch.randn_like(x)
    torch.testing.assert_close(run(x), plain(x), rtol=1e-10, atol=1e-10)
    for derivative in DERIVATIVES.values():
        actual, expected = derivative(run, x, tangent), derivative(plain, x, tangent)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-8)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = torch.rand(BATCH, CHANNELS, 5, 7).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    expected = plain(x.double())
    error = (factor().run(x).double() - expected).abs().max() / expected.max()
    assert error <= tolerance


def test_peak_memory_is_as_predicted() -> None:
    from benchmarks.measure import peak_memory

    found, x = factor(), torch.randn(BATCH, CHANNELS, 5, 7)
    measured = peak_memory(lambda: found.run(x))
    assert 0.9 * found.peak_memory() <= measured <= found.peak_memory() + found.spare_memory
