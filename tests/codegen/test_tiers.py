"""Which program a call gets: the baseline first, the searched one when a size returns."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor as Array
from torch import nn

import tnconv
from tests.strategies import Case, assert_close, geometries
from tnconv import functional, quantities, tiered_compilation
from tnconv.codegen import tiers


@pytest.fixture(autouse=True)
def tiered() -> Iterator[None]:
    with tiered_compilation(True):
        tnconv.cache_clear()
        yield
        tnconv.cache_clear()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The compilers that were used, in turn."""
    used: list[str] = []
    for name in ("baseline", "compile"):
        own = getattr(tiers, name)

        def make(*args: object, own=own, name=name, **kwargs: object) -> object:  # type: ignore[no-untyped-def]
            used.append(name)
            return own(*args, **kwargs)

        monkeypatch.setattr(tiers, name, make)
    return used


X, WEIGHT = torch.randn(2, 3, 9), torch.randn(4, 3, 3)


def test_the_second_call_searches_and_the_third_finds(made: list[str]) -> None:
    results = [functional.conv(X, WEIGHT) for _ in range(3)]
    assert made == ["baseline", "compile"]
    for result in results:
        torch.testing.assert_close(result, F.conv1d(X, WEIGHT))
    functional.conv(torch.randn(2, 3, 10), WEIGHT)
    assert made == ["baseline", "compile", "baseline"]


def test_networks_are_looked_up_in_tiers_as_well(made: list[str]) -> None:
    network = tnconv.diagrams.conv((2, 3, 9), (4, 3, 3))
    for _ in range(3):
        torch.testing.assert_close(
            tnconv.contract(network, x=X, weight=WEIGHT), F.conv1d(X, WEIGHT)
        )
    assert made == ["baseline", "compile"]


def test_compile_always_searches(made: list[str]) -> None:
    program = tnconv.compile(tnconv.diagrams.conv((2, 3, 9), (4, 3, 3)))
    assert not made and len(program.terms[0]) > 1


def test_without_tiers_the_first_call_searches(made: list[str]) -> None:
    with tiered_compilation(False):
        functional.conv(X, WEIGHT)
        with tiered_compilation(True):
            functional.conv(torch.randn(2, 3, 10), WEIGHT)
        functional.conv(torch.randn(2, 3, 11), WEIGHT)
    functional.conv(torch.randn(2, 3, 12), WEIGHT)
    assert made == ["compile", "baseline", "compile", "baseline"]


def test_warm_compiles_what_waits(made: list[str]) -> None:
    for size in (9, 10, 11):
        functional.conv(torch.randn(2, 3, size), WEIGHT)
    functional.conv(torch.randn(2, 3, 9), WEIGHT)
    made.clear()
    assert tnconv.warm() == 2 and made == ["compile"] * 2
    for size in (9, 10, 11):
        functional.conv(torch.randn(2, 3, size), WEIGHT)
    assert made == ["compile"] * 2 and tnconv.warm() == 0


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch, made: list[str]) -> None:
    monkeypatch.setattr(tiers, "MOST_PROGRAMS", 2)
    for size in (9, 10, 11):
        functional.conv(torch.randn(2, 3, size), WEIGHT)
    assert tnconv.warm() == 2


def test_errors_leave_nothing_behind(made: list[str]) -> None:
    for _ in range(3):
        with pytest.raises(ValueError, match="channels"):
            functional.conv(X, torch.randn(4, 2, 3))
    assert "baseline" not in made and "compile" not in made
    assert tnconv.warm() == 0


def test_traced_calls_get_the_searched_program(made: list[str]) -> None:
    def layer(x: Array) -> Array:
        return functional.conv(x, WEIGHT)

    graph = torch.fx.experimental.proxy_tensor.make_fx(layer)(X)
    assert made == ["compile"]
    torch.testing.assert_close(graph(X), F.conv1d(X, WEIGHT))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X[:1]), F.conv1d(X[:1], WEIGHT))
    assert made == ["compile", "compile"]


def test_threads_that_call_first_at_once() -> None:
    barrier = Barrier(8)

    def call(at: int) -> Array:
        barrier.wait()
        return functional.conv(X, WEIGHT)

    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(call, range(8)):
            torch.testing.assert_close(result, F.conv1d(X, WEIGHT))


@given(case=geometries(max_dims=3), transposed=st.booleans())
def test_tiers_agree_with_torch_and_its_derivatives(case: Case, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.input_shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(case.weight_shape, generator=generator, dtype=torch.float64)
    expected = case.conv(x, weight)
    v = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for _ in range(2):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = functional.conv(*leaves, None, **case.kwargs)
        assert_close(y.detach(), expected)
        y.backward(v)
        own = [
            functional.input_vjp(x.shape, weight, v, **case.kwargs),
            functional.weight_vjp(x, weight.shape, v, **case.kwargs),
        ]
        for gradient, leaf in zip(own, leaves, strict=True):
            assert leaf.grad is not None
            assert_close(gradient, leaf.grad, 1e-10)


@pytest.mark.parametrize("samples", [1, 5])
def test_quantities_of_new_batches(samples: int, made: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).double()
    x, y = torch.randn(samples, 1, 6, 6, dtype=torch.float64), torch.randint(4, (samples,))
    loss = nn.CrossEntropyLoss(reduction="sum")
    squares, factors = quantities.SquaredNorms(), quantities.KFAC(fisher="type-2", joint=True)
    wanted = [squares, factors]
    first, second = (tnconv.compute(model, loss, x, y, wanted) for _ in range(2))
    with tiered_compilation(False):
        third = tnconv.compute(model, loss, x, y, wanted)
    assert {*made} == {"baseline", "compile"}
    for each in (first, second):
        for name, _ in model.named_parameters():
            assert_close(each[squares][name], third[squares][name], 1e-10)
        for name, blocks in third[factors].items():
            for own, expected in zip(each[factors][name], blocks, strict=True):
                assert_close(own, expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
@pytest.mark.parametrize("samples", [0, 1, 3])
def test_one_off_sizes_in_every_precision(samples: int, dtype: torch.dtype) -> None:
    x = torch.ones(samples, 2, 7, 6, dtype=dtype)
    weight = torch.ones(4, 2, 3, 3, dtype=dtype)
    first, second = (functional.conv(x, weight, stride=2, padding=1) for _ in range(2))
    assert first.dtype is dtype and first.shape == (samples, 4, 4, 3)
    torch.testing.assert_close(first, second)
    factors = [functional.kfac_reduce(x, 3, stride=2, padding=1) for _ in range(2)]
    torch.testing.assert_close(*factors)
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.conv(torch.ones(samples, 2, 8, 6), weight.real.float())
    assert y.dtype is torch.bfloat16
