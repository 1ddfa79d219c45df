"""Parts without operands are made once, and only where they can be kept."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tests.strategies import assert_close, operands_for
from tnconv import compile
from tnconv.codegen import Program
from tnconv.codegen.lowering.constants import LARGEST
from tnconv.codegen.lowering.covers import Cover
from tnconv.codegen.lowering.plans import Plan
from tnconv.codegen.lowering.turns import JOINED, turns_of
from tnconv.codegen.planner import looped
from tnconv.codegen.routes.dense import PATTERN, dense
from tnconv.diagrams import Pattern, Tensor, TensorNetwork, View, conv, kfac_reduce

REDUCE = kfac_reduce((4, 2, 9, 9), 3, stride=2, padding=1)


@pytest.fixture
def program() -> Program:
    return compile(REDUCE, routes=["dense"])


def kept(program: Program) -> dict[Any, Any]:
    """What the program's module keeps."""
    found: dict[Any, Any] = program.function.__globals__["KEPT"]  # type: ignore[attr-defined]
    return found


def x_of(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return operands_for(REDUCE)["x"].to(dtype)


def test_made_once_for_each_dtype(program: Program) -> None:
    for dtype in (torch.float64, torch.float64, torch.float32, torch.float32):
        assert program(x=x_of(dtype)).dtype == dtype
    assert len(kept(program)) == 2
    assert program.source.count("pattern(") > 1


def test_what_was_kept_is_used(program: Program) -> None:
    program(x=x_of())
    for constants in kept(program).values():
        for constant in constants:
            constant.zero_()
    assert not program(x=x_of()).any()


def test_nothing_is_kept_while_torch_is_traced(program: Program) -> None:
    """Tensors of a trace must not end up in later calls, nor those of calls in a trace."""
    expected = REDUCE.reference(x=x_of())
    traced = make_fx(program.function, tracing_mode="fake")(x_of())
    assert not kept(program)
    assert_close(traced(x_of()), expected, 1e-10)
    assert_close(program(x=x_of()), expected, 1e-10)
    assert len(kept(program)) == 1
    traced = make_fx(program.function, tracing_mode="fake")(x_of() + 1)
    assert_close(traced(x_of()), expected, 1e-10)


def test_inference_first_and_derivatives_afterwards(program: Program) -> None:
    with torch.inference_mode():
        program(x=x_of())
    assert not kept(program)
    x = x_of().requires_grad_()
    program(x=x).sum().backward()
    dense = x_of().requires_grad_()
    (expected,) = torch.autograd.grad(REDUCE.reference(x=dense).sum(), dense)
    assert x.grad is not None
    assert_close(x.grad, expected, 1e-10)
    with torch.inference_mode():
        assert_close(program(x=x_of()), REDUCE.reference(x=x_of()), 1e-10)


def test_vmap_and_compile_before_and_after_a_call(program: Program) -> None:
    xs = torch.stack([x_of(), 2 * x_of()])
    expected = torch.stack([REDUCE.reference(x=x) for x in xs])
    compiled = torch.compile(program.function, fullgraph=False, backend="aot_eager")
    for _ in range(2):
        assert_close(torch.func.vmap(program.function)(xs), expected, 1e-10)
        assert_close(compiled(xs[0]), expected[0], 1e-10)


def test_copies_keep_nothing(program: Program) -> None:
    program(x=x_of())
    for other in (copy.deepcopy(program), pickle.loads(pickle.dumps(program))):
        assert not kept(other)
        assert_close(other(x=x_of()), program(x=x_of()), 1e-10)


def test_threads(program: Program) -> None:
    expected = REDUCE.reference(x=x_of())
    with ThreadPoolExecutor(8) as threads:
        for value in threads.map(lambda _: program(x=x_of()), range(32)):
            assert_close(value, expected, 1e-10)


def test_with_a_memory_limit_nothing_is_kept() -> None:
    program = compile(REDUCE, routes=["dense"], memory_limit=2**20)
    assert "KEPT" not in program.source
    assert_close(program(x=x_of()), REDUCE.reference(x=x_of()), 1e-10)


def test_large_constants_are_not_kept() -> None:
    size = int(LARGEST**0.5) + 1
    sizes = {"a": size, "b": size}
    any_multiple = Pattern((("a", 1), ("b", 1)), range(0, 2 * size, 3))
    network = TensorNetwork(
        (Tensor("x", View.of(sizes, "a")), any_multiple), View.of(sizes, "b"), sizes
    )
    assert "kept(" not in compile(network, simplify=False, routes=["dense"]).source


def test_constants_leave_loops() -> None:
    (network,) = conv((4, 2, 9, 11), (3, 2, 3, 3), stride=2).vjp("weight", per_sample=True).terms
    start = Cover.of(network, {name: at for at, name in enumerate(network.operands)})
    (cover,) = looped(start, {"dense": dense})
    *before, loop = cover.writer.steps
    assert [step.operation for step in before] == [PATTERN, PATTERN]
    assert loop.operation is JOINED and len(turns_of(loop.value).parts) == 2
    assert PATTERN not in [step.operation for step in turns_of(loop.value).steps]
    plan = Plan("as given", cover.routes, cover.writer.steps, cover.value(0)[1].array)
    operands = operands_for(network)
    value = Program(network, ((plan,),), ())(**operands)
    expected = network.reference(**operands)
    assert_close(value.flatten().sort().values, expected.flatten().sort().values, 1e-10)


@pytest.mark.parametrize("name", ["like", "kept", "KEPT", "contraction_constants"])
def test_operands_named_like_what_programs_need(name: str) -> None:
    network = REDUCE.rename_operands({"x": name})
    program = compile(network, routes=["dense"])
    assert_close(program(**{name: x_of()}), REDUCE.reference(x=x_of()), 1e-10)
