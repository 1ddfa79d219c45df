import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import (
    SUMS,
    ZOO,
    Case,
    assert_close,
    geometries,
    networks,
    operands_for,
    shipped,
)
from tnconv import cache_info, compile, contract
from tnconv.codegen import ROUTES, Program
from tnconv.codegen.lowering.writer import STACK
from tnconv.diagrams import (
    Sum,
    TensorNetwork,
    compose,
    conv,
    kfac_expand,
    kfac_reduce,
    linear,
    unfold,
    with_bias,
)

pytestmark = pytest.mark.usefixtures("double_precision")


def check(network: TensorNetwork | Sum, **options: Any) -> None:
    """The compiled program, run on random operands, gives the dense value."""
    operands = operands_for(network)
    program = compile(network, **options)
    assert_close(program(**operands), network.reference(**operands), 1e-10)


@given(network=networks(selections=True, max_nodes=5))
def test_any_network_of_a_user(network: TensorNetwork) -> None:
    check(network)
    check(network, simplify=False)


@given(network=shipped(max_dims=2))
def test_every_shipped_diagram(network: TensorNetwork) -> None:
    check(network)
    check(network, simplify=False)


@given(network=shipped(max_dims=3, min_dims=3, empty=False))
def test_every_shipped_diagram_in_three_dimensions(network: TensorNetwork) -> None:
    check(network)
    check(network, simplify=False)


@given(
    network=shipped(max_dims=2) | networks(selections=True), route=st.sampled_from(sorted(ROUTES))
)
def test_every_route_alone_gives_the_value(network: TensorNetwork, route: str) -> None:
    check(network, routes=[route])


@given(network=shipped(max_dims=2))
def test_every_plan_considered_gives_the_value(network: TensorNetwork) -> None:
    """Not only the cheapest plan: choice must never change a value."""
    operands = operands_for(network)
    expected = network.reference(**operands)
    program = compile(network)
    for plan in program.terms[0]:
        single = Program(network, ((plan,),), ())
        assert_close(single(**operands), expected, 1e-10)


FOUR: dict[str, Callable[[Case], TensorNetwork | Sum]] = {
    "conv": ZOO["conv"],
    "input_vjp": lambda case: ZOO["conv"](case).vjp("x"),
    "weight_vjp": lambda case: ZOO["conv"](case).vjp("weight"),
    "unfold": lambda case: unfold(case.input_shape, case.kernel_size, **case.unfold_kwargs),
    "kfac_expand": lambda c: kfac_expand(c.input_shape, c.kernel_size, **c.kwargs),
    "kfac_reduce": lambda c: kfac_reduce(c.input_shape, c.kernel_size, **c.kwargs),
}


@given(
    case=geometries(max_dims=4, min_dims=4, empty=False),
    name=st.sampled_from(sorted(FOUR)),
    simplify=st.booleans(),
)
def test_four_dimensions(case: Case, name: str, simplify: bool) -> None:
    check(FOUR[name](case), simplify=simplify)


@given(case=geometries(unbatched=True), data=st.data())
def test_sums(case: Case, data: st.DataObject) -> None:
    network = with_bias(conv(case.input_shape, case.weight_shape, **case.kwargs))
    every = (network, network.vjp("bias"), network.jacobian("bias"), network.vjp("x"))
    check(data.draw(st.sampled_from(every)))


@given(case=geometries(max_dims=2), name=st.sampled_from(sorted(SUMS)))
def test_every_shipped_sum(case: Case, name: str) -> None:
    check(SUMS[name](case))


LAYER = conv((8, 6, 12, 12), (4, 3, 3, 3), stride=2, padding=1, groups=2)
VECTORS = conv((8, 32, 12, 12), (32, 16, 3, 3), stride=2, padding=1, groups=2)


@pytest.mark.parametrize(
    ("network", "route", "kernel"),
    [
        (VECTORS, "native", "F.conv2d"),
        (VECTORS.rename({leg: f"my_{leg}" for leg in VECTORS.sizes}), "native", "F.conv2d"),
        (VECTORS.vjp("weight"), "native", "convolution_backward"),
        (VECTORS.vjp("weight", per_sample=True), "native", "convolution_backward"),
        (VECTORS.vjp("x"), "native", "convolution_backward"),
        (kfac_reduce((16, 64, 32, 32), 3, padding=1), "taps", ".sum("),
        (kfac_expand((16, 64, 32, 32), 3, padding=1), "spectra", "real_waves("),
        (kfac_expand((8, 3, 128, 128), 3, stride=2), "window", ".unfold("),
        (unfold((8, 3, 32, 32), 3), "window", ".unfold("),
        (linear((8, 3), (4, 3)), "", "@"),
    ],
)
def test_the_expected_route_is_chosen(network: TensorNetwork, route: str, kernel: str) -> None:
    program = compile(network)
    assert route in program.terms[0][0].label
    assert kernel in program.source
    assert route in program.explain()


def test_mirrored_halves_run_once() -> None:
    program = compile(kfac_reduce((16, 64, 32, 32), 3, padding=1))
    values = [step.value for step in program.steps]
    assert len(values) == len(set(values))
    assert [value.operation for value in values].count(STACK) == 2  # one per dimension


