"""Displaced products by Fourier transforms: their values, where they are offered, and precision."""

from math import inf
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import assert_close, operands_for
from tnconv.codegen import compile, search
from tnconv.codegen.lowering.strided import operand
from tnconv.codegen.lowering.writer import Writer
from tnconv.codegen.programs.program import Program
from tnconv.codegen.routes import displacement
from tnconv.codegen.routes.spectra import REAL_WAVES, lag_products
from tnconv.codegen.routes.tap_pairs import Dimension
from tnconv.diagrams import TensorNetwork, kfac_expand

KERNEL, POSITIONS = st.tuples(*[st.integers(2, 4)] * 2), st.tuples(*[st.integers(4, 9)] * 2)


def spectral(network: TensorNetwork) -> list[Program]:
    """A program for every plan that transforms, however slow."""
    with (
        patch.object(search, "HOPELESS", inf),
        patch.multiple(displacement, AS_FAST=inf, ENOUGH=inf),
    ):
        program = compile(network, routes=["displacement"])
    programs = [Program(network, ((plan,),), ()) for plan in program.terms[0]]
    return [one for one in programs if any(s.operation is REAL_WAVES for s in one.steps)]


@given(
    kernel=KERNEL,
    size=POSITIONS,
    padding=st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2),
    dilation=st.tuples(*[st.integers(1, 2)] * 2),
    groups=st.sampled_from([1, 2]),
)
def test_equals_the_reference(
    kernel: tuple[int, ...],
    size: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    groups: int,
) -> None:
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    grown = [max(i, r) for i, r in zip(size, reach, strict=True)]
    options = {"padding": padding, "dilation": dilation, "groups": groups}
    network = kfac_expand((2, 4, *grown), kernel, **options)
    operands = operands_for(network)
    for program in spectral(network):
        assert_close(program(**operands), network.reference(**operands), 1e-10)


@pytest.mark.parametrize("padding", [0, 1, ((2, 0), (0, 1))])
@pytest.mark.parametrize("dilation", [1, 2])
def test_is_offered_for_unit_strides(padding: Any, dilation: int) -> None:
    options: dict[str, Any] = {"padding": padding, "dilation": dilation}
    assert spectral(kfac_expand((2, 4, 13, 11), 3, **options))


def test_strided_windows_are_transformed_in_phases() -> None:
    (program,) = spectral(kfac_expand((2, 4, 13, 11), 3, stride=2))
    assert program.terms[0][0].form == "by polyphase"


@given(sizes=POSITIONS, rest=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_products_of_all_displacements(sizes: tuple[int, int], rest: tuple[int, int]) -> None:
    """``Σ_{n,t} x[n, c, t] x[n, c', t + δ]``, in a period that leaves room for every δ."""
    x = torch.randn(2, *sizes, 3, 4).double()
    lags = [(a, b) for a in range(rest[0] + 1) for b in range(-rest[1], rest[1] + 1)]
    periods = sizes[0] + rest[0], sizes[1] + rest[1]
    writer, found = lag_products(Writer(), operand(0, x.shape), lags, periods)
    for (a, b), value in found.items():
        program = _run(writer, value, x)
        left = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, rest[1], 0, rest[0]))
        right = left.roll((-a, -b), (1, 2))
        expected = torch.einsum("gijnc,gijnd->gcd", left, right)
        assert_close(program, expected, 1e-10)


def _run(writer: Writer, value: object, x: torch.Tensor) -> torch.Tensor:
    from tnconv.codegen.lowering.schedule import Schedule
    from tnconv.codegen.programs import source

    schedule = Schedule(writer.steps, (value,))  # type: ignore[arg-type]
    printed = source.printed(source.Definition("products", ["x"], (), schedule, False, 0))
    namespace: dict[str, object] = {}
    exec(source.module(printed), namespace)
    return namespace["products"](x)  # type: ignore[operator, no-any-return]


def test_fewer_operations_where_samples_are_many() -> None:
    """The second convolution of 3C3D: half of the operations of displaced products."""
    network = kfac_expand((64, 64, 14, 14), 3)
    best, *others = compile(network).terms[0]
    flops = [sum(step.kernel.flops for step in plan.steps) for plan in (best, *others)]
    assert any(step.operation is REAL_WAVES for step in best.steps)
    assert flops[0] < 0.55 * min(flops[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_transformed_in_single_precision(dtype: torch.dtype) -> None:
    network = kfac_expand((3, 4, 9, 8), 3, padding=1)
    x = torch.randn(3, 4, 9, 8).to(dtype)
    for program in spectral(network):
        found, expected = program(x=x), program(x=x.float())
        assert torch.equal(found, expected.to(dtype))


def test_differentiable_twice_mapped_and_complex() -> None:
    network = kfac_expand((2, 2, 6, 5), 3, padding=1)
    x = torch.randn(2, 2, 6, 5, dtype=torch.float64).requires_grad_()
    several = torch.randn(3, 2, 2, 6, 5, dtype=torch.float64)
    for program in spectral(network):
        assert torch.autograd.gradcheck(program.run, [x], fast_mode=True)
        assert torch.autograd.gradgradcheck(program.run, [x], fast_mode=True)
        looped = torch.stack([program.run(each) for each in several])
        assert_close(torch.func.vmap(program.run)(several), looped, 1e-12)
        z = torch.complex(several[0], several[1])
        assert_close(program.run(z), network.reference(x=z), 1e-10)


def test_padding_is_not_multiplied() -> None:
    """Of 3x3 taps on padded images two rows lie beside windows, and none for neighbours."""
    x = Dimension((0, 1), ("i", "j"), ("k", "l"), 9, 3, 1, 1, 1, 9)
    same, next_to, apart = x.pairs(symmetric=True)
    assert [length for _, length in same.others] == [1, 1, 1]
    assert same.whole.core == (1, 9) and next_to.others == apart.others == []
