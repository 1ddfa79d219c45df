"""Kronecker factors of layers and of shapes, with every scale, against explicit patches."""

from fractions import Fraction
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import Case, assert_close, geometries, operands_for, transposed
from tnconv.diagrams import (
    Expression,
    bias,
    conv,
    conv_transpose,
    ggn_diagonal,
    grad_expand,
    grad_reduce,
    input_factor,
    kfac_expand,
    kfac_reduce,
    linear,
    mean_patches,
    output_factor,
)
from tnconv.diagrams.ones import with_ones

FLAVOURS = ("expand", "reduce", "hybrid")
SCALES = ("ggn", "kfc")
PATCHES = {"expand": kfac_expand, "reduce": kfac_reduce}
GRADIENTS = {"expand": grad_expand, "reduce": grad_reduce}

# The table: what the sums over positions are, and what is before them, in powers of 1/O.
TABLE = {
    ("expand", "ggn"): (("o", 1), ("o", 0)),
    ("expand", "kfc"): (("o", 0), ("o", 1)),
    ("reduce", "ggn"): (("", 2), ("", 0)),
    ("reduce", "kfc"): (("", 2), ("", 0)),
    ("hybrid", "ggn"): (("o", 1), ("", 0)),
    ("hybrid", "kfc"): (("o", 0), ("", 0)),
}


def patches_of(case: Case, x: Tensor) -> Tensor:
    """``U[n, g, a, o]``."""
    return case.patches(x).flatten(2, 2 + case.dims).flatten(3)


def with_last_one(u: Tensor) -> Tensor:
    return torch.cat([u, torch.ones_like(u[:, :, :1])], 2)


def moment(rows: Tensor, kept: str, power: int) -> Tensor:
    """``O^-power Σ rows rowsᵀ`` of ``rows[..., g, a, o]``, which share o or sum it before."""
    positions = rows.shape[-1]
    rows = rows if kept else rows.sum(-1, keepdim=True)
    return torch.einsum("...gao,...gbo->gab", rows, rows) / positions**power


def factors(u: Tensor, v: Tensor, flavour: str, scale: str) -> tuple[Tensor, Tensor]:
    """From patches ``u[n, g, a, o]`` and vectors ``v[m, n, g, d, o]``; A is not divided by N."""
    of_a, of_b = TABLE[flavour, scale]
    return moment(u, *of_a), moment(v, *of_b)


def assert_value(network: Expression, expected: Tensor, **operands: Tensor) -> None:
    assert_close(network.reference(**operands), expected, 1e-10)


@given(case=geometries(empty=False), row=st.sampled_from(sorted(TABLE)), joint=st.booleans())
def test_factors_of_layers_are_those_of_the_table(
    case: Case, row: tuple[str, str], joint: bool
) -> None:
    flavour, scale = row
    layer = conv(case.input_shape, case.weight_shape, **case.kwargs)
    x = operands_for(layer)["x"]
    v = torch.randn(2, *layer.shape, dtype=torch.float64)
    u = patches_of(case, x)
    u = with_last_one(u) if joint else u
    a, b = factors(u, v.reshape(2, len(x), case.groups, -1, u.shape[-1]), flavour, scale)
    first = input_factor(layer, "weight", flavour, joint, scale=scale)
    second = output_factor(layer, "weight", 2, flavour, scale=scale)
    assert_value(first, a, x=x)
    assert_value(second, b, grad_output=v)
    means = [f.mean(0, keepdim=True) for f in (a, b)]
    first = input_factor(layer, "weight", flavour, joint, False, scale)
    assert_close(first.reference(x=x), means[0], 1e-10)
    second = output_factor(layer, "weight", 2, flavour, False, scale)
    assert_close(second.reference(grad_output=v), means[1], 1e-10)


@pytest.mark.parametrize("kind", ["conv", "transposed"])
@given(
    case=geometries(unbatched=True),
    row=st.sampled_from(list(product(PATCHES, SCALES))),
    joint=st.booleans(),
    per_group=st.booleans(),
)
def test_factors_of_shapes_are_means_over_samples(
    kind: str, case: Case, row: tuple[str, str], joint: bool, per_group: bool
) -> None:
    flavour, scale = row
    shape, keywords = case.input_shape, case.kwargs
    if kind == "transposed":
        shape, keywords = case.output_shape, {**transposed(case), "transposed": True}
    options = {"joint": joint, "per_group": per_group, "scale": scale}
    network = PATCHES[flavour](shape, case.kernel_size, **keywords, **options)
    x = operands_for(network)["x"]
    u = patches_of(case, x) if kind == "conv" else case.transposed_patches(x)
    u = with_last_one(u) if joint else u
    expected = moment(u, *TABLE[flavour, scale][0]) / max(1, len(u))
    expected = expected if per_group else expected.mean(0, keepdim=True)
    assert_value(network, expected, x=x)


@given(case=geometries(), flavour=st.sampled_from(tuple(PATCHES)))
def test_one_implementation(case: Case, flavour: str) -> None:
    """What is asked for by shapes is what is asked for by a layer."""
    samples = Fraction(1, max(1, case.input_shape[0]))
    layer = conv(case.input_shape, case.weight_shape, **case.kwargs)
    network = PATCHES[flavour](case.input_shape, case.kernel_size, **case.kwargs)
    assert network == input_factor(layer, "weight", flavour).scaled(samples)


@given(
    case=geometries(),
    row=st.sampled_from(list(product(GRADIENTS, SCALES))),
    per_group=st.booleans(),
)
def test_factors_of_gradients(case: Case, row: tuple[str, str], per_group: bool) -> None:
    flavour, scale = row
    network = GRADIENTS[flavour](case.output_shape, case.groups, per_group, scale)
    v = operands_for(network)["grad_output"]
    expected = moment(v.unflatten(1, (case.groups, -1)).flatten(3), *TABLE[flavour, scale][1])
    expected = expected if per_group else expected.mean(0, keepdim=True)
    assert_value(network, expected, grad_output=v)


