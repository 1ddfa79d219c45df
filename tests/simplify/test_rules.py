from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.simplify.triggers import TRIGGERS, firing
from tests.strategies import assert_same, networks, shipped
from tnconv.diagrams import (
    Axis,
    Pattern,
    Tensor,
    TensorNetwork,
    View,
    conv,
    delta,
    exactly,
    index_pattern,
    kfac_reduce,
    mask,
)
from tnconv.simplify import NORMAL_RULES, VIEW_RULES, Rule, fixed_point, measure

SIZES = {"a": 4, "b": 4, "k": 2, "o": 3, "i": 6, "one": 1}


def example(*patterns: Pattern, hold: str = "abkoi", unheld: str = "") -> TensorNetwork:
    """One tensor per leg in ``hold`` next to ``patterns``; the result is a scalar."""
    tensors = [Tensor(f"x_{leg}", View.of(SIZES, leg)) for leg in hold]
    legs = {*hold, *unheld, *(leg for pattern in patterns for leg in pattern.legs)}
    sizes = {leg: SIZES[leg] for leg in SIZES if leg in legs}
    return TensorNetwork((*tensors, *patterns), View((), ()), sizes, Fraction(1, 3))


DIAGONALS = Pattern((("a", 1), ("b", 1)), range(2))
FIRES: dict[str, list[TensorNetwork]] = {
    "size_one": [TensorNetwork((Tensor("x", View((1,), ())),), View((), ()), {"one": 1})],
    "scalar": [
        example(hold="a", unheld="b"),
        example(exactly({}, 0), hold="a"),
        example(exactly({}, 1), hold="a"),
    ],
    "trivial": [
        example(mask({"a": 1}, 0, 9), hold="a"),
        example(Pattern((("a", 1), ("b", 1)), range(-3, 3))),
        example(exactly({"a": 1}, 7), hold="a"),
    ],
    "content": [example(exactly({"a": 2, "b": -2}, 4)), example(exactly({"a": 2, "b": -2}, 3))],
    "implied": [
        example(mask({"a": 1, "b": 1}, 0, 3), mask({"a": 1, "b": 1}, 0, 5)),
        TensorNetwork(
            (Tensor("x", View((3,), (Axis(3, 1, (("a", 1),)),))), mask({"a": 1}, 2, 5)),
            View((), ()),
            {"a": 4},
        ),
        example(mask({"a": 1}, 1, 3), mask({"a": 1}, 1, 3), hold="a"),
        example(Pattern((("a", 1),), range(0, 4, 2)), Pattern((("a", 1),), range(0, 4, 3))),
        TensorNetwork(
            (Tensor("x", View((3,), (Axis(3, 1, (("a", 1),)),))), mask({"a": 1}, 0, 2)),
            View((), ()),
            {"a": 4},
        ),
        TensorNetwork(
            (Tensor("x", View((3,), (Axis(3, 1, (("a", 2), ("b", 2))),))), DIAGONALS),
            View((), ()),
            {"a": 4, "b": 4},
        ),
    ],
    "crop": [
        example(mask({"a": 1}, 0, 3), hold="a"),
        example(Pattern((("a", 1),), range(1, 4, 2))),
        example(exactly({"a": 1}, 2)),
        example(index_pattern("k", "o", "i", 1, 1, -2), hold="koi"),  # the first inputs
        example(index_pattern("k", "o", "i", 2, 2, 0), hold="koi"),  # every other input
        example(exactly({"o": 2, "k": 2, "i": -3}, 1), hold="koi"),
    ],
    "difference": [
        example(index_pattern("k", "o", "i", 2, 1, 0), index_pattern("k", "o", "a", 2, 1, 1)),
        example(index_pattern("k", "o", "i", 1, 1, 0), mask({"k": 2, "o": 2}, 1, 4), hold="koi"),
        example(exactly({"i": 1, "k": -2}, 0), exactly({"i": 1, "o": -2}, 0), hold="iko"),
        example(exactly({"a": 2, "b": 3}, 5), Pattern((("a", 1), ("b", 1)), range(1, 4, 2))),
    ],
    "solve": [
        example(delta("a", "b")),
        example(exactly({"a": 1, "b": 1}, 5)),
        example(exactly({"a": 1, "b": 1}, 3)),
    ],
    "solve_step": [
        example(exactly({"k": 1, "o": -2}, 0)),
        example(exactly({"a": 2, "b": -1}, 0)),
        example(exactly({"a": 2, "b": 3}, 8)),
    ],
    "injective_view": [example(index_pattern("k", "o", "i", 2, 1, 0), hold="koi")],
    "free": [
        example(index_pattern("k", "o", "i", 1, 1, 1), hold="ki"),
        example(Pattern((("a", 2), ("o", 1)), range(0, 2)), hold="o"),
    ],
}


def test_every_rule_has_an_example() -> None:
    assert set(FIRES) == set(TRIGGERS) == {rule.__name__ for rule in VIEW_RULES}


@pytest.mark.parametrize("rule", VIEW_RULES, ids=lambda rule: rule.__name__)
def test_rule_fires_on_its_examples_and_keeps_their_value(rule: Rule) -> None:
    for network in FIRES[rule.__name__]:
        after = rule(network)
        assert after is not None
        assert measure(after) < measure(network)
        assert_same(network, after)


@pytest.mark.parametrize("rule", VIEW_RULES, ids=lambda rule: rule.__name__)
@given(network=networks(selections=True) | shipped(max_dims=1))
def test_rule_keeps_the_value_and_lowers_the_measure(rule: Rule, network: TensorNetwork) -> None:
    if (after := rule(network)) is not None:
        assert measure(after) < measure(network)
        assert_same(network, after)


@pytest.mark.parametrize("rule", VIEW_RULES, ids=lambda rule: rule.__name__)
@given(data=st.data())
def test_rule_fires_where_it_must_and_keeps_the_value(rule: Rule, data: st.DataObject) -> None:
    network = data.draw(firing(rule.__name__))
    after = rule(network)
    assert after is not None
    assert measure(after) < measure(network)
    assert_same(network, after)


@given(network=networks(selections=True, max_nodes=6), order=st.permutations(VIEW_RULES))
def test_any_order_of_rules_ends_in_a_normal_form(
    network: TensorNetwork, order: list[Rule]
) -> None:
    after, trace = fixed_point(network, order)
    assert all(rule(after) is None for rule in VIEW_RULES)
    assert all(measure(firing.after) < measure(firing.before) for firing in trace)
    assert_same(network, after)


def test_free_never_builds_an_unfolded_index() -> None:
    after, _ = fixed_point(kfac_reduce((2, 3, 9, 8), 3, padding=1), VIEW_RULES)
    assert all(len(pattern.terms) == 2 for _, pattern in after.patterns)
    assert not any(leg.startswith("o") for leg in after.sizes)


def test_normal_rules_leave_a_strided_convolution_to_native_kernels() -> None:
    after, _ = fixed_point(conv((2, 3, 9, 9), (4, 3, 2, 2), stride=2), NORMAL_RULES)
    assert len(list(after.patterns)) == 2
