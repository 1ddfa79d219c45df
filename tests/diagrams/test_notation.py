"""How networks are written."""

import re
from fractions import Fraction

import pytest
from hypothesis import given

from tests.strategies import ZOO, Case, networks
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
    kfac_expand,
    linear,
    mask,
    with_bias,
)
from tnconv.diagrams.notation import equation, form, node

SIZES = {"n": 2, "g": 3, "c": 4, "d": 5, "i1": 7, "one": 1}


@pytest.mark.parametrize(
    ("terms", "offset", "text"),
    [
        ((), 0, "0"),
        ((), -3, "-3"),
        ((("i", 1),), 0, "i"),
        ((("i", -1),), 0, "-i"),
        ((("i", -2),), 5, "-2·i + 5"),
        ((("k1", 1), ("o1", 2)), -1, "2·o1 + k1 - 1"),
        ((("i", -1), ("k", 3), ("o", 1)), 0, "o + 3·k - i"),
        ((("o1", 1), ("o2", 1)), 0, "o1 + o2"),
    ],
)
def test_form(terms, offset, text):
    assert form(terms, offset) == text


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (index_pattern("k1", "o1", "i1", 2, 1, 1), "Π[2·o1 + k1 - i1 = 1]"),
        (index_pattern("k", "o", "i", 1, 3, 0), "Π[o + 3·k - i = 0]"),
        (delta("i", "j"), "δ[i = j]"),
        (delta("j", "i"), "δ[i = j]"),
        (exactly({"i": 1, "j": -1}, 2), "[i - j = 2]"),
        (exactly({"a": 1, "b": 1}, 0), "[a + b = 0]"),
        (exactly({"i": 3}, 6), "[3·i = 6]"),
        (mask({"o": 2, "k": 1}, -1, 8), "[1 ≤ 2·o + k < 9]"),
        (Pattern((("i", 1), ("k", -1), ("o", -1)), range(-3, 1)), "[0 ≤ o + k - i < 4]"),
        (Pattern((("i", 1),), range(0, 6, 2)), "[i ∈ 0:6:2]"),
        (Pattern((("i", 1),), range(3, 3)), "[3 ≤ i < 3]"),
    ],
)
def test_pattern(pattern, text):
    assert node(pattern) == text


@given(network=networks(selections=True))
def test_condition_says_when_a_pattern_is_one(network):
    for _, pattern in network.patterns:
        at = {leg: 3 + 5 * position for position, leg in enumerate(network.sizes)}
        expected = sum(a * at[leg] for leg, a in pattern.terms) in pattern.values
        assert _holds(node(pattern), at) == expected


def _holds(text, at):
    """Evaluate what `node` wrote for a pattern."""
    text = text.lstrip("Πδ")[1:-1].replace("·", "*").replace(" = ", " == ").replace("≤", "<=")
    text = re.sub(r"∈ (-?\d+):(-?\d+):(\d+)", r"in range(\1, \2, \3)", text)
    return eval(text, {"range": range}, dict(at))


@pytest.mark.parametrize(
    ("view", "text"),
    [
        (View.of(SIZES, "n", ("g", "c"), "i1"), "x[n, (g c), i1]"),
        (View.of(SIZES, ("g", "d"), "c"), "x[(g d), c]"),
        (View.of(SIZES, ("n", "g", "c")), "x[(n g c)]"),
        (View.of(SIZES), "x[]"),
        (View((2,), (Axis(2, 0, (("n", 1),)), Axis(1))), "x[n]"),
        (View((1, 2), (Axis(1), Axis(2, 0, (("n", 1),)))), "x[0, n]"),
        (View((9,), (Axis(9, -1, (("k1", 1), ("o1", 2))),)), "x[2·o1 + k1 - 1]"),
        (
            View((18,), (Axis(2, 0, (("n", 1),)), Axis(9, -1, (("k1", 1), ("o1", 2))))),
            "x[(n 2·o1+k1-1)]",
        ),
        (View((6, 4), (Axis(4, 0, (("a", 1),)), Axis(6, 0, (("b", 1),)))), "x[a, b]"),
        (View((4,), (Axis(2, 1), Axis(2, 0))), "x[(1 0)]"),
        (View((0, 3), (Axis(0, 0, (("a", 1),)), Axis(3, 0, (("b", 1),)))), "x[a, b]"),
    ],
)
def test_tensor(view, text):
    assert node(Tensor("x", view)) == text


@pytest.mark.parametrize("channels", [(1, 1), (1, 2), (2, 1), (3, 3)])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_channels_stay_together_at_size_one(channels, groups, batch):
    c, d = channels
    net = conv((batch, groups * c, 5), (groups * d, c, 3), groups=groups)
    assert equation(net) == (
        "[n, (g d), o1] = Σ_{c, i1, k1} x[n, (g c), i1] · Π[o1 + k1 - i1 = 0] · "
        "weight[(g d), c, k1]"
    )


def test_scale_and_copies():
    assert equation(kfac_expand((8, 4, 9), 3, padding=1, groups=2)) == (
        "[g, (c k1), (c' k1')] = 1/72 · Σ_{n, i1, o1, i1'} x[n, (g c), i1] · "
        "Π[o1 + k1 - i1 = 1] · x[n, (g c'), i1'] · Π[o1 + k1' - i1' = 1]"
    )


def test_sum_has_one_line_per_term():
    first, second = equation(with_bias(conv((2, 4, 5), (6, 4, 3)))).split("\n")
    assert first.startswith("[n, (g d), o1] = Σ_{c, i1, k1} x[")
    assert second == " + bias[(g d)]"


def test_sum_of_differently_named_results():
    net = linear((8, 3), (4, 3))
    both = equation(net + net.rename({"n": "m"}))
    assert both.split("\n")[1] == " + [m, d] = Σ_{c} x[m, c] · weight[d, c]"


def test_networks_without_nodes():
    result = View.of({"n": 2}, "n")
    assert equation(TensorNetwork((), result, {"n": 2})) == "[n] = 1"
    assert equation(TensorNetwork((), result, {"n": 2, "c": 3}, Fraction(2))) == "[n] = Σ_{c} 2"
    assert equation(TensorNetwork((), View((), ()), {}, Fraction(0))) == "[] = 0"
    assert equation(linear((8, 3), (4, 3)).zero()) == "[0, 0] = 0"


@pytest.mark.parametrize("name", sorted(ZOO))
def test_equation_names_everything(name):
    network = ZOO[name](Case((2, 4, 6, 5), (6, 2, 3, 2), stride=2, padding=1, groups=2))
    text = equation(network)
    for operand in network.operands:
        written = re.findall(rf"(?<!\w){operand}\[", text)
        assert len(written) == sum(t.name == operand for t in network.tensors)
    assert text.count("Π[") == len(list(network.patterns))
    summed = re.search(r"Σ_{(.*?)}", text)
    assert set(summed[1].split(", ") if summed else ()) == network.sizes.keys() - network.open_legs
    for leg in network.open_legs:
        assert leg in re.findall(r"[a-z]\d*'*", text.split(" = ")[0])
