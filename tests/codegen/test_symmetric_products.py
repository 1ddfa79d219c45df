"""Products of mirrored halves, by block columns: values, derivatives, transforms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.derivatives import DERIVATIVES
from tnconv import compile
from tnconv.codegen import Program
from tnconv.codegen.lowering.matrices import BLOCKS, GRAM, LEAST_ROWS
from tnconv.diagrams import kfac_expand

CHANNELS = 4 * LEAST_ROWS + 3


def symmetric_product(x: Tensor, blocks: int) -> Tensor:
    """The helper of emitted programs."""
    names: dict[str, object] = {}
    exec(GRAM, names)
    return names["gram"](x, blocks)  # type: ignore[operator, no-any-return]


@given(
    rows=st.integers(1, 150),
    summed=st.integers(1, 9),
    front=st.lists(st.integers(1, 3), max_size=2),
    blocks=st.sampled_from(BLOCKS),
    swapped=st.booleans(),
)
def test_helper_equals_the_product(
    rows: int, summed: int, front: list[int], blocks: int, swapped: bool
) -> None:
    sizes = (summed, rows) if swapped else (rows, summed)
    x = torch.randn(*front, *sizes, dtype=torch.float64)
    x = x.mT if swapped else x
    torch.testing.assert_close(symmetric_product(x, blocks), x @ x.mT, rtol=1e-12, atol=1e-12)


def program() -> Program:
    found = compile(kfac_expand((3, CHANNELS, 17, 11), 1))
    assert "gram(" in found.source
    return found


def plain(x: Tensor) -> Tensor:
    half = x.transpose(0, 1).flatten(1)
    return (half @ half.mT / half.shape[1]).unsqueeze(0)


def test_programs_and_their_derivatives() -> None:
    torch.manual_seed(0)
    run, x = program().run, torch.randn(3, CHANNELS, 17, 11, dtype=torch.float64)
    tangent = torch.randn_like(x)
    torch.testing.assert_close(run(x), plain(x), rtol=1e-10, atol=1e-10)
    for derivative in DERIVATIVES.values():
        actual, expected = derivative(run, x, tangent), derivative(plain, x, tangent)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_programs_in_other_dtypes(dtype: torch.dtype) -> None:
    x = torch.rand(3, CHANNELS, 17, 11).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    expected = plain(x.double())
    error = (program().run(x).double() - expected).abs().max() / expected.max()
    assert error <= tolerance


def test_programs_compile() -> None:
    run, x = program().function, torch.randn(3, CHANNELS, 17, 11, dtype=torch.float64)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-10, atol=1e-10)


def test_peak_memory_is_as_predicted() -> None:
    from benchmarks.measure import peak_memory

    found = compile(kfac_expand((32, 8 * LEAST_ROWS, 9, 9), 1))
    assert "gram(" in found.source
    x = torch.randn(found.operands["x"])
    measured = peak_memory(lambda: found.run(x))
    assert 0.9 * found.peak_memory() <= measured <= found.peak_memory()
