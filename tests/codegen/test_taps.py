"""The route of tap sums, on bands that run either way: windows that rise or fall with the tap."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import assert_close, operands_for
from tnconv.codegen import compile
from tnconv.codegen.programs.program import Program
from tnconv.diagrams import Pattern, Tensor, TensorNetwork, View


@st.composite
def bands(draw: Any) -> TensorNetwork:
    """``y[n, k] = Σ_i x[n, i] [±i + b·k ∈ values]``, whose windows may leave x, and have holes."""
    i, k = draw(st.sampled_from(("ik", "zk")))  # patterns begin with a positive coefficient
    sizes = {"n": 2, i: draw(st.integers(2, 12)), k: draw(st.integers(2, 5))}
    b, sign = draw(st.sampled_from((-3, -2, -1, 1, 2, 3))), draw(st.sampled_from((1, -1)))
    start, step = draw(st.integers(-8, 8)), draw(st.integers(1, 3))
    values = range(start, start + step * draw(st.integers(2, 8)), step)
    nodes = Tensor("x", View.of(sizes, "n", i)), Pattern(((i, sign), (k, b)), values)
    return TensorNetwork(nodes, View.of(sizes, "n", k), sizes)


@given(network=bands())
def test_every_plan_gives_the_value(network: TensorNetwork) -> None:
    operands = operands_for(network)
    program = compile(network, routes=["taps"])
    for plan in program.terms[0]:
        alone = Program(network, ((plan,),), ())
        assert_close(alone(**operands), network.reference(**operands), 1e-10)


def test_both_directions_take_the_route() -> None:
    sizes = {"n": 2, "i": 40, "k": 5}
    for b in (1, -1):
        pattern = Pattern((("i", 1), ("k", b)), range(10, 20))
        nodes = Tensor("x", View.of(sizes, "n", "i")), pattern
        network = TensorNetwork(nodes, View.of(sizes, "n", "k"), sizes)
        assert any("taps" in plan.routes for plan in compile(network, routes=["taps"]).terms[0])
