"""Numbers of sixteen bits where torch computes them slowly: in float32, rounded once."""

from unittest.mock import patch

import pytest
import torch

from tests.strategies import assert_close
from tnconv import compile, functional
from tnconv.codegen.prices import halves
from tnconv.codegen.programs import program as programs
from tnconv.diagrams import conv

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(params=[True, False], ids=["slow", "fast"])
def slow(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("dtype", HALVES)
def test_are_rounded_once_where_they_are_slow(dtype: torch.dtype, slow: bool) -> None:
    x, weight = torch.randn(2, 3, 9, 9).to(dtype), torch.randn(4, 3, 3, 3).to(dtype)
    with patch.object(programs, "are_slow", lambda dtype: slow):
        program = compile(conv(tuple(x.shape), tuple(weight.shape)))
        found = program(x=x, weight=weight)
        with patch.object(programs, "are_slow", lambda dtype: not slow):
            in_single = program(x=x.float(), weight=weight.float())
    assert found.dtype == dtype
    if slow:
        assert torch.equal(found, in_single.to(dtype))
    assert_close(found.float(), in_single, 2e-2)


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_and_autocast(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 3, 9), torch.randn(4, 3, 3)
    halves = [each.to(dtype).requires_grad_() for each in (x, weight)]
    functional.conv(*halves).sum().backward()
    assert all(each.grad is not None and each.grad.dtype == dtype for each in halves)
    with torch.autocast("cpu", dtype):
        assert functional.conv(x, weight).dtype == dtype


def test_a_memory_limit_is_kept_in_halves() -> None:
    network = conv((2, 3, 9, 9), (4, 3, 3, 3))
    limited = compile(network, memory_limit=2**20, dtype=torch.bfloat16)
    with patch.object(programs, "are_slow", lambda dtype: True):
        assert compile(network).peak_memory(torch.bfloat16) > limited.peak_memory(torch.bfloat16)
        assert not limited._slow_halves and compile(network)._slow_halves


def test_other_machines_are_left_alone() -> None:
    with patch.object(halves.platform, "machine", lambda: "arm64"):
        assert not any(map(halves.are_slow.__wrapped__, HALVES))
    assert not halves.are_slow(torch.float32)
