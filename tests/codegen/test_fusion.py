"""Loops over the same parts are one loop, and what their turns share is done once."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import Case, assert_close, geometries, operands_for
from tnconv import compile
from tnconv.codegen.lowering.strided import operand, strided
from tnconv.codegen.lowering.turns import ADDED, ADDED_TOGETHER, PART, PICKED, Turns
from tnconv.codegen.lowering.writer import MULTIPLY, SCALE, Step, Writer
from tnconv.codegen.prices import cost
from tnconv.codegen.programs.fusion import fused
from tnconv.diagrams import (
    Expression,
    conv,
    ggn_diagonal,
    gradient_norms,
    gradient_sum,
    linear,
    per_sample_gradients,
)

LAYER = conv((32, 96, 6, 6), (128, 96, 3, 3), padding=1)
BOTH: tuple[Expression, ...] = (gradient_sum(LAYER), ggn_diagonal(LAYER))
Kind = Callable[..., Expression]
KINDS: tuple[Kind, ...] = (gradient_sum, ggn_diagonal, gradient_norms, per_sample_gradients)


def test_a_gradient_and_its_squares_are_one_loop() -> None:
    program = compile(BOTH)
    assert program.source.count("for part_1") == 1
    assert program.source.count("totals(") == 2  # its definition, and the call
    operands = operands_for(BOTH[1])
    for value, network in zip(program(**operands), BOTH, strict=True):
        assert_close(value, compile(network, routes=["native"])(**operands), 1e-10)


def test_the_products_are_made_once() -> None:
    together = sum(step.kernel.flops for step in compile(BOTH).steps)
    apart = sum(step.kernel.flops for net in BOTH for step in compile(net).steps)
    assert together < 0.6 * apart


@given(
    case=geometries(max_dims=2),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3, unique=True),
    vectors=st.sampled_from((None, 1, 2)),
)
def test_values_of_any_statistics_together(
    case: Case, kinds: list[Kind], vectors: int | None
) -> None:
    layer = conv(case.input_shape, case.weight_shape, **case.kwargs)
    networks = [kind(layer, vectors=vectors) for kind in kinds]
    operands = operands_for(networks[0])
    for value, network in zip(compile(networks)(**operands), networks, strict=True):
        assert_close(value, network.reference(**operands), 1e-10)


def test_single_networks_are_not_looped_for_others() -> None:
    assert "for part_1" not in compile(BOTH[0]).source


def test_a_loop_that_needs_what_comes_between_stays_apart() -> None:
    kernel, x = cost.copy(1, 1), operand(0, (4,))
    part = strided(PART, (x,), (0,), (1,), (1,))

    def step(*call: Any) -> Step:
        return Writer().run(*call[:2], (1,), kernel, "", call[2:])[0].steps[0]

    def loop(inner: Step) -> Step:
        turns = Turns((part,), (inner,), (inner.value,))
        return step(ADDED, turns.reads, turns)

    first = loop(step(SCALE, [part], 3.0))
    between = step(SCALE, [first.value], 2.0)
    apart = [first, between, loop(step(MULTIPLY, [part, between.value]))]
    last = apart[-1].value
    assert fused(apart, [last]) == (tuple(apart), (last,))
    together = [first, between, loop(step(SCALE, [part], 4.0))]
    steps, (output,) = fused(together, [together[-1].value])
    kinds = [ADDED_TOGETHER, PICKED, SCALE, PICKED]
    assert [each.operation for each in steps] == kinds
    assert steps[2].value.inputs == (steps[1].value,) and output is steps[3].value


def test_differentiable_pickled_copied_and_traced() -> None:
    program = compile(BOTH)
    operands = {n: x.requires_grad_() for n, x in operands_for(BOTH[1]).items()}
    ours = torch.autograd.grad(sum(v.sum() for v in program(**operands)), list(operands.values()))
    dense = [compile(net, routes=["native"])(**operands).sum() for net in BOTH]
    expected = torch.autograd.grad(sum(dense), list(operands.values()))
    torch.testing.assert_close(ours, expected)
    for twin in (copy.deepcopy(program), pickle.loads(pickle.dumps(program))):
        assert twin.source == program.source


@pytest.mark.parametrize("samples", [1, 2])
def test_linear_layers_need_no_loop(samples: int) -> None:
    layer = linear((64, 32), (16, 32))
    assert "for part_1" not in compile([gradient_sum(layer), ggn_diagonal(layer)]).source
