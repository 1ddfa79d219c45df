"""Every 1-d geometry of a sweep: no injective pattern is left in form V, and values stay."""

from collections.abc import Iterator
from itertools import product
from math import gcd
from typing import NamedTuple

import pytest
from hypothesis import settings

from tests.strategies import assert_same
from tnconv.diagrams import (
    TensorNetwork,
    conv,
    gradient_dots,
    kfac_expand,
    kfac_reduce,
    unfold,
)
from tnconv.simplify import simplify

DEEP = settings().max_examples >= 1000
"""All geometries in the deep profile, else some of them."""


class Geometry(NamedTuple):
    i: int
    k: int
    s: int
    d: int
    padding: int | str

    @property
    def o(self) -> int:
        """The number of outputs; at most 0 if the kernel does not fit."""
        if self.padding == "same":
            return self.i
        p = 0 if isinstance(self.padding, str) else self.padding
        return (self.i + 2 * p - self.d * (self.k - 1) - 1) // self.s + 1

    @property
    def injective(self) -> bool:
        g = gcd(self.s, self.d)
        return self.s // g >= self.k or self.d // g >= self.o


def geometries() -> list[Geometry]:
    axes = range(1, 13), range(1, 6), range(1, 5), range(1, 4), (0, 1, 2, "same", "valid")
    every = (Geometry(*values) for values in product(*axes))
    return [h for h in every if h.o >= 1 and not (h.padding == "same" and h.s > 1)]


def operations(h: Geometry) -> Iterator[tuple[str, TensorNetwork]]:
    shape, settings = (2, 2, h.i), {"stride": h.s, "dilation": h.d, "padding": h.padding}
    forward = conv(shape, (3, 2, h.k), **settings)
    yield "forward", forward
    yield "input vjp", forward.vjp("x").terms[0]
    yield "weight vjp", forward.vjp("weight").terms[0]
    yield "unfold", unfold(shape, h.k, **settings)
    yield "weight Jacobian", forward.jacobian("weight").terms[0]
    yield "input Jacobian", forward.jacobian("x").terms[0]
    yield "Gram", gradient_dots(forward)
    yield "KFAC-expand", kfac_expand(shape, h.k, **settings)
    yield "KFAC-reduce", kfac_reduce(shape, h.k, **settings)


def test_the_sweep_is_large() -> None:
    swept = geometries()
    assert len(swept) == 2348
    assert sum(h.injective for h in swept) == 1516


@pytest.mark.parametrize("k", range(1, 6))
def test_injective_patterns_become_views(k: int) -> None:
    for h in [h for h in geometries() if h.k == k and h.injective][:: 1 if DEEP else 5]:
        for name, network in operations(h):
            views = simplify(network).views
            assert isinstance(views, TensorNetwork)
            assert list(views.patterns) == [], f"{name} of {h}"


@pytest.mark.parametrize("start", range(4))
def test_values_stay(start: int) -> None:
    for h in geometries()[start :: 4 if DEEP else 97]:
        for _, network in operations(h):
            result = simplify(network)
            assert_same(network, result.normal)
            assert_same(network, result.views)
