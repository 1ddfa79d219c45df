"""Padding modes, composition, and squares of sums, against torch, torch.func and numpy."""

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.func import jacrev, vjp

import tnconv
from tests.strategies import (
    MODES,
    _axes,
    assert_close,
    geometries,
    networks,
    operands_for,
)
from tnconv.diagrams import (
    Expression,
    View,
    compose,
    conv,
    diagonal_vjp,
    hessian_vjp,
    linear,
    pad,
)

NUMPY = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@st.composite
def padded(draw, max_dims=3, most=3):
    """An input shape and (left, right) pairs that every mode takes."""
    dims = draw(st.integers(1, max_dims))
    sizes = draw(st.tuples(*[st.integers(1, 5 if dims < 3 else 3)] * dims))
    pairs = [draw(st.tuples(*[st.integers(0, min(most, size - 1))] * 2)) for size in sizes]
    return (draw(st.integers(0, 2)), draw(st.integers(1, 2)), *sizes), tuple(pairs)


def torch_pad(x, pairs, mode):
    sides = [side for pair in reversed(pairs) for side in pair]
    return F.pad(x, sides, "constant" if mode == "zeros" else mode)


@pytest.mark.parametrize("mode", MODES)
@given(case=padded())
def test_pad_is_that_of_torch(mode, case):
    shape, pairs = case
    network = pad(shape, pairs, mode)
    x = operands_for(network)["x"]
    if shape[0]:  # torch refuses some empty batches
        assert_close(network.reference(x=x), torch_pad(x, pairs, mode), 0)
        assert_close(tnconv.contract(network, x=x), torch_pad(x, pairs, mode), 0)
    unbatched = pad(shape[1:], pairs, mode)
    for sample in x:
        assert_close(unbatched.reference(x=sample), torch_pad(sample[None], pairs, mode)[0], 0)


@pytest.mark.parametrize("mode", MODES)
@given(case=padded(max_dims=5, most=1))
def test_pad_is_that_of_numpy(mode, case):
    shape, pairs = case
    network = pad(shape, pairs, mode)
    x = operands_for(network)["x"]
    expected = numpy.pad(x.numpy(), ((0, 0), (0, 0), *pairs), NUMPY[mode])
    assert_close(network.reference(x=x), torch.from_numpy(expected), 0)


@st.composite
def padded_layers(draw, max_dims=2):
    """A mode, paddings, the padded layer without batch, and its value by torch."""
    case = draw(geometries(max_dims, empty=False))
    mode = draw(st.sampled_from(MODES))
    shape = case.input_shape[1:]
    pairs = tuple(draw(st.tuples(*[st.integers(0, min(2, n - 1))] * 2)) for n in shape[1:])
    inner = pad(shape, pairs, mode)
    layer = compose(conv(inner.shape, case.weight_shape, **case.kwargs), "x", inner)

    def value(x, weight):
        return case.conv(torch_pad(x[None], pairs, mode), weight)[0]

    return layer, value


@given(layer=padded_layers())
def test_padded_layers(layer):
    """Forward and both gradients, by the oracle and compiled."""
    network, value = layer
    operands = operands_for(network)
    expected, pull = vjp(value, operands["x"], operands["weight"])
    assert_close(network.reference(**operands), expected, 1e-10)
    assert_close(tnconv.contract(network, **operands), expected, 1e-10)
    v = torch.randn(expected.shape, dtype=torch.float64)
    for name, gradient in zip(("x", "weight"), pull(v), strict=True):
        derivative = network.vjp(name)
        known = {n: x for n, x in operands.items() if n in derivative.operands}
        assert_close(derivative.reference(**known, grad_output=v), gradient, 1e-10)
        assert_close(tnconv.contract(derivative, **known, grad_output=v), gradient, 1e-10)


@given(layer=padded_layers(), data=st.data())
def test_diagonals_through_padding(layer, data):
    """``Σ_o h[o] J[o, θ]²`` where one output may read an input twice; also in the weight."""
    network, value = layer
    operand = data.draw(st.sampled_from(("x", "weight")))
    check_diagonal(network, value, operand, 1e-10)


def check_diagonal(network, value, operand, tol):
    operands = operands_for(network)
    diagonal = diagonal_vjp(network, operand)
    h = torch.randn(network.shape, dtype=torch.float64)
    jacobian = jacrev(lambda y: value(**operands | {operand: y}))(operands[operand])
    expected = torch.tensordot(h, jacobian.square(), len(network.shape))
    known = {n: x for n, x in (operands | {"diagonal": h}).items() if n in diagonal.operands}
    assert_close(diagonal.reference(**known), expected, tol)


