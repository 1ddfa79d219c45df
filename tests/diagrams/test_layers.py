"""Layers against torch.nn.functional."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import ZOO, Case, assert_close, geometries, operands_for
from tnconv.diagrams import conv, linear, unfold, with_bias

RELATIVE = 1e-10


@given(case=geometries(unbatched=True))
def test_conv(case):
    network = conv(case.input_shape, case.weight_shape, **case.kwargs)
    operands = operands_for(with_bias(network))
    value = with_bias(network).reference(**operands)
    assert_close(value, case.conv(**operands), RELATIVE)
    bias = operands.pop("bias")
    bias = bias.reshape(-1, *[1] * case.dims)
    assert_close(network.reference(**operands), value - bias, RELATIVE)


@given(case=geometries(min_dims=4, max_dims=4, unbatched=True))
def test_conv_in_four_dimensions(case):
    network = ZOO["conv"](case)
    operands = operands_for(network)
    u = case.patches(operands["x"]).flatten(2, 2 + case.dims)
    weight = operands["weight"].reshape(case.groups, -1, u.shape[2])
    value = torch.einsum("nga...,gda->ngd...", u, weight).flatten(1, 2)
    value = value if case.batched else value[0]
    assert_close(network.reference(**operands), value, RELATIVE)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("padding", ["same", "valid", 1, (2, 0)])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4)])
def test_padding_means_what_torch_means(padding, kernel):
    """Symmetric paddings and strings go to torch as they are."""
    network = conv((2, 3, 7, 8), (4, 3, *kernel), padding=padding, dilation=(2, 1))
    operands = operands_for(network)
    expected = F.conv2d(operands["x"], operands["weight"], padding=padding, dilation=(2, 1))
    assert_close(network.reference(**operands), expected, RELATIVE)


@pytest.mark.parametrize(
    "case",
    [
        Case((0, 2, 5), (3, 2, 2)),
        Case((2, 2, 1), (2, 2, 4), padding=((0, 3),)),
        Case((2, 2, 7), (2, 2, 2), stride=4),
        Case((2, 2, 4), (2, 2, 2), stride=3, padding=((3, 3),), dilation=3),
    ],
    ids=lambda case: f"{case.input_shape}-{case.weight_shape}",
)
def test_odd_sizes(case):
    """Empty batches, kernels over padding alone, outputs that drop a rest."""
    network = ZOO["conv"](case)
    operands = operands_for(network)
    assert_close(network.reference(**operands), case.conv(**operands), RELATIVE)


def test_conv_without_dimensions_is_linear():
    network = conv((2, 3), (4, 3))
    operands = operands_for(network)
    assert_close(network.reference(**operands), F.linear(**_linear(operands)))


def _linear(operands):
    return {"input" if name == "x" else name: value for name, value in operands.items()}


@given(case=geometries(groups=False, unbatched=True))
def test_unfold(case):
    network = unfold(case.input_shape, case.kernel_size, **case.unfold_kwargs)
    x = operands_for(network)["x"]
    expected = case.patches(x).flatten(1, 2 + case.dims).flatten(2)
    expected = expected if case.batched else expected[0]
    assert_close(network.reference(x=x), expected, RELATIVE)
    if case.dims == 2 and case.input_shape[0]:
        native = F.unfold(case.padded(x), case.kernel_size, case.dilation, 0, case.stride)
        assert_close(network.reference(x=x), native, RELATIVE)


def test_unfold_takes_an_int():
    assert unfold((2, 3, 8, 9), 3, 2, 1) == unfold((2, 3, 8, 9), (3, 3), (2, 2), (1, 1), (1, 1))
    assert unfold((3, 8, 9), (3, 3)).shape == (27, 42)


@given(
    leading=st.lists(st.integers(0, 4), max_size=4),
    channels=st.integers(0, 3),
    out=st.integers(1, 3),
)
def test_linear(leading, channels, out):
    network = with_bias(linear((*leading, channels), (out, channels)))
    operands = operands_for(network)
    assert_close(network.reference(**operands), F.linear(**_linear(operands)), RELATIVE)


def test_spellings_are_one_network():
    """Every way to write the same hyper-parameters is equal, and hashes alike."""
    shapes = (2, 4, 9, 9), (6, 2, 3, 3)
    first = conv(*shapes, 2, 1, 1, 2)
    spellings = [
        conv(*map(list, shapes), stride=(2, 2), padding=[1, 1], dilation=(1, 1), groups=2),
        conv(*map(torch.Size, shapes), stride=[2, 2], padding=((1, 1), (1, 1)), groups=2),
    ]
    assert all(other == first and hash(other) == hash(first) for other in spellings)
    assert first != conv(*shapes, 2, ((2, 1), (1, 1)), 1, 2)
    assert conv(*shapes, padding="same", groups=2) == conv(*shapes, padding=1, groups=2)
    assert conv(*shapes, padding="valid", groups=2) == conv(*shapes, groups=2)
