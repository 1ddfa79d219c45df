"""The displacement route: products that tap pairs share, on every geometry that it claims."""

from math import inf
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import Case, assert_close, geometries, operands_for
from tnconv.codegen import compile, search
from tnconv.codegen.lowering.writer import Writer
from tnconv.codegen.programs.program import Program
from tnconv.codegen.routes import displaced_products, displacement
from tnconv.diagrams import (
    Expression,
    conv,
    ggn_block,
    gradient_norms,
    kfac_expand,
    kfac_reduce,
)


def displaced(network: Expression) -> list[Program]:
    """A program for every plan that takes the route, however slow."""
    with (
        patch.object(search, "HOPELESS", inf),
        patch.multiple(displacement, AS_FAST=inf, ENOUGH=inf),
    ):
        program = compile(network, routes=["displacement"])
    plans = [plan for plan in program.terms[0] if "displacement" in plan.routes]
    return [type(program)(network, ((plan,),), ()) for plan in plans]


def check(network: Expression, programs: list[Program]) -> None:
    operands = operands_for(network)
    for program in programs:
        assert_close(program(**operands), network.reference(**operands), 1e-10)


@given(case=geometries(max_dims=3, empty=False))
def test_equals_the_reference_on_any_geometry(case: Case) -> None:
    network = kfac_expand(case.input_shape, case.kernel_size, **case.kwargs)
    check(network, displaced(network))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [0, ((2, 0), (0, 1))])
def test_is_offered(stride: int, dilation: int, groups: int, padding: object) -> None:
    options = {"stride": stride, "dilation": dilation, "groups": groups, "padding": padding}
    network = kfac_expand((2, 4, 13, 11), (3, 4), **options)  # type: ignore[arg-type]
    programs = displaced(network)
    assert len(programs) > (stride == dilation == 1)  # in one dimension, and in two
    check(network, programs)


@given(taps=st.integers(2, 5), stride=st.integers(1, 3), dilation=st.integers(1, 3))
def test_one_dimension(taps: int, stride: int, dilation: int) -> None:
    network = kfac_expand((2, 3, 17), taps, stride=stride, dilation=dilation, padding=2)
    check(network, displaced(network))


@given(case=geometries(max_dims=3, empty=False))
def test_the_least_seconds_of_products_are_a_bound(case: Case) -> None:
    network = kfac_expand(case.input_shape, case.kernel_size, **case.kwargs)
    written: list[tuple[float, float]] = []

    def block_rows(writer: Writer, *arguments: Any) -> Any:
        found = displaced_products.block_rows(writer, *arguments)
        written.append((sum(arguments[3]), found[0].seconds - writer.seconds))
        return found

    with patch.object(displacement, "block_rows", block_rows):
        programs = displaced(network)
    assert len(written) >= len(programs)
    for least, taken in written:
        assert least <= taken * (1 + 1e-9)


def test_shares_products() -> None:
    """3x3 taps: 13 products of the core and strips, not 45, and no unfolded input."""
    x = (8, 64, 32, 32)
    network = kfac_expand(x, 3, padding=1)
    flops = [
        sum(step.kernel.flops for step in plan.steps)
        for plan in compile(network, routes=["displacement"]).terms[0]
        if "displacement" in plan.routes
    ]
    unfolded = 2 * (64 * 9) ** 2 * 8 * 32 * 32
    assert min(flops) < 0.3 * unfolded


def test_windows_that_do_not_meet_are_not_displaced() -> None:
    """In squared gradients the taps are output positions: hundreds of pairs share nothing."""
    network = gradient_norms(conv((8, 64, 31, 31), (192, 64, 5, 5), padding=2))
    assert not displaced(network)


@pytest.mark.parametrize(
    "network",
    [
        kfac_reduce((2, 3, 9, 9), 3),
        kfac_expand((2, 3, 5), 3, transposed=True),
        ggn_block(conv((2, 2, 7), (3, 2, 3))),
    ],
)
def test_other_grams_keep_their_values(network: Expression) -> None:
    operands = operands_for(network)
    for plan in (program := compile(network)).terms[0]:
        single = type(program)(network, ((plan,),), ())
        assert_close(single(**operands), network.reference(**operands), 1e-10)


def test_differentiable_twice_and_mapped() -> None:
    network = kfac_expand((2, 2, 6, 5), 3, padding=1)
    x = torch.randn(2, 2, 6, 5, dtype=torch.float64).requires_grad_()
    stacked = torch.randn(3, 2, 2, 6, 5, dtype=torch.float64)
    for program in displaced(network):
        assert torch.autograd.gradcheck(program.run, [x], fast_mode=True)
        assert torch.autograd.gradgradcheck(program.run, [x], fast_mode=True)
        looped = torch.stack([program.run(each) for each in stacked])
        assert_close(torch.func.vmap(program.run)(stacked), looped, 1e-12)
