"""What calls hold, measured, is at most what is predicted of them, and of any limit."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.measure import peak_memory
from tnconv import compile
from tnconv.codegen import compiler
from tnconv.diagrams import (
    Expression,
    conv,
    conv_transpose,
    gradient_norms,
    kfac_expand,
    kfac_reduce,
    with_bias,
)

Networks = Expression | list[Expression]
LAYER = conv((8, 16, 24, 24), (16, 16, 3, 3), padding=1)
DEPTHWISE = conv((8, 32, 20, 20), (32, 1, 3, 3), padding=1, groups=32)
NETWORKS: dict[str, Networks] = {
    "forward": LAYER,
    "bias": with_bias(LAYER),
    "weight gradient": LAYER.vjp("weight"),
    "input gradient": conv((8, 16, 24, 24), (16, 16, 3, 3), stride=2).vjp("x"),
    "per sample": LAYER.vjp("weight", per_sample=True),
    "norms": gradient_norms(LAYER),
    "volumes with few channels": conv((2, 4, 10, 10, 10), (4, 4, 3, 3, 3), padding=1),
    "transposed": conv_transpose((4, 8, 15, 15), (8, 8, 3, 3), stride=2, padding=1),
    "depthwise": DEPTHWISE,
    "depthwise input gradient": DEPTHWISE.vjp("x"),
    "wide padding": conv((8, 32, 400), (32, 1, 31), padding=15, groups=32),
    "few channels out": conv((8, 32, 20, 20), (3, 32, 5, 5), padding=2).vjp("x"),
    "kfac_expand": kfac_expand((8, 16, 24, 24), 3, padding=1),
    "factors": [kfac_reduce((6, 8, 14, 14), 3), kfac_expand((6, 8, 14, 14), 3)],
    "layer": [LAYER, LAYER.vjp("weight"), LAYER.vjp("x")],
    "means of groups": kfac_reduce((1, 32, 14, 3), (3, 3), stride=3, groups=32),
    "nothing": kfac_expand((2, 3, 2), 1, stride=3, padding=1),
}


def measured(program: Any, dtype: torch.dtype) -> int:
    """The most that a first call and another one hold."""
    operands = {name: torch.randn(s, dtype=dtype) for name, s in program.operands.items()}
    return max(peak_memory(lambda: program(**operands)) for _ in range(2))


def least(networks: Networks, dtype: torch.dtype) -> int | None:
    """What the error says that would do."""
    try:
        compile(networks, memory_limit=1, dtype=dtype)  # type: ignore[arg-type]
    except ValueError as error:
        return int(str(error).split()[-2])
    return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETWORKS)
def test_calls_hold_about_what_is_predicted(name: str, dtype: torch.dtype) -> None:
    program = compile(NETWORKS[name], dtype=dtype)  # type: ignore[arg-type]
    assert 0.6 * program.peak_memory(dtype) <= measured(program, dtype)
    assert measured(program, dtype) <= program.peak_memory(dtype)


@pytest.mark.parametrize(
    "name",
    ["depthwise", "transposed", "factors", "volumes with few channels", "means of groups"],
)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_calls_stay_below_limits(name: str, share: float) -> None:
    networks = NETWORKS[name]
    smallest = least(networks, torch.float32)
    largest = compile(networks).peak_memory()  # type: ignore[arg-type]
    assert smallest is not None
    limit = smallest + int(share * (largest - smallest))
    program = compile(networks, memory_limit=limit)  # type: ignore[arg-type]
    assert measured(program, torch.float32) <= program.peak_memory() <= limit


@st.composite
def networks(draw: st.DrawFn) -> Networks:
    dims, groups = draw(st.integers(1, 3)), draw(st.sampled_from((1, 1, 2, 8)))
    channels = st.sampled_from((1, 2, 3, 4, 8))
    c, d = (1, 1) if draw(st.booleans()) and groups == 8 else draw(st.tuples(channels, channels))
    sizes: list[tuple[int, ...]] = []
    for _ in range(dims):
        k, s, gap, p = draw(st.tuples(*(st.integers(1, n) for n in (3, 3, 2)), st.integers(0, 2)))
        shortest = max(1, (k - 1) * gap + 1 - 2 * p)
        i = draw(st.integers(shortest, shortest + {1: 50, 2: 14, 3: 5}[dims]))
        sizes.append((i, k, s, gap, p))
    i, k, s, gap, p = zip(*sizes, strict=True)
    options: dict[str, Any] = {"stride": s, "dilation": gap, "padding": p, "groups": groups}
    x, weight = (draw(st.sampled_from((1, 2, 4))), groups * c, *i), (groups * d, c, *k)
    layer = conv(x, weight, **options)
    every: dict[str, Expression] = {
        "forward": layer,
        "bias": with_bias(layer),
        "weight": layer.vjp("weight"),
        "x": layer.vjp("x"),
        "per sample": layer.vjp("weight", per_sample=True),
        "norms": gradient_norms(layer),
        "expand": kfac_expand(x, k, **options),
        "reduce": kfac_reduce(x, k, **options),
    }
    names = draw(st.lists(st.sampled_from(sorted(every)), min_size=1, max_size=2, unique=True))
    return [every[name] for name in names]


@given(networks=networks(), dtype=st.sampled_from((torch.float32, torch.float64)))
def test_no_call_holds_more_than_predicted(networks: Networks, dtype: torch.dtype) -> None:
    program = compile(networks, dtype=dtype)  # type: ignore[arg-type]
    assert measured(program, dtype) <= program.peak_memory(dtype)


@settings(max_examples=8)
@given(
    networks=networks(),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    share=st.floats(0, 1),
)
def test_no_call_exceeds_a_limit(networks: Networks, dtype: torch.dtype, share: float) -> None:
    smallest = least(networks, dtype)
    largest = compile(networks, dtype=dtype).peak_memory(dtype)  # type: ignore[arg-type]
    if smallest is not None:
        limit = smallest + int(share**2 * max(0, largest - smallest))
        program = compile(networks, memory_limit=limit, dtype=dtype)  # type: ignore[arg-type]
        assert measured(program, dtype) <= program.peak_memory(dtype) <= limit


@pytest.mark.parametrize("limit", [184, 240, 309])
def test_parts_that_are_not_contiguous(limit: int) -> None:
    """Mirrored halves do not each copy the part that they read."""
    program = compile(kfac_expand((4, 8, 8), 1, groups=8), memory_limit=limit)
    assert measured(program, torch.float32) <= program.peak_memory() <= limit


def test_no_part_is_planned_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    planned, asked = compiler._planned, []

    def counted(network: Any, options: compiler.Options) -> Any:
        asked.append((network, options))
        return planned(network, options)

    monkeypatch.setattr(compiler, "_planned", counted)
    assert least(DEPTHWISE, torch.float32) is not None
    assert len(asked) > 2 and len(set(asked[1:])) == len(asked[1:])