def test_source_needs_torch_alone() -> None:
    program = compile(kfac_expand((4, 3, 8, 8), 3, padding=1), routes=["dense"])
    assert "tnconv" not in program.source
    namespace: dict[str, Any] = {}
    exec(program.source, namespace)
    operands = operands_for(program.network)
    torch.testing.assert_close(namespace["contraction"](*operands.values()), program(**operands))


def test_programs_pickle_and_copy() -> None:
    program = compile(LAYER)
    operands = operands_for(LAYER)
    for other in (pickle.loads(pickle.dumps(program)), copy.deepcopy(program)):
        assert other.source == program.source
        torch.testing.assert_close(other(**operands), program(**operands))


def test_compilation_is_deterministic() -> None:
    network = kfac_expand((4, 3, 8, 8), 3, padding=1)
    assert compile(network).source == compile(network).source


def test_contract_compiles_networks_equal_up_to_names_once() -> None:
    operands = operands_for(LAYER)
    contract(LAYER, **operands)
    misses = cache_info().misses
    contract(LAYER.rename({leg: f"my_{leg}" for leg in LAYER.sizes}), **operands)
    assert cache_info().misses == misses


def test_operand_names_that_python_or_the_program_needs() -> None:
    from tnconv.diagrams import Tensor, View

    sizes = {"a": 2}
    names = ("lambda", "torch", "t1", "pattern", "a b", "operand_0", "one", "program", "given")
    nodes = tuple(Tensor(name, View.of(sizes, "a")) for name in names)
    check(TensorNetwork(nodes, View.of(sizes, "a"), sizes))


def test_operands_that_are_called_like_results_of_steps() -> None:
    layer = conv((2, 3, 9, 9), (4, 3, 3, 3), padding=((1, 0), (0, 2)))
    named = layer.rename_operands({"x": "t2", "weight": "t1"})
    for route in ROUTES:
        check(named, routes=[route])


@pytest.mark.parametrize(
    ("operands", "error", "message"),
    [
        ({"x": torch.ones(8, 6, 12, 12)}, ValueError, r"expected \['weight', 'x'\]"),
        ({"x": torch.ones(8, 6, 12, 12), "weight": torch.ones(4, 3, 3)}, ValueError, "'weight'"),
        ({"x": torch.ones(8, 6, 12, 12), "w": torch.ones(4, 3, 3, 3)}, ValueError, r"\['w', 'x'\]"),
        ({"x": 3.0, "weight": torch.ones(4, 3, 3, 3)}, TypeError, "'x' is a float"),
        (
            {"x": torch.ones(8, 6, 12, 12), "weight": torch.ones(4, 3, 3, 3).numpy()},
            TypeError,
            "'weight' is a ndarray",
        ),
        (
            {"x": torch.ones(8, 6, 12, 12), "weight": torch.ones(4, 3, 3, 3).double()},
            ValueError,
            "dtype torch.float64",
        ),
        (
            {"x": torch.ones(8, 6, 12, 12), "weight": torch.ones(4, 3, 3, 3, device="meta")},
            ValueError,
            "on meta",
        ),
    ],
)
def test_bad_operands(operands: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        compile(LAYER)(**operands)
    assert len(str(caught.value).splitlines()) <= 2 and "tensor(" not in str(caught.value)


def test_dtypes_that_autocast_makes_one() -> None:
    operands = {name: value.float() for name, value in operands_for(LAYER).items()}
    program = compile(LAYER)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = program(**operands)
        mixed = program(**operands | {"weight": operands["weight"].bfloat16()})
    torch.testing.assert_close(mixed, expected)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="routes are"):
        compile(LAYER, routes=["fastest"])
    with pytest.raises(ValueError, match="optimize is 'greedy'"):
        compile(kfac_expand((4, 3, 8, 8), 3, padding=1), optimize="greedy")


CHAIN = compose(
    conv((4, 16, 30, 30), (16, 16, 3, 3)).rename_operands({"weight": "outer"}),
    "x",
    conv((4, 16, 32, 32), (16, 16, 3, 3)),
)


@pytest.mark.parametrize("operand", [None, "x", "weight", "outer"])
def test_layers_in_a_chain_are_native_kernels_each(operand: str | None) -> None:
    """Whichever of their patterns comes first."""
    network = CHAIN if operand is None else CHAIN.vjp(operand)
    assert compile(network).terms[0][0].routes == ("native", "native")
    check(network)


@given(
    inner=geometries(max_dims=1, unbatched=False, empty=False),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    operand=st.sampled_from((None, "x", "weight", "outer")),
)
def test_chains_of_layers(inner: Case, kernel: int, stride: int, operand: str | None) -> None:
    first = conv(inner.input_shape, inner.weight_shape, **inner.kwargs)
    outer = (2, first.shape[1], min(kernel, first.shape[2]))
    second = conv(first.shape, outer, stride).rename_operands({"weight": "outer"})
    chain = compose(second, "x", first)
    check(chain if operand is None else chain.vjp(operand))


def test_strided_input_gradients_of_few_channels_go_by_polyphase() -> None:
    """Torch's kernel meets few channels there; as stride 1 it meets s² times as many."""
    network = conv((8, 3, 64, 64), (64, 3, 11, 11), stride=4, padding=2).vjp("x")
    assert compile(network).terms[0][0].label == "by polyphase: native"
    check(network)
