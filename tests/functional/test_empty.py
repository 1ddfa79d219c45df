"""Sizes of zero: batches, channels and positions that there are not give empty results or zeros.

Torch is no oracle here: its convolutions refuse or mistake channels that there are not.
"""

from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import geometries, transposed
from tnconv import functional as T
from tnconv.diagrams import Hyperparameters
from tnconv.diagrams.layer_networks import layer

KINDS = ("conv", "conv_transpose", "linear")


@st.composite
def empty_layers(draw: Any, kind: str) -> tuple[tuple[int, ...], tuple[int, ...], Hyperparameters]:
    """The shapes of input and weight, at least one size of which is 0, and hyper-parameters."""
    case = draw(geometries(max_dims=2, empty=False))
    gone = draw(st.sets(st.sampled_from("ncdo" if kind == "linear" else "ncd"), min_size=1))
    (n, c, *spatial), (d, *_) = case.input_shape, case.weight_shape
    n, c, d = (0 if leg in gone else size for leg, size in zip("ncd", (n, c, d), strict=True))
    if kind == "linear":
        positions = [0 for _ in spatial] if "o" in gone else spatial
        return (n, *positions, c), (d, c), Hyperparameters()
    case = replace(
        case,
        input_shape=(n, c, *spatial),
        weight_shape=(d, c // case.groups, *case.kernel_size),
    )
    if kind == "conv":
        return case.input_shape, case.weight_shape, Hyperparameters(**case.kwargs)
    h = Hyperparameters(**transposed(case), transposed=True)
    return (n, d, *case.output_shape[2:]), (d, c // case.groups, *case.kernel_size), h


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=settings.default.max_examples // 4)
def test_results_have_their_shapes(kind: str, data: st.DataObject) -> None:
    x_shape, w_shape, h = data.draw(empty_layers(kind))
    y_shape, n = layer(x_shape, w_shape, h).shape, x_shape[0]
    x, weight, v = (torch.ones(shape, dtype=torch.float64) for shape in (x_shape, w_shape, y_shape))
    settings = h._asdict()
    products = {
        "weight_vjp": (T.weight_vjp(x, w_shape, v, **settings), w_shape),
        "input_vjp": (T.input_vjp(x_shape, weight, v, **settings), x_shape),
        "per_sample": (T.per_sample_weight_grad(x, w_shape, v, **settings), (n, *w_shape)),
        "input_jvp": (T.input_jvp(x_shape, weight, x, **settings), y_shape),
        "weight_jvp": (T.weight_jvp(x, w_shape, weight, **settings), y_shape),
        "norms": (T.gradient_norms(x, w_shape, v, **settings), (n,)),
        "dots": (T.gradient_dots(x, w_shape, v, **settings), (n, n)),
        "diagonal": (T.ggn_diagonal(x, w_shape, v, **settings), w_shape),
        "squares": (T.weight_diagonal_vjp(x, w_shape, v, **settings), w_shape),
    }
    for name, (value, shape) in products.items():
        assert value.shape == shape and not value.any(), name


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), joint=st.booleans())
@settings(max_examples=settings.default.max_examples // 4)
def test_factors_have_their_shapes(kind: str, data: st.DataObject, joint: bool) -> None:
    x_shape, w_shape, h = data.draw(empty_layers(kind))
    x = torch.ones(x_shape, dtype=torch.float64)
    channels = x_shape[-1] if kind == "linear" else x_shape[1]
    kernel = () if kind == "linear" else w_shape[2:]
    patch = channels // h.groups * prod(kernel) + joint
    for factor in (T.kfac_expand, T.kfac_reduce):
        value = factor(x, kernel, **h._asdict(), joint=joint)
        assert value.shape == (h.groups, patch, patch)
        assert value.isfinite().all() and (x.numel() or not value[:, : patch - joint].any())


@given(
    shape=st.tuples(*[st.integers(0, 2)] * 2) | st.tuples(*[st.integers(0, 2)] * 4),
    vectors=st.none() | st.integers(0, 2),
)
@settings(max_examples=settings.default.max_examples // 2)
def test_biases_have_their_shapes(shape: tuple[int, ...], vectors: int | None) -> None:
    several = () if vectors is None else (vectors,)
    _, channels, *positions = shape
    v, tangent = (torch.ones(*several, *sizes) for sizes in (shape, (channels,)))
    each = v.flatten(len(several) + 2).sum(-1) if positions else v
    values = T.bias_vjp(shape, v), T.per_sample_bias_grad(shape, v), T.bias_jvp(shape, tangent)
    for value, expected in zip(values, (each.sum(-2), each, v), strict=True):
        assert value.shape == expected.shape and value.equal(expected)
