"""Programs of every kind under torch's transforms, compilers, dtypes, layouts and graphs."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.strategies import SUMS, ZOO, Case, assert_close, operands_for
from tnconv import Program, compile
from tnconv.diagrams import (
    Expression,
    conv,
    conv_transpose,
    ggn_diagonal,
    gradient_norms,
    gradient_sum,
    kfac_expand,
    kfac_reduce,
    with_bias,
)

LAYER = conv((3, 4, 6, 5), (4, 2, 3, 2), stride=(2, 1), padding=((1, 0), (1, 1)), groups=2)
FACTOR = kfac_expand((3, 2, 6, 5), 3, padding=1)


def least(network: Any, **options: Any) -> Program:
    with pytest.raises(ValueError, match="the least that would do") as caught:
        compile(network, memory_limit=1, dtype=torch.float64, **options)
    limit = int(str(caught.value).split()[-2])
    return compile(network, memory_limit=limit, dtype=torch.float64, **options)


def by_displacement(network: Expression) -> Program:
    program = compile(network, routes=["displacement"])
    plan = next(plan for plan in program.terms[0] if "displacement" in plan.routes)
    return replace(program, terms=((plan,),)).prepared()


KINDS: dict[str, Callable[[], Program]] = {
    "native": lambda: compile(LAYER),
    "sum": lambda: compile(with_bias(LAYER)),
    "constants": lambda: compile(kfac_reduce((3, 2, 7, 5), 3, stride=2), routes=["dense"]),
    "displacement": lambda: by_displacement(FACTOR),
    "pieces that are placed": lambda: least(LAYER),
    "pieces that are added": lambda: least(FACTOR, routes=["window"]),
    "several": lambda: compile([LAYER, LAYER.vjp("weight"), gradient_norms(LAYER)]),
    "several in pieces": lambda: least([with_bias(LAYER), LAYER.vjp("x")]),
    "one loop for several": lambda: compile(
        [gradient_sum(LAYER), ggn_diagonal(LAYER)], routes=["loop", "native"]
    ),
    "tuned": lambda: compile(FACTOR, tune=True),
    "selection": lambda: compile(LAYER.vjp("weight").sampled("c", 1).sampled("o1", 2)),
}
Given = tuple[Program, Callable[..., tuple[Tensor, ...]], list[Tensor]]


@pytest.fixture(params=KINDS, scope="module")
def given(request: pytest.FixtureRequest) -> Given:
    """A program, its tuple of results as a function of floating-point operands, and these."""
    program = KINDS[request.param]()
    operands = {n: x for net in program.networks for n, x in operands_for(net).items()}
    values = [operands[name] for name in program.operands if name not in program.indices]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        left = iter(tensors)
        arrays = [operands[n] if n in program.indices else next(left) for n in program.operands]
        result = program.run(*arrays)
        return result if isinstance(result, tuple) else (result,)

    for value, network in zip(run(*values), program.networks, strict=True):
        own = {name: operands[name] for name in network.operands}
        assert_close(value, network.reference(**own), 1e-10)
    return program, run, values


def all_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-10)


def test_pieces_and_loops_are_there() -> None:
    for name in ("pieces that are placed", "pieces that are added", "several in pieces"):
        assert max(len(chunk.pieces) for chunk in KINDS[name]().chunks) > 1


def test_gradients_of_gradients(given: Given) -> None:
    _, run, values = given
    tracked = [value.clone().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(run, tracked, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tracked, fast_mode=True)


def test_jacobians_forward_and_in_reverse(given: Given) -> None:
    _, run, values = given
    every = tuple(range(len(values)))
    reverse = torch.func.jacrev(run, argnums=every)(*values)
    forward = torch.func.jacfwd(run, argnums=every)(*values)
    for one, other in zip(forward, reverse, strict=True):
        all_close(one, other)


def test_vmap_over_any_operand_and_dimension(given: Given) -> None:
    _, run, values = given
    for at, value in enumerate(values):
        three = [value, 2 * value + 1, -value]
        looped = [run(*values[:at], one, *values[at + 1 :]) for one in three]
        expected = tuple(torch.stack(each) for each in zip(*looped, strict=True))
        for dim in (0, -1):
            stacked = torch.stack(three, dim)
            dims = tuple(dim if position == at else None for position in range(len(values)))
            mapped = torch.func.vmap(run, in_dims=dims)(*values[:at], stacked, *values[at + 1 :])
            all_close(mapped, expected)
    stacked = [torch.stack([value, -value]) for value in values]
    pairs = zip(*(run(*(each[at] for each in stacked)) for at in range(2)), strict=True)
    all_close(torch.func.vmap(run)(*stacked), tuple(torch.stack(pair) for pair in pairs))
    all_close(
        torch.func.vmap(run, chunk_size=1, out_dims=0)(*stacked), torch.func.vmap(run)(*stacked)
    )


def test_compiled_in_one_graph(given: Given) -> None:
    """Also programs that nobody has called before."""
    program, run, values = given
    for cold in (pickle.loads(pickle.dumps(program)), compile(program.network)):
        operands = {n: x for net in program.networks for n, x in operands_for(net).items()}
        torch._dynamo.reset()
        found = torch.compile(cold, fullgraph=True, backend="aot_eager")(**operands)
        all_close(found if isinstance(found, tuple) else (found,), run(*values))


def test_layouts(given: Given) -> None:
    """Permuted, strided, shifted and last-channel operands; entries that share memory."""
    _, run, values = given
    expected = run(*values)
    last_first = [v.permute(*range(v.ndim)[::-1]).contiguous() for v in values]
    reverse = [v.permute(*range(v.ndim)[::-1]) for v in last_first]
    strided = [torch.stack([v, v], -1)[..., 0] for v in values]
    shifted = [torch.cat([v.new_zeros(1), v.flatten()])[1:].view(v.shape) for v in values]
    last = [v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for v in values]
    for layout in (reverse, strided, shifted, last):
        all_close(run(*layout), expected)
    expanded = [v[:1].expand(v.shape) for v in values]
    all_close(run(*expanded), run(*(v.contiguous() for v in expanded)))


def test_copies_and_threads(given: Given) -> None:
    program, run, values = given
    for other in (copy.deepcopy(program), pickle.loads(pickle.dumps(program))):
        assert other.source == program.source and other.operands == program.operands
        assert other.explain() == program.explain()
    expected = run(*values)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: run(*values), range(8)):
            all_close(found, expected)


def test_meta_tensors_and_autocast(given: Given) -> None:
    program, run, values = given
    expected = run(*values)
    if not program.indices:
        shapes = [value.shape for value in run(*(value.to("meta") for value in values))]
        assert shapes == [value.shape for value in expected]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(*(value.float() for value in values))
        all_close(run(*values), expected)  # float64 is left alone, as by torch
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).abs().max() <= 5e-2 * other.abs().max()


class _Watched(TorchDispatchMode):
    """Notes the calls that read or make tensors of the CPU, and those that wait for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.others: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append(str(func))
        tensors = torch.utils._pytree.tree_leaves((args, kwargs, result))
        on_cpu = any(isinstance(t, Tensor) and t.device.type == "cpu" for t in tensors)
        waits = any(word in str(func) for word in ("_local_scalar", "nonzero", "item"))
        if waits or (on_cpu and str(func) != "aten.empty.memory_format"):
            self.others.append(str(func))
        return result


