"""Random convolutions of every kind in a network, and every quantity of them."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import tnconv
from tests.loops import first_order, per_sample_gradients
from tests.models.test_kronecker import assert_factors, by_group, explicit, patches
from tests.models.test_second_order import diagonals
from tests.quick_programs import quick_programs
from tests.strategies import assert_close
from tnconv import quantities as q
from tnconv.losses.roots import curvature

pytestmark = pytest.mark.usefixtures("float64")

PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
FIRST = [getattr(q, name)() for name in first_order(torch.zeros(1, 1))]
EACH = q.GGNDiagonal(per_sample=True)
KFACS: list[Any] = [q.KFAC(flavour, "type-2") for flavour in ("expand", "reduce", "hybrid")]


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A layer and its input: groups, strides, dilations, paddings of every mode, output padding."""
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    each = st.lists(st.integers(1, 3 if dims < 3 else 2), min_size=dims, max_size=dims)
    kernel, stride, dilation = draw(each), draw(each), draw(each)
    padding = draw(st.lists(st.integers(0, 1), min_size=dims, max_size=dims))
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    common = {"groups": groups, "bias": draw(st.booleans()), "dilation": dilation}
    samples = draw(st.integers(1, 3))
    if draw(st.booleans()):
        rest = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
        layer = TRANSPOSED[dims](*channels, kernel, stride, padding, rest, **common)
        sizes = [draw(st.integers(2, 4)) for _ in range(dims)]
    else:
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        words = ["valid", *(["same"] if set(stride) == {1} else [])]
        given = draw(st.sampled_from([padding, *words]))
        layer = PLAIN[dims](*channels, kernel, stride, given, padding_mode=mode, **common)
        least = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        sizes = [size + draw(st.integers(0, 2)) for size in least]
    return layer, torch.randn(samples, channels[0], *sizes)


@pytest.mark.searched
@given(layers(), st.sampled_from(["mean", "sum"]), st.booleans())
def test_every_quantity(case: tuple[nn.Module, Tensor], reduction: str, quick: bool) -> None:
    layer, x = case
    try:
        entries = layer(x).flatten(1).shape[1]
    except RuntimeError:  # torch refuses the geometry
        assume(False)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(entries, 3))
    y, loss_fn = torch.randint(3, (len(x),)), nn.CrossEntropyLoss(reduction=reduction)
    with quick_programs() if quick else nullcontext():
        result = tnconv.compute(model, loss_fn, x, y, [*FIRST, EACH, *KFACS])
    factor = 1 / len(x) if reduction == "mean" else 1.0
    for name, gradients in per_sample_gradients(model, loss_fn, x, y, factor).items():
        for kind, expected in first_order(gradients).items():
            assert_close(result[getattr(q, kind)][name], expected, 1e-10)
    for name, expected in diagonals(model, loss_fn, x, y).items():
        assert_close(result[EACH][name], expected, 1e-10)
    read = layer(x).detach().requires_grad_()
    output = model[1:](read)
    columns = curvature(loss_fn, output, y).vectors()
    v = torch.stack([torch.autograd.grad(output, read, s, retain_graph=True)[0] for s in columns])
    u = patches(layer, x)
    for kfac in KFACS:
        assert_factors(result[kfac]["0.weight"], explicit(u, by_group(layer, v), kfac.flavour))
