import pytest
from hypothesis import given

from tests.strategies import ZOO, Case, networks
from tnconv.diagrams import Pattern, TensorNetwork, conv, delta, kfac_reduce
from tnconv.simplify import constants, mirrored, simplify

CASE = Case((2, 4, 7, 6), (6, 2, 3, 2), 2, 1, 1, 2)
GRAMS = (
    "kfac_expand",
    "kfac_reduce",
    "gradient_norms",
    "gradient_dots",
    "ggn_diagonal",
    "ggn_block",
)


@pytest.mark.parametrize("name", GRAMS)
def test_gram_networks_have_mirrored_halves(name: str) -> None:
    network = ZOO[name](CASE)
    for form in (network, simplify(network).normal, simplify(network).views):
        assert isinstance(form, TensorNetwork)
        exchange = mirrored(form)
        assert exchange is not None
        assert all(exchange[exchange[at]] == at for at in exchange)
        moved = sum(exchange[at] != at for at, node in enumerate(form.nodes))
        assert moved == len(form.nodes) or name == "ggn_diagonal"


@pytest.mark.parametrize("name", ["conv", "weight_vjp", "unfold", "ggn_vector_product"])
def test_other_networks_have_none(name: str) -> None:
    assert mirrored(ZOO[name](CASE)) is None


@given(network=networks(selections=True, max_nodes=6))
def test_an_exchange_maps_nodes_to_equal_ones(network: TensorNetwork) -> None:
    if (exchange := mirrored(network)) is not None:
        order = [exchange[at] for at in range(len(network.nodes))]
        assert sorted(order) == list(range(len(order)))
        kinds = [type(node) for node in network.nodes]
        assert [kinds[at] for at in order] == kinds


@given(network=networks(selections=True, max_nodes=6))
def test_constants_are_all_patterns_once(network: TensorNetwork) -> None:
    parts = constants(network)
    assert sorted(at for part in parts for at in part) == [at for at, _ in network.patterns]


def test_constants_grow_over_legs_that_only_patterns_hold() -> None:
    network = conv((2, 3, 9), (4, 3, 3))
    assert constants(network) == ((1,),)
    sizes = {**network.sizes, "j": 9}
    (x, pattern, weight) = network.nodes
    assert isinstance(pattern, Pattern)
    longer = network.with_(
        (x, pattern.substitute("i1", 0, (("j", 1),)), delta("j", "i1"), weight), sizes=sizes
    )
    assert constants(longer) == ((1, 2),)
    assert all(len(part) == 1 for part in constants(kfac_reduce((2, 3, 9), 3)))
