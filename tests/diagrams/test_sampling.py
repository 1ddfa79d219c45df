"""Randomised products: right on average, for every leg, by every lowering."""

from fractions import Fraction
from itertools import combinations
from math import comb

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.strategies import Case, assert_close, geometries, operands_for, transposed
from tnconv import compile
from tnconv.codegen import Program
from tnconv.diagrams import Selection, Sum, TensorNetwork, View, conv, conv_transpose, linear

MOST_SUBSETS = 40


def product(case: Case, transpose: bool, operand: str) -> Sum:
    if transpose:
        return conv_transpose(case.output_shape, case.weight_shape, **transposed(case)).vjp(operand)
    return conv(case.input_shape, case.weight_shape, **case.kwargs).vjp(operand)


@given(
    case=geometries(max_dims=2, empty=False),
    transpose=st.booleans(),
    operand=st.sampled_from(("x", "weight")),
    data=st.data(),
)
def test_mean_over_all_subsets_is_the_product(case, transpose, operand, data):
    network = product(case, transpose, operand)
    sizes = network.terms[0].sizes
    leg = data.draw(st.sampled_from(sorted(sizes)))
    length = data.draw(st.integers(1, sizes[leg]))
    assume(comb(sizes[leg], length) <= MOST_SUBSETS)
    program = compile(network.sampled(leg, length).scaled(Fraction(sizes[leg], length)))
    operands = operands_for(network)
    values = [
        program(**operands, **{f"index_{leg}": torch.tensor(subset)})
        for subset in combinations(range(sizes[leg]), length)
    ]
    assert_close(torch.stack(values).mean(0), network.reference(**operands))


@given(
    case=geometries(max_dims=2, empty=False),
    operand=st.sampled_from(("x", "weight")),
    data=st.data(),
)
def test_every_plan_of_jointly_sampled_legs_gives_the_value(case, operand, data):
    network = product(case, False, operand)
    legs = st.lists(st.sampled_from(sorted(network.terms[0].sizes)), max_size=3, unique=True)
    for leg in data.draw(legs):
        network = network.sampled(leg, data.draw(st.integers(0, 3)))
    operands = operands_for(network)
    expected = network.reference(**operands)
    for plan in compile(network).terms[0]:
        assert_close(Program(network, ((plan,),), ())(**operands), expected, 1e-10)


NETWORK = conv((8, 6, 10), (4, 6, 3))


@pytest.mark.parametrize(
    ("leg", "route"),
    [("n", "gather"), ("c", "gather"), ("d", "gather"), ("o1", "mask"), ("i1", "mask")],
)
def test_slices_are_gathered_unless_patterns_hold_their_leg(leg, route):
    program = compile(NETWORK.vjp("weight").sampled(leg, 2))
    assert route in program.terms[0][0].routes


@pytest.mark.parametrize(("leg", "part"), [("n", 4), ("c", 3), ("d", 2)])
def test_work_falls_with_the_number_of_positions(leg, part):
    network = NETWORK.vjp("weight")

    def flops(network):
        kernels = (step.kernel for step in compile(network).steps)
        return sum(kernel.flops for kernel in kernels if kernel.kind == "weight gradient")

    assert part * flops(network.sampled(leg, NETWORK.sizes[leg] // part)) == flops(network)


def kept_slices(leg: str) -> TensorNetwork:
    """An input of which only the listed positions of a leg are given."""
    x, *others = NETWORK.nodes
    legs = ["r" if other == leg else other for other in ("n", "c", "i1")]
    sizes = dict(NETWORK.sizes) | {"r": 3}
    kept = type(x)("x", View.of(sizes, *legs))
    return NETWORK.with_((kept, *others, Selection.of("index", sizes, "r", leg)), sizes=sizes)


@pytest.mark.parametrize("leg", ["n", "c", "i1"])
def test_kept_slices_are_scattered(leg):
    network = kept_slices(leg)
    operands = operands_for(network)
    program = compile(network)
    assert "scatter" in program.terms[0][0].routes
    assert_close(program(**operands), network.reference(**operands), 1e-10)


def test_a_position_listed_twice_counts_twice():
    network = linear((4, 3), (2, 3)).vjp("weight")
    operands = operands_for(network)
    given = {"index_n": torch.tensor([2, 2])}
    twice = compile(network.sampled("n", 2))(**operands, **given)
    v, x = operands["grad_output"][2], operands["x"][2]
    assert_close(twice, 2 * torch.outer(v, x))


def test_selections_in_words():
    sampled = linear((4, 3), (2, 3)).vjp("weight").sampled("n", 2)
    assert str(sampled).endswith("[index_n[r] = n]")
    assert sampled.indices == {"index_n"}


@pytest.mark.parametrize("bad", [torch.tensor([0.0, 1.0]), torch.tensor([0, 1], dtype=torch.int32)])
def test_indices_are_int64(bad):
    network = linear((4, 3), (2, 3)).vjp("weight").sampled("n", 2)
    operands = operands_for(network) | {"index_n": bad}
    for run in (network.reference, compile(network)):
        with pytest.raises(ValueError, match=r"index_n.*expected torch.int64"):
            run(**operands)


def test_positions_outside_of_the_leg_raise():
    network = linear((4, 3), (2, 3)).vjp("weight").sampled("n", 2)
    for positions in ([0, 4], [-1, 0]):
        with pytest.raises((IndexError, RuntimeError)):
            compile(network)(**operands_for(network) | {"index_n": torch.tensor(positions)})


def test_what_cannot_be_sampled():
    network = linear((4, 3), (2, 3)).vjp("weight")
    with pytest.raises(ValueError, match="no leg 'z' to sample"):
        network.sampled("z", 2)
    with pytest.raises(ValueError, match="no leg 'z' to sample"):
        NETWORK.sampled("z", 2)
    with pytest.raises(ValueError, match="'x' exists already"):
        network.sampled("n", 2, index="x")
    with pytest.raises(ValueError, match="lists positions; there is no derivative"):
        network.sampled("n", 2).vjp("index_n", cotangent="v")
    with pytest.raises(ValueError, match="size -1"):
        network.sampled("n", -1)


def test_programs_with_indices_under_autocast_and_in_half_precision():
    network = NETWORK.vjp("weight").sampled("n", 3)
    operands = operands_for(network)
    expected = network.reference(**operands).float()
    low = {name: x if name == "index_n" else x.bfloat16() for name, x in operands.items()}
    program = compile(network)
    assert_close(program(**low).float(), expected, 3e-2)
    single = {name: x if name == "index_n" else x.float() for name, x in operands.items()}
    with torch.autocast("cpu", torch.bfloat16):
        value = program(**single)
    assert value.dtype == torch.bfloat16
    assert_close(value.float(), expected, 3e-2)
