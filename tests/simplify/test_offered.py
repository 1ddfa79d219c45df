from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import ZOO, Case, assert_same, geometries, networks, shipped
from tnconv.diagrams import (
    Axis,
    Tensor,
    TensorNetwork,
    View,
    conv,
    exactly,
    index_pattern,
    kfac_expand,
    unfold,
)
from tnconv.simplify import NORMAL_RULES, OFFERED, VIEW_RULES, Offer, fixed_point, simplify

SIZES = {"n": 2, "i": 9, "o": 9, "p": 9, "k": 3, "l": 3}
X = Tensor("x", View.of(SIZES, "n", "i"))
KERNELS = Tensor("v", View.of(SIZES, "k")), Tensor("w", View.of(SIZES, "l"))


def in_a_row(sizes: dict[str, int], first: tuple[int, int, int], second: tuple[int, int, int]):
    """Two convolutions: i with k gives o, and o with l gives p."""
    sizes = SIZES | sizes
    patterns = index_pattern("k", "o", "i", *first), index_pattern("l", "p", "o", *second)
    return TensorNetwork((X, *KERNELS, *patterns), View.of(sizes, "n", "p"), sizes)


FIRES: dict[str, list[TensorNetwork]] = {
    "polyphase": [
        conv((2, 3, 12), (4, 3, 4), stride=2, padding=1),
        conv((2, 3, 12), (4, 3, 5), stride=2),
        conv((2, 3, 12), (4, 3, 3), dilation=2, padding=1),
        conv((2, 3, 12), (4, 3, 3), dilation=3, padding=1).vjp("x").terms[0],
        conv((2, 3, 13), (4, 3, 10), stride=5, padding=2).vjp("weight").terms[0],
    ],
    "window": [conv((2, 3, 9), (4, 3, 3), padding=1), unfold((2, 3, 9), 3, stride=2, padding=1)],
    "padding": [conv((2, 3, 9), (4, 3, 3), padding=1), conv((2, 3, 10), (4, 3, 3), stride=2)],
    "composition": [
        in_a_row({"o": 7, "p": 5}, (1, 1, 0), (1, 1, 0)),
        in_a_row({"o": 4, "p": 2}, (2, 1, 0), (1, 1, 0)),
        in_a_row({}, (1, 1, 1), (1, 1, 1)),  # a padding in between leaves a mask
    ],
    "displacement": [
        kfac_expand((2, 3, 9), 3, padding=1),
        kfac_expand((2, 3, 9, 8), 3, padding=1, stride=2),
    ],
    "parallel": [
        conv((2, 4, 7, 6), (6, 2, 1, 1), groups=2),
        conv((2, 3, 8, 8), (4, 3, 1, 1)),
        TensorNetwork(
            (Tensor("x", View((8,), (Axis(8, 0, (("a", 4), ("b", 2))),))),),
            View((2, 2), (Axis(2, 0, (("a", 1),)), Axis(2, 0, (("b", 1),)))),
            {"a": 2, "b": 2},
        ),
    ],
}


def test_every_offer_has_an_example() -> None:
    assert set(FIRES) == {offer.__name__ for offer in OFFERED}


@pytest.mark.parametrize("offer", OFFERED, ids=lambda offer: offer.__name__)
def test_offers_fire_on_their_examples_and_keep_their_value(offer: Offer) -> None:
    for network in FIRES[offer.__name__]:
        network, _ = fixed_point(network, NORMAL_RULES)
        offered = list(offer(network))
        assert offered
        for after in offered:
            assert_same(network, after)
            assert_same(network, simplify(after).views)  # type: ignore[arg-type]


@pytest.mark.parametrize("offer", OFFERED, ids=lambda offer: offer.__name__)
@given(network=networks(selections=True) | shipped(max_dims=1), data=st.data())
def test_offers_keep_the_value(offer: Offer, network: TensorNetwork, data: st.DataObject) -> None:
    if offered := list(offer(network)):
        assert_same(network, data.draw(st.sampled_from(offered)))


STEPS = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2))


@given(first=STEPS, second=STEPS, sizes=st.tuples(*[st.integers(2, 7)] * 3), closed=st.booleans())
def test_composition_keeps_the_value(
    first: tuple[int, int, int],
    second: tuple[int, int, int],
    sizes: tuple[int, int, int],
    closed: bool,
) -> None:
    network = in_a_row(dict(zip("iop", sizes, strict=True)), first, second)
    if not closed:  # the whole linear map
        network = network.without(0).with_(result=View.of(network.sizes, "i", "p"))
    offered = list(composed(network))
    assert offered
    for after in offered:
        assert_same(network, after)


@given(case=geometries(max_dims=2), data=st.data())
def test_displacement_keeps_the_value(case: Case, data: st.DataObject) -> None:
    network = ZOO[data.draw(st.sampled_from(["kfac_expand", "gradient_dots"]))](case)
    network, _ = fixed_point(network, NORMAL_RULES)
    for after in OFFERED[4](network):
        assert_same(network, after)


def test_polyphase_leaves_a_convolution_without_stride_or_dilation() -> None:
    for network in FIRES["polyphase"][:3]:
        (after, *_) = OFFERED[0](network)
        steps = [sorted(abs(a) for _, a in pattern.terms) for _, pattern in after.patterns]
        assert [1, 1, 1] in steps


def test_composition_makes_one_kernel() -> None:
    """Two kernels of three positions each are one of five; a step doubles the distance."""
    for network, size in zip(FIRES["composition"], (5, 7, 5), strict=True):
        (after, *_) = (n for n in composed(network) if "o" not in n.sizes)
        assert after.sizes["m"] == size


def composed(network: TensorNetwork) -> list[TensorNetwork]:
    offer = {offer.__name__: offer for offer in OFFERED}["composition"]
    return list(offer(network))


def test_displacement_multiplies_each_pair_of_inputs_once_per_difference() -> None:
    """Form V of the offer joins both inputs by [j - i = t], and sums bands over i for each k."""
    network, _ = fixed_point(kfac_expand((2, 3, 9), 3, padding=1), NORMAL_RULES)
    offer = {offer.__name__: offer for offer in OFFERED}["displacement"]
    after, _ = fixed_point(next(offer(network)), VIEW_RULES)
    patterns = [pattern for _, pattern in after.patterns]
    assert Counter(len(pattern.terms) for pattern in patterns) == {3: 1, 2: 1}
    assert max(after.sizes.values()) == 9 and 5 in after.sizes.values()


def test_padding_is_a_view_of_the_input() -> None:
    network = conv((2, 3, 9), (4, 3, 3), padding=1)
    offer = {offer.__name__: offer for offer in OFFERED}["padding"]
    (after,) = offer(network)
    assert after.sizes["i1"] == 11
    (x,) = (node for node in after.tensors if node.name == "x")
    assert Axis(9, -1, (("i1", 1),)) in x.view.axes
    assert exactly({"o1": 1, "k1": 1, "i1": -1}, 0) in after.nodes
