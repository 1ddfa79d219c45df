"""The calculus of sums: what is linear acts on every term, and products distribute."""

import copy
import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import Case, assert_close, geometries, operands_for
from tnconv.diagrams import Sum, compose, conv, conv_transpose, linear, pad, with_bias

pytestmark = pytest.mark.usefixtures("double_precision")


@st.composite
def sums(draw: st.DrawFn) -> Sum:
    """Gradients and layers of several terms: (n, ...) per sample."""
    case: Case = draw(geometries(max_dims=2))
    layer = conv(case.input_shape, case.weight_shape, **case.kwargs)
    biased = with_bias(layer)
    per_sample = layer.vjp("weight", per_sample=True)
    made = [per_sample, biased, biased.vjp("weight", per_sample=True), biased + biased / 3]
    return draw(st.sampled_from([Sum(each.terms) for each in made]))


numbers = st.fractions(-3, 3, max_denominator=5) | st.integers(-3, 3) | st.sampled_from([0.5, -0.1])


@given(network=sums(), factor=numbers)
def test_numbers(network, factor):
    operands = operands_for(network)
    value = network.reference(**operands)
    assert_close((factor * network).reference(**operands), float(factor) * value)
    assert_close((-network).reference(**operands), -value)
    total = sum([network, network * factor, network])
    assert_close(total.reference(**operands), (2 + float(factor)) * value)
    assert_close((network - network / 2).reference(**operands), value / 2)


@given(network=sums(), data=st.data())
def test_parts_of_sums(network, data):
    operands = operands_for(network)
    value = network.reference(**operands)
    size = value.shape[0]
    start = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - start))
    part = network.narrow("n", start, length)
    assert_close(part.reference(**operands), value[start : start + length])
    flat = network.reshape(value.numel())
    assert_close(flat.reference(**operands), value.flatten())
    names = {name: f"{name}_2" for name in network.operands}
    renamed = network.rename_operands(names)
    given_ = {names[name]: operand for name, operand in operands.items()}
    assert_close(renamed.reference(**given_), value)


@given(network=sums())
def test_marginals_and_products_of_sums(network):
    operands = operands_for(network)
    value = network.reference(**operands).flatten(1)
    total = network.marginal("n")
    assert_close(total.reference(**operands).flatten(), value.sum(0), 1e-11)
    gram = network.gram(over=("n",)).reference(**operands)
    assert_close(gram.reshape(value.shape[1], -1), value.mT @ value, 1e-10)
    dots = network.connect(network, share=("n",)).reference(**operands)
    expected = torch.einsum("na,nb->nab", value, value)
    assert_close(dots.flatten().sum(), expected.sum(), 1e-9)


def test_all_legs_of_a_gradient_can_be_met():
    gradient = conv((3, 2, 9), (4, 2, 3)).vjp("weight", per_sample=True)
    operands = operands_for(gradient)
    each = gradient.reference(**operands).flatten(1)
    dots = gradient.gram(over=("g", "d", "c", "k1")).reference(**operands)
    assert_close(dots, each @ each.mT, 1e-11)


def test_composed_networks_leave_out_legs_of_size_one():
    first = conv((2, 3, 10), (4, 3, 3)).rename_operands({"weight": "weight1"})
    layer = compose(conv((2, 4, 8), (5, 4, 3)), "x", first)
    assert "·g" not in str(layer) and "·" + "g" not in str(compose(first, "x", pad((2, 3, 8), 1)))
    up = compose(conv_transpose((2, 4, 8), (4, 3, 3)), "x", first)
    assert "3·" not in str(up) and "4·" not in str(up)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_sums_are_copied(copied):
    network = with_bias(linear((8, 3), (4, 3)))
    assert copied(network) == network


NETWORK = linear((8, 3), (4, 3))
SUM = with_bias(NETWORK)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NETWORK + 1, "cannot add 1 to a network"),
        (lambda: 1 + SUM, "cannot add a network to 1"),
        (lambda: SUM - torch.ones(2), "cannot subtract a Tensor from"),
        (lambda: SUM * NETWORK, "`connect` says which legs"),
        (lambda: SUM * 1j, "multiply a network by 1j; expected a finite"),
        (lambda: SUM * True, "multiply a network by True"),
        (lambda: NETWORK / float("nan"), "divide a network by nan"),
    ],
)
def test_wrong_operands(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_division_by_zero():
    with pytest.raises(ZeroDivisionError):
        NETWORK / 0


@pytest.mark.parametrize("name", ["nodes", "sizes", "result", "substitute"])
def test_sums_say_what_only_terms_have(name):
    with pytest.raises(AttributeError, match=f"a sum has no {name!r}; take that of a term.*has 2"):
        getattr(SUM, name)
    with pytest.raises(AttributeError, match="object has no attribute 'anything'"):
        _ = SUM.anything


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SUM.narrow("x", 0, 1), "not one plain result axis is leg 'x'"),
        (lambda: SUM.gram(over=("c",)), "no plain result axis is leg 'c'"),
        (lambda: SUM.connect(SUM, share=("c",)), "cannot share leg 'c'"),
        (lambda: SUM.reshape(5), "cannot have axes"),
        (lambda: SUM + linear((8, 3), (5, 3)), "expected one shape"),
    ],
)
def test_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_floats_are_the_fractions_that_they_are():
    assert (NETWORK * 0.1).scale == Fraction(0.1)
