"""Sums over samples that are read off what another network needs of each sample."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import Case, assert_close, geometries, operands_for, shipped
from tnconv import Program, compile
from tnconv.codegen import ROUTES, planner
from tnconv.codegen.lowering.covers import Cover
from tnconv.codegen.lowering.finish import finished
from tnconv.diagrams import (
    TensorNetwork,
    conv,
    ggn_diagonal,
    gradient_norms,
    gradient_sum,
    linear,
    per_sample_gradients,
)

pytestmark = pytest.mark.usefixtures("double_precision")


def late(network: TensorNetwork) -> list[Program]:
    """All programs that sum a network's shared leg last."""
    start = Cover.of(network, {name: at for at, name in enumerate(network.operands)})
    tried = {name: route for name, route in ROUTES.items() if name != "loop"}
    found = [
        finished(cover, "as given", "auto", "contiguous")
        for cover in planner.summed_late(start, tried)
    ]
    return [Program(network, ((plan,),), ()) for plan in found if plan is not None]


@given(case=geometries(max_dims=3, empty=False))
def test_gradients_of_any_convolution(case: Case) -> None:
    network = gradient_sum(conv(case.input_shape, case.weight_shape, **case.kwargs))
    found = late(network)
    assert found
    for program in found:
        operands = operands_for(network)
        assert_close(program(**operands), network.reference(**operands), 1e-10)


@given(network=shipped(max_dims=2))
def test_wherever_it_applies(network: TensorNetwork) -> None:
    for program in late(network):
        operands = operands_for(network)
        assert_close(program(**operands), network.reference(**operands), 1e-10)


@given(case=geometries(max_dims=2, empty=False), data=st.data())
def test_beside_what_needs_each_sample(case: Case, data: st.DataObject) -> None:
    layer = conv(case.input_shape, case.weight_shape, **case.kwargs)
    kinds = (per_sample_gradients, gradient_norms, ggn_diagonal)
    some = data.draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3, unique=True))
    networks = [gradient_sum(layer), *(kind(layer) for kind in some)]
    operands = operands_for(networks[1])
    for value, network in zip(compile(networks)(**operands), networks, strict=True):
        assert_close(value, network.reference(**operands), 1e-10)


@pytest.mark.parametrize("of_each", [per_sample_gradients, gradient_norms, ggn_diagonal])
@pytest.mark.parametrize("groups", [1, 4])
def test_no_product_is_computed_twice(of_each: object, groups: int) -> None:
    """The gradient beside a quantity costs less than half of what it costs alone."""
    assert callable(of_each)
    layer = conv((64, 64, 14, 14), (96, 64 // groups, 3, 3), groups=groups)
    gradient, each = gradient_sum(layer), of_each(layer)
    alone, both = compile([each]).schedule.seconds, compile([gradient, each]).schedule.seconds
    assert both - alone < 0.6 * compile(gradient).schedule.seconds


def test_what_no_other_network_shares_is_summed_inside_of_the_product() -> None:
    layer = linear((64, 512), (256, 512))
    program = compile([gradient_sum(layer), gradient_norms(layer)])
    assert "late sum" not in program.terms[0][0].routes
