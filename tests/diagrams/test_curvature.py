"""Kronecker factors against unfolding."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import tnconv
from tests.strategies import Case, assert_close, geometries, operands_for
from tnconv.diagrams import conv, ggn_diagonal, kfac_expand, kfac_reduce, with_ones

FACTORS = {"expand": kfac_expand, "reduce": kfac_reduce}


def factor(u, flavour):
    """The factor from an unfolded input ``u[n, g, a, o]``."""
    n, positions = u.shape[0], u.shape[-1]
    if flavour == "reduce":
        u = u.sum(-1, keepdim=True) / positions
    return torch.einsum("ngao,ngbo->gab", u, u) / max(1, n)


def build(case, flavour):
    return FACTORS[flavour](case.input_shape, case.kernel_size, **case.kwargs)


@pytest.mark.parametrize("flavour", FACTORS)
@given(case=geometries(unbatched=True))
def test_against_explicit_patches(flavour, case):
    network = build(case, flavour)
    x = operands_for(network)["x"]
    u = case.patches(x).flatten(2, 2 + case.dims).flatten(3)
    assert_close(network.reference(x=x), factor(u, flavour), 1e-10)


@pytest.mark.parametrize("flavour", FACTORS)
@given(case=geometries(min_dims=2, max_dims=2, empty=False))
def test_against_torch_unfold(flavour, case):
    network = build(case, flavour)
    x = operands_for(network)["x"]
    u = F.unfold(case.padded(x), case.kernel_size, case.dilation, 0, case.stride)
    u = u.unflatten(1, (case.groups, -1))
    assert_close(network.reference(x=x), factor(u, flavour), 1e-10)


@given(case=geometries(unbatched=True))
def test_scales_are_exact(case):
    batch = max(1, case.input_shape[0]) if case.batched else 1
    positions = case.patches(torch.zeros(case.input_shape)).shape[-case.dims :].numel()
    assert build(case, "expand").scale == Fraction(1, batch)
    assert build(case, "reduce").scale == Fraction(1, batch * positions**2)


@pytest.mark.parametrize("flavour", FACTORS)
@pytest.mark.parametrize(
    ("case", "shape"),
    [
        (Case((0, 4, 5), (1, 2, 3), groups=2), (2, 6, 6)),
        (Case((4, 5), (1, 2, 3), groups=2), (2, 6, 6)),
        (Case((2, 3, 4, 4, 4), (1, 3, 2, 1, 2)), (1, 12, 12)),
        (Case((2, 3, 2, 2, 2, 2), (1, 1, 2, 1, 2, 1), groups=3), (3, 4, 4)),
    ],
    ids=str,
)
def test_shapes(flavour, case, shape):
    network = build(case, flavour)
    x = operands_for(network)["x"]
    value = network.reference(x=x)
    assert network.shape == value.shape == shape
    assert_close(value, value.mT)
    assert value.any() == (x.numel() > 0)


@pytest.mark.parametrize("flavour", FACTORS)
def test_takes_ints(flavour):
    build = FACTORS[flavour]
    assert build((2, 4, 9, 9), 3, 2, 1) == build((2, 4, 9, 9), (3, 3), (2, 2), (1, 1), (1, 1), 1)


def test_one_position_makes_them_equal():
    """With a single output position, both flavours are the same average."""
    case = Case((3, 2, 4), (1, 2, 4))
    x = operands_for(build(case, "expand"))["x"]
    values = [build(case, flavour).reference(x=x) for flavour in FACTORS]
    assert_close(*values)


@pytest.mark.parametrize("flavour", FACTORS)
@given(case=geometries(unbatched=True, empty=False))
def test_ones_column(flavour, case):
    """The factor of patches with an entry 1 behind them."""
    network = with_ones(build(case, flavour))
    x = operands_for(network)["x"]
    u = case.patches(x).flatten(2, 2 + case.dims).flatten(3)
    u = torch.cat([u, torch.ones_like(u[:, :, :1])], 2)
    assert_close(network.reference(x=x), factor(u, flavour), 1e-10)
    assert_close(tnconv.contract(network, x=x), factor(u, flavour), 1e-10)


def test_ones_column_needs_a_factor():
    with pytest.raises(ValueError, match="not a Kronecker factor"):
        with_ones(conv((2, 3, 8), (4, 3, 3)))


@given(case=geometries(empty=False))
def test_diagonal_per_sample(case):
    layer = conv(case.input_shape, case.weight_shape, **case.kwargs)
    network = ggn_diagonal(layer, vectors=2, per_sample=True)
    operands = operands_for(network)
    each = layer.vjp("weight", per_sample=True, extra={"m": 2}).reference(**operands)
    assert_close(network.reference(**operands), each.square().sum(0), 1e-10)


@given(case=geometries(empty=False), scale=st.fractions(-3, 3))
def test_scale_replaces_the_convention(case, scale):
    for build_factor in FACTORS.values():
        given_ = build_factor(case.input_shape, case.kernel_size, **case.kwargs, scale=scale)
        assert given_.scale == scale
