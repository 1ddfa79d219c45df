"""The baseline compiler gives the values of the definitions, on everything that can be compiled."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import (
    SUMS,
    Case,
    assert_close,
    geometries,
    networks,
    operands_for,
    shipped,
)
from tnconv import compile
from tnconv.codegen.baseline import baseline
from tnconv.codegen.lowering.contraction import contraction_path
from tnconv.codegen.lowering.greedy import greedy_path
from tnconv.codegen.lowering.strided import operand
from tnconv.codegen.routes.native import CONVOLUTION
from tnconv.diagrams import Sum, TensorNetwork, conv, kfac_expand, with_bias

pytestmark = pytest.mark.usefixtures("double_precision")


def check(network: TensorNetwork | Sum, **options: Any) -> None:
    operands = operands_for(network)
    program = baseline(network, **options)
    assert_close(program(**operands), network.reference(**operands), 1e-10)


@given(network=networks(selections=True, max_nodes=5))
def test_any_network_of_a_user(network: TensorNetwork) -> None:
    check(network)


@given(network=shipped(max_dims=3))
def test_every_shipped_diagram(network: TensorNetwork) -> None:
    check(network)


@given(case=geometries(max_dims=2), name=st.sampled_from(sorted(SUMS)))
def test_every_shipped_sum(case: Case, name: str) -> None:
    check(SUMS[name](case))


@given(case=geometries(max_dims=4, min_dims=4, empty=False), data=st.data())
def test_four_dimensions(case: Case, data: st.DataObject) -> None:
    network = conv(case.input_shape, case.weight_shape, **case.kwargs)
    every = (network, network.vjp("x"), network.vjp("weight"), with_bias(network))
    check(data.draw(st.sampled_from(every)))


@given(case=geometries(max_dims=2))
def test_several_networks(case: Case) -> None:
    network = conv(case.input_shape, case.weight_shape, **case.kwargs)
    several = network, network.gram(over=("n",)), with_bias(network)
    operands = operands_for(several[2])
    for result, each in zip(baseline(several)(**operands), several, strict=True):
        given = {name: operands[name] for name in each.operands}
        assert_close(result, each.reference(**given), 1e-10)


@given(case=geometries(max_dims=2), dtype=st.sampled_from((torch.float32, torch.bfloat16)))
def test_it_agrees_with_the_searched_program_in_every_precision(
    case: Case, dtype: torch.dtype
) -> None:
    network = with_bias(conv(case.input_shape, case.weight_shape, **case.kwargs))
    exact = operands_for(network)
    operands = {name: array.to(dtype) for name, array in exact.items()}
    results = [make(network)(**operands) for make in (baseline, compile)]
    assert results[0].dtype is dtype
    error = 64 * torch.finfo(dtype).eps
    for result in results:
        assert_close(result.double(), network.reference(**exact), error)
    cast = {name: array.float() for name, array in exact.items()}
    with torch.autocast("cpu", torch.bfloat16):
        under = baseline(network)(**cast)
    assert under.dtype is torch.bfloat16
    assert_close(under.double(), network.reference(**exact), 64 * torch.finfo(under.dtype).eps)


@given(case=geometries(max_dims=2))
def test_complex_operands(case: Case) -> None:
    network = with_bias(conv(case.input_shape, case.weight_shape, **case.kwargs))
    one, other = operands_for(network), operands_for(network, 1)
    real = {name: array for name, array in one.items() if name != "x"}
    mixed = {name: torch.complex(one[name], other[name]) for name in one}
    mixed |= {name: array.to(torch.complex128) for name, array in real.items()}
    result = baseline(network)(**mixed)
    assert_close(result.real, network.reference(**one), 1e-10)


def test_native_kernels_are_taken_as_they_are() -> None:
    network = with_bias(conv((8, 3, 32, 32), (16, 3, 3, 3), stride=2, padding=1))
    (step,) = baseline(network).steps
    x, weight = (operand(at, network.operands[name]) for at, name in enumerate(("x", "weight")))
    assert step.operation is CONVOLUTION and step.value.inputs[:2] == (x, weight)
    assert step.value.attributes[:2] == ((2, 2), (1, 1))


def test_what_takes_longer_than_a_search_is_searched() -> None:
    small, large = (kfac_expand((n, 16, 64, 64), 5, padding=2) for n in (1, 256))
    assert len(baseline(small).terms[0]) == 1 < len(baseline(large).terms[0])


def test_a_limit_that_it_exceeds_is_met_by_a_search() -> None:
    network = kfac_expand((4, 8, 32, 32), 3, padding=1)
    needed = baseline(network).peak_memory()
    assert baseline(network, memory_limit=needed - 1).peak_memory() < needed
    assert len(baseline(network, memory_limit=needed).terms[0]) == 1


@given(data=st.data(), count=st.integers(1, 7))
def test_greedy_paths_contract_everything(data: st.DataObject, count: int) -> None:
    legs = st.lists(st.sampled_from("abcdef"), max_size=4, unique=True)
    inputs = [data.draw(legs) for _ in range(count)]
    held = sorted({leg for legs in inputs for leg in legs})
    output = data.draw(st.lists(st.sampled_from(held), unique=True)) if held else []
    sizes = dict.fromkeys(held, 2)
    path = greedy_path(inputs, output, sizes)
    left = count
    for positions in path:
        assert len({*positions}) == len(positions) and max(positions) < left
        left -= len(positions) - 1
    assert left == 1
    assert len(path) == len(contraction_path(inputs, output, sizes))
