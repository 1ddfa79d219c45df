"""Every route alone: each plan that takes it gives the dense value, on the geometries it claims."""

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.own_kernels import own_kernels
from tests.strategies import ZOO, Case, assert_close, geometries, operands_for
from tnconv import Program, compile
from tnconv.codegen import ROUTES, search
from tnconv.codegen.routes import window

LAYERS = ("conv", "conv_transpose", "input_vjp", "weight_vjp", "per_sample", "gradient_norms")
CLAIMS: dict[str, tuple[str, ...]] = {
    "native": LAYERS,
    "pooling": ("avg_pool", "avg_pool_counts"),
    "window": (*LAYERS, "kfac_expand", "unfold", "fold"),
    "pixel gram": ("gradient_norms", "gradient_dots"),
    "taps": ("kfac_reduce", "mean_patches"),
    "displacement": ("kfac_expand",),
    "patch gram": ("kfac_expand", "gradient_norms"),
    "loop": ("per_sample", "gradient_norms", "ggn_diagonal"),
    "dense": ("conv", "gradient_norms", "kfac_expand", "kfac_reduce"),
}
"""Diagrams that each route is for."""


@pytest.fixture(scope="module", autouse=True)
def nothing_is_pruned() -> Iterator[None]:
    """For small tensors a dense pattern is so cheap that other plans would not be completed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "HOPELESS", float("inf"))
        patch.setattr(window, "GROWN", float("inf"))
        yield


@st.composite
def overlapping(draw: Any) -> Case:
    """Windows that overlap, with any padding on each side; the kernel may exceed the input."""
    dims = draw(st.integers(1, 3))
    kernel = draw(st.tuples(*[st.integers(2, 4 if dims < 3 else 3)] * dims))
    stride = draw(st.tuples(*[st.integers(1, 2)] * dims))
    dilation = draw(st.tuples(*[st.sampled_from((1, 1, 2))] * dims))
    pads, spatial = [], []
    for k, s, d in zip(kernel, stride, dilation, strict=True):
        left, right = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        outputs = draw(st.integers(2, 6 if dims < 3 else 3))
        rest = draw(st.integers(0, s - 1))  # inputs that no window sees
        pads.append((left, right))
        spatial.append(max(1, (outputs - 1) * s + d * (k - 1) + 1 + rest - left - right))
    groups = draw(st.integers(1, 2))
    c, d = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    shapes = (draw(st.integers(2, 3)), groups * c, *spatial), (groups * d, c, *kernel)
    return Case(*shapes, stride, tuple(pads), dilation, groups)


def of_route(program: Program, route: str) -> list[Program]:
    """A program for each plan that takes the route."""
    (plans,) = program.terms
    return [Program(program.network, ((p,),), ()) for p in plans if route in p.routes]


@pytest.mark.parametrize(
    ("route", "name"), [(route, name) for route, names in CLAIMS.items() for name in names]
)
def test_every_plan_of_a_route_gives_the_value(route: str, name: str) -> None:
    plans: Counter[bool] = Counter()

    def check(case: Case) -> None:
        network = ZOO[name](case)
        operands = operands_for(network)
        expected = network.reference(**operands)
        with own_kernels() if route == "patch gram" else nullcontext():
            programs = of_route(compile(network, routes=[route]), route)
        plans[bool(programs)] += 1
        for program in programs:
            assert_close(program(**operands), expected, 1e-10)

    few = settings(max_examples=settings.default.max_examples // 4)
    few(given(case=overlapping())(check))()
    assert plans[True] >= 0.7 * plans.total()  # others are injective, or have one tap
    few(given(case=geometries(empty=False))(check))()


def test_every_route_has_claims() -> None:
    assert CLAIMS.keys() == ROUTES.keys()
    assert {name for names in CLAIMS.values() for name in names} <= ZOO.keys()
