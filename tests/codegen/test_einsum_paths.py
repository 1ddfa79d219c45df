"""Equations are compiled, and programs tell their path in the words of opt_einsum and cotengra."""

import opt_einsum
import pytest
import torch
from hypothesis import given, settings

from tests.strategies import assert_close, networks, operands_for, shipped
from tnconv import compile
from tnconv.codegen.programs.contraction_trees import einsum_form
from tnconv.diagrams import conv, kfac_expand, linear, with_bias

pytestmark = pytest.mark.usefixtures("double_precision")


@settings(max_examples=30)
@given(network=networks() | shipped(max_dims=2))
def test_paths_and_trees_are_those_of_the_same_einsum(network):
    program = compile(network)
    (path, info), tree = program.path, program.tree
    form = einsum_form(network)
    operands = operands_for(form)
    equation, arrays = form.einsum(**operands)
    assert info.naive_cost >= 0 and tree.N == len(arrays)
    value = opt_einsum.contract(equation, *arrays, optimize=path)
    assert_close(value.reshape(form.shape), form.reference(**operands), 1e-10)
    by_tree = tree.contract(arrays) if len(arrays) > 1 else torch.einsum(equation, *arrays)
    assert_close(by_tree.reshape(form.shape), form.reference(**operands), 1e-10)


def test_costs_are_those_of_opt_einsum():
    equation, shapes = "ab,bc,cd,de->ae", [(9, 2), (2, 8), (8, 3), (3, 7)]
    _, info = compile(equation, *shapes).path
    _, best = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="optimal")
    assert (info.opt_cost, info.naive_cost) == (best.opt_cost, best.naive_cost)


@pytest.mark.parametrize("plot", ["plot_flat", "plot_ring", "plot_tent"])
def test_plots_of_cotengra_take_the_tree(plot):
    pytest.importorskip("matplotlib").use("Agg")
    figure, _ = getattr(compile("ab,bc,cd->ad", (3, 4), (4, 5), (5, 6)).tree, plot)(
        show_and_close=False
    )
    assert figure.axes


def test_equations_compile_to_their_values():
    a, b, c = torch.randn(3, 4), torch.randn(4, 5), torch.randn(5, 3)
    program = compile("ij,jk,ki->", (3, 4), (4, 5), (5, 3))
    assert_close(program(a=a, b=b, c=c), torch.einsum("ij,jk,ki->", a, b, c))
    einsum = compile("ij,jk,ki->", (3, 4), (4, 5), (5, 3), style="einsum")
    assert "torch.einsum" in einsum.source
    assert_close(einsum.run(a, b, c), torch.einsum("ij,jk,ki->", a, b, c))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compile(linear((8, 3), (4, 3)), True), "options by name"),
        (lambda: compile("ab->a"), "1 operands; got 0 shapes"),
        (lambda: compile(with_bias(conv((2, 3, 9), (4, 3, 3)))).path, "this one has 2"),
        (lambda: compile([kfac_expand((2, 3, 9), 3)] * 2).tree, "this one has 2"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_operands_go_by_position_too():
    program = compile("ab,bc->ac", (3, 4), (4, 5))
    a, b = torch.rand(3, 4), torch.rand(4, 5)
    for value in (program(a, b), program(a, b=b), program(b=b, a=a)):
        torch.testing.assert_close(value, a @ b)
    with pytest.raises(ValueError, match="got 3 operands by position; expected at most 2: a, b"):
        program(a, b, b)
    with pytest.raises(ValueError, match="operand 'a' is given twice"):
        program(a, a=a)
