"""Networks as einsums and einsums as networks: values, round trips, other libraries, errors."""

import cotengra
import opt_einsum
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import assert_close, networks, operands_for, shipped
from tnconv.diagrams import TensorNetwork, conv, kfac_expand, linear, with_bias

pytestmark = pytest.mark.usefixtures("double_precision")


@settings(max_examples=60)
@given(network=networks(selections=True) | shipped(max_dims=2))
def test_exported_networks_have_the_same_values(network):
    operands = operands_for(network)
    equation, arrays = network.einsum(**operands)
    value = opt_einsum.contract(equation, *arrays, optimize="greedy", backend="torch")
    assert_close(value.reshape(network.shape), network.reference(**operands), 1e-10)


@settings(max_examples=40)
@given(network=networks(selections=False) | shipped(max_dims=2))
def test_exported_networks_can_be_imported(network):
    equation, arrays = network.einsum(**operands_for(network))
    given = {f"t{at}": array for at, array in enumerate(arrays)}
    again = TensorNetwork.from_einsum(equation, **{name: a.shape for name, a in given.items()})
    value = again.reference(**given)
    assert_close(value.reshape(network.shape), network.reference(**operands_for(network)), 1e-10)


@st.composite
def einsums(draw):
    sizes = {letter: draw(st.integers(0, 3)) for letter in "abcdE"}
    letters = st.text(st.sampled_from(list(sizes)), max_size=4)
    terms = draw(st.lists(letters, min_size=1, max_size=4))
    met = sorted({*"".join(terms)})
    output = draw(st.lists(st.sampled_from(met), unique=True)) if met else []
    equation = ",".join(terms) + draw(st.sampled_from(["->", " -> "])) + "".join(output)
    return equation, [tuple(sizes[letter] for letter in term) for term in terms]


@settings(max_examples=100)
@given(einsum=einsums())
def test_imported_einsums_have_torchs_values(einsum):
    equation, shapes = einsum
    network = TensorNetwork.from_einsum(equation, *shapes)
    arrays = [torch.randn(shape) for shape in shapes]
    expected = torch.einsum(equation, *arrays)
    operands = dict(zip(network.operands, arrays, strict=True))
    assert_close(network.reference(**operands), expected, 1e-10)
    again, exported = network.einsum(**operands)
    assert_close(torch.einsum(again, *exported).reshape(network.shape), expected, 1e-10)


def test_implicit_results_are_those_of_torch():
    network = TensorNetwork.from_einsum("ba,bc", (2, 3), (2, 4))
    arrays = torch.randn(2, 3), torch.randn(2, 4)
    assert_close(network.reference(a=arrays[0], b=arrays[1]), torch.einsum("ba,bc", *arrays))


def test_path_finders_take_shapes_alone():
    equation, arrays = kfac_expand((4, 3, 8, 8), 3).einsum(device="meta")
    path, info = opt_einsum.contract_path(equation, *arrays)
    assert len(path) == len(arrays) - 1 and info.opt_cost <= info.naive_cost
    inputs, output = equation.split("->")
    shapes = [tuple(array.shape) for array in arrays]
    tree = cotengra.array_contract_tree(
        [tuple(term) for term in inputs.split(",")], tuple(output), shapes=shapes, optimize="greedy"
    )
    assert tree.N == len(arrays)


def test_gradients_flow_through_exported_operands():
    x, weight = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3)
    equation, arrays = linear((2, 3), (4, 3)).einsum(x=x, weight=weight)
    torch.einsum(equation, *arrays).sum().backward()
    assert_close(x.grad, weight.sum(0).expand(2, 3))


LINEAR = linear((8, 3), (4, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: with_bias(LINEAR).einsum(), "sum of 2 networks is no single einsum"),
        (lambda: LINEAR.einsum(x=torch.ones(8, 3)), r"got operands \['x'\]; expected"),
        (lambda: LINEAR.einsum(x=torch.ones(8, 3), device="cpu"), "one or the other"),
        (lambda: TensorNetwork.from_einsum("a...->a", (3,)), "an ellipsis"),
        (lambda: TensorNetwork.from_einsum("a1->a", (3, 1)), "has '1'; expected letters"),
        (lambda: TensorNetwork.from_einsum("ab,bc->ac", (3, 4)), "2 operands; got 1 shapes"),
        (lambda: TensorNetwork.from_einsum("ab,bc->ac", (3, 4), (5, 6)), "'b' has size 5"),
        (lambda: TensorNetwork.from_einsum("ab->a", x=(3,)), r"'x' has shape \(3,\); expected 2"),
        (lambda: TensorNetwork.from_einsum("ab->ac", (3, 4)), "'c' of the result 'ac'"),
        (lambda: TensorNetwork.from_einsum("ab->aa", (3, 4)), "'a' of the result 'aa' repeats"),
        (lambda: TensorNetwork.from_einsum("a->a", (3,), x=(3,)), "one or the other"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_letters_are_those_of_legs():
    equation, _ = conv((2, 3, 8), (4, 3, 3)).einsum(device="meta")
    assert equation == "nci,iko,dck->ndo"
