"""What torch's convolution kernels hold, measured, against what is said of them."""

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.measure import peak_memory
from tnconv.codegen.prices.native_shapes import Convolution
from tnconv.codegen.prices.scratch import scratch

KINDS = ("convolution", "weight gradient", "input gradient")
CONVOLVE = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}


def layer(
    samples: int,
    groups: int,
    channels: tuple[int, int],
    dims: tuple[tuple[int, int, int, int, int], ...],
) -> Convolution:
    """Channels of one group; for each dimension input, kernel, stride, padding and dilation."""
    i, k, s, p, d = zip(*dims, strict=True)
    o = tuple((n + 2 * pad - (t - 1) * gap - 1) // step + 1 for n, t, step, pad, gap in dims)
    c_in, c_out = channels
    x, w = (samples, groups * c_in, *i), (groups * c_out, c_in, *k)
    return Convolution(x, w, (samples, groups * c_out, *o), groups, s, d, p)


def call(kind: str, c: Convolution, dtype: torch.dtype) -> Any:
    """What the compiler emits for such a kernel."""
    x, w, y = (torch.randn(shape, dtype=dtype) for shape in (c.x, c.w, c.y))
    options: list[Any] = [list(c.strides), list(c.paddings), list(c.dilations)]

    def gradient(kernel: Tensor | None, image: Tensor | None, at: int) -> Tensor:
        given = (
            y,
            y.new_empty(c.x) if image is None else image,
            y.new_empty(c.w) if kernel is None else kernel,
        )
        mask = [at == 0, at == 1, False]
        zeros = [0] * len(c.k)
        backward = torch.ops.aten.convolution_backward
        found: Tensor = backward(*given, None, *options, False, zeros, c.groups, mask)[at]
        return found

    return {
        "convolution": lambda: CONVOLVE[len(c.k)](x, w, None, *options, c.groups),
        "weight gradient": lambda: gradient(None, x, 1),
        "input gradient": lambda: gradient(w, None, 0),
    }[kind]


def held(kind: str, c: Convolution, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes measured and predicted, results included."""
    e, item = c.entries, dtype.itemsize
    result = {"convolution": e.y, "weight gradient": e.w, "input gradient": e.x}[kind]
    predicted = item * result + scratch(kind, c, item, torch.get_num_threads())
    return peak_memory(call(kind, c, dtype)), predicted


SIZES = {1: 200, 2: 40, 3: 12}
dimension = st.tuples(*(st.integers(1, most) for most in (5, 3, 2)), st.integers(0, 2))


@st.composite
def layers(draw: st.DrawFn) -> Convolution:
    dims = draw(st.integers(1, 3))
    some = st.sampled_from((1, 2, 3, 4, 6, 8, 12, 16, 17, 24, 32))
    groups = draw(st.sampled_from((1, 1, 1, 2, 3, 4, 8, 16, 20)))
    channels = (1, 1) if groups > 1 and draw(st.booleans()) else draw(st.tuples(some, some))
    sizes = []
    for _ in range(dims):
        k, s, d, p = draw(dimension)
        least = max(1, (k - 1) * d + 1 - 2 * p)
        sizes.append((draw(st.integers(least, least + SIZES[dims])), k, s, p, d if k > 1 else 1))
    return layer(draw(st.integers(1, 9)), groups, channels, tuple(sizes))


@given(c=layers(), kind=st.sampled_from(KINDS), double=st.booleans())
@example(layer(8, 1, (1, 1), ((20, 3, 1, 1, 1),) * 2), "convolution", False)
@example(layer(4, 1, (8, 8), ((29, 3, 2, 1, 1),) * 2), "input gradient", False)
@example(layer(2, 1, (4, 4), ((10, 3, 1, 1, 1),) * 3), "convolution", False)
@example(layer(3, 2, (2, 2), ((4, 1, 1, 0, 1),) * 3), "convolution", False)
@example(layer(16, 1, (4, 4), ((10, 1, 1, 0, 1),) * 2), "convolution", False)
def test_kernels_hold_no_more_than_is_said(c: Convolution, kind: str, double: bool) -> None:
    measured, predicted = held(kind, c, torch.float64 if double else torch.float32)
    assert measured <= predicted


USUAL = {
    "few channels": layer(8, 1, (3, 16), ((32, 3, 1, 1, 1),) * 2),
    "layer": layer(8, 1, (16, 32), ((24, 3, 1, 1, 1),) * 2),
    "strides": layer(8, 1, (32, 32), ((24, 3, 2, 1, 1),) * 2),
    "depthwise": layer(8, 32, (1, 1), ((20, 3, 1, 1, 1),) * 2),
    "groups": layer(8, 4, (16, 16), ((20, 3, 1, 1, 1),) * 2),
    "signals": layer(8, 1, (32, 32), ((200, 5, 1, 2, 1),)),
    "volumes": layer(2, 1, (16, 16), ((12, 3, 1, 1, 1),) * 3),
    "one sample": layer(1, 1, (3, 8), ((20, 3, 1, 1, 1),) * 2),
    "dilation": layer(4, 1, (16, 16), ((24, 3, 1, 2, 2),) * 2),
}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", USUAL)
def test_usual_layers_hold_about_what_is_said(name: str, kind: str, double: bool) -> None:
    measured, predicted = held(kind, USUAL[name], torch.float64 if double else torch.float32)
    assert 0.6 * predicted <= measured <= predicted