@given(network=networks(min_tensors=1, max_legs=4), data=st.data())
def test_diagonals_of_any_network(network, data):
    """Squares of nodes only where entries meet once; two copies everywhere else."""
    assume(0 not in network.shape)  # torch.func.jacrev stumbles there
    operand = data.draw(st.sampled_from(sorted(network.operands)))
    check_diagonal(network, lambda **given: network.reference(**given), operand, 1e-11)


@given(layer=padded_layers(max_dims=1))
def test_diagonals_compile(layer):
    network, _ = layer
    diagonal = diagonal_vjp(network)
    operands = operands_for(diagonal)
    assert_close(tnconv.contract(diagonal, **operands), diagonal.reference(**operands), 1e-10)


@given(layer=padded_layers(max_dims=1))
def test_hessians_through_padding(layer):
    network, value = layer
    operands = operands_for(network)
    hessian = hessian_vjp(network)
    jacobian = jacrev(value)(operands["x"], operands["weight"]).flatten(0, 1).flatten(1)
    b = torch.randn(2 * network.shape, dtype=torch.float64)
    expected = jacobian.T @ b.reshape(2 * jacobian.shape[:1]) @ jacobian
    found = hessian.reference(hessian=b, weight=operands["weight"])
    assert_close(found, expected.reshape(2 * network.operands["x"]), 1e-10)


@given(data=st.data())
def test_composition_of_any_networks(data):
    """The value of a composition is the value at a value, whatever the axes and factors are."""
    outer = data.draw(networks(min_tensors=1, max_legs=4))
    operand = data.draw(st.sampled_from(sorted(outer.operands)))
    shape = outer.operands[operand]
    inner = data.draw(networks(max_legs=4))
    axes = tuple(data.draw(_axes(list(inner.sizes), inner.sizes, size)) for size in shape)
    inner = inner.with_(result=View(shape, axes))
    inner = inner.rename_operands({name: f"inner_{name}" for name in inner.operands})
    composed = compose(outer, operand, inner + inner.scaled(-3))
    given_, rest = operands_for(inner), operands_for(outer)
    rest[operand] = -2 * inner.reference(**given_)
    known = {n: x for n, x in (rest | given_).items() if n in composed.operands}
    assert_close(composed.reference(**known), outer.reference(**rest), 1e-11)


def test_layers_of_one_variable_chain():
    """A linear layer after a linear layer that shares its weight: quadratic in the weight."""
    layer = linear((2, 3), (3, 3))
    twice = compose(layer, "x", layer)
    operands = operands_for(twice)
    x, weight = operands["x"], operands["weight"]
    assert isinstance(twice, Expression) and len(twice.vjp("weight").terms) == 2
    assert_close(twice.reference(**operands), x @ weight.T @ weight.T)
    jacobian = jacrev(lambda w: F.linear(F.linear(x, w), w))(weight)
    check = diagonal_vjp(twice, "weight")
    h = torch.randn(2, 3, dtype=torch.float64)
    expected = torch.tensordot(h, jacobian.square(), 2)
    assert_close(check.reference(diagonal=h, x=x, weight=weight), expected)


def test_no_delta_is_left_of_a_padded_layer():
    """Composing reads the pieces of the padding through views; only index patterns remain."""
    inner = pad((2, 3, 8, 8), 1, "reflect")
    layer = compose(conv(inner.shape, (4, 3, 3, 3)), "x", inner)
    assert len(layer.terms) == 9
    assert all(len(list(term.patterns)) == 2 for term in layer.terms)


def test_errors():
    with pytest.raises(ValueError, match=r"mode is 'same'; expected one of \('zeros'"):
        pad((2, 3, 8), 1, "same")
    with pytest.raises(ValueError, match=r"padding \(8, 8\) with mode 'reflect' reads outside"):
        pad((2, 3, 8), 8, "reflect")
    with pytest.raises(ValueError, match="reads outside of an input of 2"):
        pad((2, 3, 2), ((3, 0),), "circular")
    with pytest.raises(ValueError, match=r"expected \(n, c, \*spatial\) and an int"):
        pad((2, 3, 8), "same")
    with pytest.raises(ValueError, match=r"'x' has shape \(2, 3, 8\) and the inner result"):
        compose(conv((2, 3, 8), (4, 3, 3)), "x", pad((2, 3, 8), 1))
    with pytest.raises(ValueError, match="operand 'y' has shape None"):
        compose(linear((2, 3), (4, 3)), "y", linear((2, 3), (3, 3)))