@pytest.mark.parametrize(("flavour", "scale"), TABLE)
def test_the_patch_of_a_bias_is_one(flavour: str, scale: str) -> None:
    layer = bias((3, 4, 5, 2), (4,))
    v = torch.randn(2, *layer.shape, dtype=torch.float64)
    a = input_factor(layer, "bias", flavour, scale=scale).reference()
    b = output_factor(layer, "bias", 2, flavour, scale=scale).reference(grad_output=v)
    assert_close(a / 3, torch.ones(1, 1, 1, dtype=torch.float64))
    assert_close(b, moment(v.flatten(3)[:, :, None], *TABLE[flavour, "ggn"][1]), 1e-12)


@given(case=geometries(unbatched=True))
def test_scales_are_exact(case: Case) -> None:
    batch = max(1, case.input_shape[0]) if case.batched else 1
    positions = case.patches(torch.zeros(case.input_shape)).shape[-case.dims :].numel()
    build = {f: PATCHES[f](case.input_shape, case.kernel_size, **case.kwargs) for f in PATCHES}
    assert build["expand"].scale == Fraction(1, batch * positions)
    assert build["reduce"].scale == Fraction(1, batch * positions**2)


@given(case=geometries(empty=False), scale=st.fractions(-3, 3))
def test_a_number_replaces_the_whole_scale(case: Case, scale: Fraction) -> None:
    for build in PATCHES.values():
        given_ = build(case.input_shape, case.kernel_size, **case.kwargs, scale=scale)
        assert given_.scale == scale
    for build in GRADIENTS.values():
        assert build(case.output_shape, case.groups, scale=scale).scale == scale


@pytest.mark.parametrize("build", [kfac_expand, kfac_reduce])
def test_scales_that_there_are_not(build: object) -> None:
    with pytest.raises(ValueError, match="scale is 'mean'; expected 'ggn', 'kfc' or a number"):
        build((2, 3, 8), 3, scale="mean")  # type: ignore[operator]


@given(case=geometries(min_dims=2, max_dims=2, empty=False))
def test_against_torch_unfold(case: Case) -> None:
    network = kfac_expand(case.input_shape, case.kernel_size, **case.kwargs)
    x = operands_for(network)["x"]
    u = F.unfold(case.padded(x), case.kernel_size, case.dilation, 0, case.stride)
    u = u.unflatten(1, (case.groups, -1))
    assert_close(network.reference(x=x), moment(u, "o", 1) / len(x), 1e-10)


@pytest.mark.parametrize("flavour", PATCHES)
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
def test_shapes(flavour: str, case: Case, shape: tuple[int, ...]) -> None:
    network = PATCHES[flavour](case.input_shape, case.kernel_size, **case.kwargs)
    x = operands_for(network)["x"]
    value = network.reference(x=x)
    assert network.shape == value.shape == shape
    assert_close(value, value.mT)
    assert value.any() == (x.numel() > 0)


@pytest.mark.parametrize("build", [kfac_expand, kfac_reduce, mean_patches])
def test_takes_ints(build: object) -> None:
    network = build((2, 4, 9, 9), 3, 2, 1)  # type: ignore[operator]
    assert network == build((2, 4, 9, 9), (3, 3), (2, 2), (1, 1), (1, 1), 1)  # type: ignore[operator]


@pytest.mark.parametrize("flavour", PATCHES)
def test_linear_layers_have_positions_before_the_channels(flavour: str) -> None:
    layer = linear((3, 5, 2, 4), (6, 4))
    network = PATCHES[flavour]((3, 5, 2, 4), ())
    assert network == input_factor(layer, "weight", flavour).scaled(Fraction(1, 3))
    assert mean_patches((3, 5, 2, 4), ()).shape == (3, 1, 4)


def test_one_position_makes_them_equal() -> None:
    """With a single output position, both flavours are the same average."""
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    values = [build((3, 2, 4), (4,)).reference(x=x) for build in PATCHES.values()]
    assert_close(*values)


def test_ones_need_a_factor() -> None:
    with pytest.raises(ValueError, match="not a Kronecker factor"):
        with_ones(conv((2, 3, 8), (4, 3, 3)))


def test_transposed_layers_have_transposed_patches() -> None:
    layer = conv_transpose((2, 4, 5), (4, 3, 3), stride=2, output_padding=1)
    network = kfac_reduce((2, 4, 5), 3, 2, transposed=True, output_padding=1)
    assert network == input_factor(layer, "weight", "reduce").scaled(Fraction(1, 2))


@given(case=geometries(empty=False))
def test_diagonal_per_sample(case: Case) -> None:
    layer = conv(case.input_shape, case.weight_shape, **case.kwargs)
    network = ggn_diagonal(layer, vectors=2, per_sample=True)
    operands = operands_for(network)
    each = layer.vjp("weight", per_sample=True, extra={"m": 2}).reference(**operands)
    assert_close(network.reference(**operands), each.square().sum(0), 1e-10)


@given(case=geometries(empty=False), largest=st.sampled_from((1, 50, 250)))
def test_means_stay_in_the_range_of_half_precision(case: Case, largest: int) -> None:
    """With "ggn" no entry of A exceeds the largest product of two inputs, at any N and O."""
    for build in PATCHES.values():
        network = build(case.input_shape, case.kernel_size, **case.kwargs)
        x = largest * torch.rand(case.input_shape, dtype=torch.float64).sign()
        assert network.reference(x=x).max() <= largest**2 * (1 + 1e-12) < 65504
