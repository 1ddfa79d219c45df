"""Factors found by the roles of a layer's legs, against explicit patches."""

import pytest
import torch
from hypothesis import given
from torch import Tensor

import tnconv
from tests.strategies import Case, assert_close, geometries, operands_for
from tnconv.diagrams import (
    Roles,
    conv,
    conv_transpose,
    input_factor,
    kfac_reduce,
    linear,
    lookup,
    output_factor,
    repeated,
    scale,
)
from tnconv.diagrams.kronecker import sample_count

FLAVOURS = ("expand", "reduce", "hybrid")


def factors(u: Tensor, v: Tensor, flavour: str) -> tuple[Tensor, Tensor]:
    """From patches ``u[n, g, a, o]`` and vectors ``v[m, n, g, d, o]``; A is not divided by N."""
    positions = u.shape[-1]
    if flavour == "reduce":
        u = u.sum(-1, keepdim=True) / positions
    a = torch.einsum("ngao,ngbo->gab", u, u) / (positions if flavour == "expand" else 1)
    if flavour != "expand":
        v = v.sum(-1, keepdim=True)
    return a, torch.einsum("mngdo,mngeo->gde", v, v)


@pytest.mark.parametrize("flavour", FLAVOURS)
@given(case=geometries(empty=False))
def test_convolutions(flavour: str, case: Case) -> None:
    layer = conv(case.input_shape, case.weight_shape, **case.kwargs)
    x = operands_for(layer)["x"]
    v = torch.randn(2, *layer.shape, dtype=torch.float64)
    u = case.patches(x).flatten(2, 2 + case.dims).flatten(3)
    a, b = factors(u, v.reshape(2, len(x), case.groups, -1, u.shape[-1]), flavour)
    first = input_factor(layer, "weight", 2, flavour)
    second = output_factor(layer, "weight", 2, flavour)
    assert sample_count(layer).reference() == len(x)
    assert_close(first.reference(x=x), a, 1e-10)
    assert_close(second.reference(grad_output=v), b, 1e-10)
    assert_close(tnconv.contract(first, x=x), a, 1e-10)
    assert_close(tnconv.contract(second, grad_output=v), b, 1e-10)
    if flavour == "reduce":
        known = kfac_reduce(case.input_shape, case.kernel_size, **case.kwargs)
        assert first == known.scaled(len(x))


ROLES = {
    "conv": (conv((2, 4, 9, 9), (6, 2, 3, 3), groups=2), ("g", "d", "c k1 k2", "o1 o2")),
    "transposed": (conv_transpose((2, 4, 9), (4, 3, 2), groups=2), ("g", "d", "c k1", "o1")),
    "linear": (linear((2, 5, 3), (4, 3)), ("", "d", "c", "o1")),
    "embedding": (lookup((2, 5, 9), (9, 3)), ("", "d", "c", "o1")),
    "scale": (scale((2, 3, 5), (3,)), ("d", "", "", "o1")),
    "repeated": (repeated(linear((2, 3), (4, 3)), 2), ("", "d", "c", "t")),
}


@pytest.mark.parametrize("name", ROLES)
def test_roles(name: str) -> None:
    layer, expected = ROLES[name]
    found = Roles.of(layer)
    assert (found.groups, found.outputs, found.patch, found.positions) == tuple(
        tuple(legs.split()) for legs in expected
    )
