import pytest
from hypothesis import given

from tests.strategies import Case, assert_same, geometries, networks, shipped
from tnconv.diagrams import TensorNetwork, conv, kfac_expand, kfac_reduce, unfold, with_bias
from tnconv.simplify import NORMAL_RULES, VIEW_RULES, simplify


@given(network=networks(selections=True, max_nodes=6) | shipped())
def test_both_forms_have_the_value_and_are_normal(network: TensorNetwork) -> None:
    result = simplify(network)
    assert isinstance(result.normal, TensorNetwork) and isinstance(result.views, TensorNetwork)
    assert_same(network, result.normal)
    assert_same(network, result.views)
    assert all(rule(result.normal) is None for rule in NORMAL_RULES)
    assert all(rule(result.views) is None for rule in VIEW_RULES)


@given(network=networks(selections=True) | shipped(max_dims=1))
def test_the_trace_leads_from_the_network_to_its_forms(network: TensorNetwork) -> None:
    result = simplify(network)
    chain = [network, *(firing.after for firing in result.trace)]
    assert all(f.before == before for f, before in zip(result.trace, chain, strict=False))
    assert result.normal in chain
    assert chain[-1] == result.views
    names = {rule.__name__ for rule in VIEW_RULES}
    assert all(firing.rule in names for firing in result.trace)
    for firing in result.trace:
        patterns = [pattern for _, pattern in firing.before.patterns]
        assert all(pattern in patterns for pattern in firing.where)
        assert str(firing).startswith(firing.rule) and str(firing).endswith(firing.saved)


def test_equal_networks_are_simplified_once() -> None:
    shapes = (2, 3, 32), (4, 3, 5)
    assert simplify(conv(*shapes)) is simplify(conv(*shapes))


def test_a_firing_says_where_and_what_it_saves() -> None:
    firing = simplify(kfac_reduce((2, 3, 9), 3, padding=1)).trace[1]
    assert str(firing) == "free at Π[o1 + k1 - i1 = 1]: removes legs o1"
    trimmed = simplify(conv((2, 3, 1), (4, 3, 3), padding=1)).trace
    assert any("removes" in str(step) or "cuts" in str(step) for step in trimmed)
    (cut,) = [
        step
        for step in simplify(conv((2, 3, 3), (4, 3, 5), padding=((2, 1),))).trace
        if step.rule == "crop"
    ]
    assert cut.saved == "cuts k1 5 to 4"


@given(case=geometries())
def test_sums_are_simplified_term_by_term(case: Case) -> None:
    network = with_bias(conv(case.input_shape, case.weight_shape, **case.kwargs))
    assert_same(network, simplify(network).normal)
    assert_same(network, simplify(network).views)


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (4, {"stride": 4}),
        (4, {"stride": 4, "padding": 3}),
        (2, {"stride": 3, "padding": 1}),
        (1, {"stride": 2, "padding": 1}),
        (3, {"stride": 5, "dilation": 2}),
        (9, {}),
        (3, {"dilation": 3, "padding": 2}),
    ],
)
def test_injective_geometries_keep_no_pattern(kernel: int, options: dict[str, int]) -> None:
    shape = (2, 3, 9)
    forward = conv(shape, (4, 3, kernel), **options)
    if options == {"dilation": 3, "padding": 2}:
        shape = (2, 3, 5)  # three outputs three apart: dilated twins
        forward = conv(shape, (4, 3, kernel), **options)
    networks = [
        forward,
        forward.vjp("x").terms[0],
        forward.vjp("weight").terms[0],
        forward.jacobian("weight").terms[0],
        forward.jacobian("x").terms[0],
        unfold(shape, kernel, **options),
        kfac_expand(shape, kernel, **options),
        kfac_reduce(shape, kernel, **options),
    ]
    for network in networks:
        views = simplify(network).views
        assert isinstance(views, TensorNetwork)
        assert list(views.patterns) == []
        assert_same(network, views)