CASE = Case((3, 4, 7, 6), (6, 2, 3, 2), (2, 1), ((1, 0), (2, 1)), (1, 2), 2)


def test_devices_never_wait_for_the_cpu() -> None:
    """A second call, as one that a CUDA graph captures, neither copies nor synchronises."""
    for name, diagram in (ZOO | SUMS).items():
        for routes in (["native", "taps", "displacement", "window", "loop"], ["dense"]):
            program = compile(diagram(CASE), routes=routes)
            operands = {n: x.to("meta") for n, x in operands_for(program.networks[0]).items()}
            program(**operands)
            with _Watched() as watched:
                program(**operands)
            assert not watched.others, f"{name}: {watched.others}"
            assert not any("arange" in call for call in watched.calls), name  # constants are kept


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_graphs(kind: str) -> None:
    """Captured once, replayed with other values in the same memory."""
    program = KINDS[kind]()
    made = {n: x for net in program.networks for n, x in operands_for(net).items()}
    static = {name: made[name].cuda() for name in program.operands}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            program(**static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = program(**static)
    for seed in (1, 2):
        for network in program.networks:
            for name, value in operands_for(network, seed).items():
                static[name].copy_(value)
        graph.replay()
        torch.testing.assert_close(captured, program(**static), rtol=1e-9, atol=1e-9)


TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""A few roundings of a sum, relative to the largest entry."""
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, int]]] = {
    "3x3": ((8, 16, 16, 16), (24, 16, 3, 3), {"padding": 1}),
    "strided": ((8, 16, 17, 17), (24, 16, 3, 3), {"stride": 2, "padding": 1}),
    "1x1": ((8, 64, 7, 7), (32, 64, 1, 1), {}),
    "depthwise": ((8, 24, 14, 14), (24, 1, 5, 5), {"padding": 2, "groups": 24}),
    "few channels": ((8, 3, 24, 24), (16, 3, 7, 7), {"stride": 2, "padding": 3}),
    "dilated": ((8, 8, 40), (12, 8, 5), {"dilation": 2, "padding": 4}),
    "3d": ((2, 4, 6, 6, 6), (4, 4, 3, 3, 3), {"padding": 1}),
}


def of_layer(size: str) -> dict[str, Expression]:
    x, weight, options = SIZES[size]
    layer = conv(x, weight, **options)  # type: ignore[arg-type]
    return {
        "forward": layer,
        "input gradient": layer.vjp("x"),
        "weight gradient": layer.vjp("weight"),
        "per-sample gradients": layer.vjp("weight", per_sample=True),
        "norms": gradient_norms(layer),
        "expand": kfac_expand(x, weight[2:], **options),  # type: ignore[arg-type]
        "reduce": kfac_reduce(x, weight[2:], **options),  # type: ignore[arg-type]
        "transpose": conv_transpose(layer.shape, weight, **options),  # type: ignore[arg-type]
    }


def by_torch(size: str, operands: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in torch's own words, in float64."""
    shape, weight_shape, options = SIZES[size]
    case = Case(shape, weight_shape, **options)  # type: ignore[arg-type]
    x, weight, v = operands["x"], operands["weight"], operands["grad_output"]
    dx, dw = torch.func.vjp(case.conv, x, weight)[1](v)
    rows = [
        torch.func.vjp(lambda w, n=n: case.conv(x[n : n + 1], w), weight)[1](v[n : n + 1])[0]
        for n in range(len(x))
    ]
    each = torch.stack(rows)
    patches = case.patches(x).flatten(2, 2 + case.dims).flatten(3)
    mean = patches.mean(-1, keepdim=True)
    return {
        "forward": case.conv(x, weight),
        "input gradient": dx,
        "weight gradient": dw,
        "per-sample gradients": each,
        "norms": each.flatten(1).square().sum(1),
        "expand": torch.einsum("ngao,ngbo->gab", patches, patches) / (len(x) * patches.shape[-1]),
        "reduce": torch.einsum("ngao,ngbo->gab", mean, mean) / len(x),
    }


@pytest.mark.parametrize("size", SIZES)
def test_chosen_programs_equal_torch_in_every_dtype(size: str) -> None:
    networks = of_layer(size)
    operands = operands_for(networks["forward"]) | operands_for(networks["weight gradient"])
    operands["grad_output"] /= 32  # squared norms are below float16's largest number
    for name, expected in by_torch(size, operands).items():
        for dtype, tolerance in TOLERANCES.items():
            program = compile(networks[name], dtype=dtype)
            rounded = {n: operands[n].to(dtype) for n in program.operands}
            value = program(**rounded)
            assert value.dtype == dtype
            error = (value.double() - expected).abs().max() / expected.abs().max()
            assert error < tolerance, f"{name} in {dtype}: {error}"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((), ValueError, "got 0 operands; expected 2: x, weight"),
        (("x",), ValueError, "got 1 operands; expected 2: x, weight"),
        (("x", "weight", "weight"), ValueError, "got 3 operands; expected 2"),
        (("weight", "x"), ValueError, r"'x' has shape \(4, 2, 3, 2\)"),
        (("x", None), TypeError, "'weight' is a NoneType"),
        (("x", "half"), ValueError, "dtype torch.float16 and 'x' torch.float32"),
        (("x", "meta"), ValueError, "'weight' is on meta and 'x' on cpu"),
        (("int", "weight"), ValueError, "dtype torch.float32 and 'x' torch.int32"),
    ],
)
def test_wrong_operands_do_no_work(
    arguments: tuple[str | None, ...], error: type[Exception], message: str
) -> None:
    x, weight = torch.ones(3, 4, 6, 5), torch.ones(4, 2, 3, 2)
    known = {"x": x, "weight": weight, "half": weight.half(), "meta": weight.to("meta")}
    known |= {"int": x.int()}
    program = compile(LAYER)
    with _Watched() as watched, pytest.raises(error, match=message):
        program.run(*[known[name] if name else None for name in arguments])  # type: ignore[arg-type]
    assert not watched.calls


def test_wrong_index_operands_do_no_work() -> None:
    program = KINDS["selection"]()
    operands = {n: x for net in program.networks for n, x in operands_for(net).items()}
    wrong = operands | {"index_c": operands["index_c"].int()}
    with (
        _Watched() as watched,
        pytest.raises(ValueError, match="'index_c' has dtype"),
    ):
        program(**wrong)
    assert not watched.calls
