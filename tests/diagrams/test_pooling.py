"""Average pooling against torch in up to three dimensions, and against loops in more."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vjp

import tnconv
from tests.strategies import assert_close
from tnconv.diagrams import avg_pool, pool_counts, reciprocal_counts

NATIVE = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


@st.composite
def poolings(draw, min_dims=1, max_dims=3, pairs=False):
    """Sizes and keywords that torch takes: paddings of at most half the kernel."""
    dims = draw(st.integers(min_dims, max_dims))
    kernel = draw(st.tuples(*[st.integers(1, 4 if dims < 4 else 2)] * dims))
    stride = draw(st.none() | st.tuples(*[st.integers(1, 5 if dims < 4 else 3)] * dims))
    sides = [st.integers(0, k // 2) for k in kernel]
    padding = draw(st.tuples(*sides))
    if pairs:
        padding = draw(st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * dims))
    widths = [p if pairs else (p, p) for p in padding]
    ceil = draw(st.booleans())
    steps = stride or kernel
    least = [
        max(1, k - sum(w) - (s - 1 if ceil else 0))
        for k, s, w in zip(kernel, steps, widths, strict=True)
    ]
    if dims == 3 and not pairs:  # there torch refuses kernels larger than the input
        least = kernel
    size = tuple(draw(st.integers(n, n + (6 if dims < 4 else 2))) for n in least)
    batch = draw(st.sampled_from(((), (2,), (1,), (0,))))
    options = {"ceil_mode": ceil, "count_include_pad": draw(st.booleans())}
    return (*batch, 2, *size), (kernel, stride, padding), options


def values(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def operands_of(network, shape, arguments, options):
    operands = {"x": values(shape)}
    if "reciprocal_counts" in network.operands:
        counts = pool_counts(shape, *arguments, **options)
        operands["reciprocal_counts"] = reciprocal_counts(counts, torch.float64)
    return operands


@given(pooling=poolings(), divisor=st.none() | st.sampled_from((1, 3, -2)))
def test_torch(pooling, divisor):
    """Every combination of torch's keywords, forward and backward, dense and compiled."""
    shape, arguments, options = pooling
    kernel, stride, padding = arguments
    dims = len(kernel)
    network = avg_pool(shape, *arguments, divisor, **options)
    operands = operands_of(network, shape, arguments, options)
    keywords = options | ({"divisor_override": divisor} if dims > 1 else {})

    def native(x):
        y = NATIVE[dims - 1](x, kernel, stride, padding, **keywords)
        return y

    if dims == 1 and divisor is not None:  # torch has no divisor there: a second dimension of 1

        def native(x):
            y = F.avg_pool2d(
                x[..., None],
                (*kernel, 1),
                None if stride is None else (*stride, 1),
                (*padding, 0),
                **options,
                divisor_override=divisor,
            )
            return y[..., 0]

    x = operands["x"]
    if not x.numel():  # torch refuses some empty batches
        assert network.shape == (0, *native(torch.ones(1, *shape[1:])).shape[1:])
        return
    expected, pull = vjp(native, x)
    assert_close(network.reference(**operands), expected)
    assert_close(tnconv.contract(network, **operands), expected)
    v = values(expected.shape)
    gradient = network.vjp("x")
    given_ = {n: y for n, y in (operands | {"grad_output": v}).items() if n in gradient.operands}
    assert_close(tnconv.contract(gradient, **given_), pull(v)[0])


@given(pooling=poolings(1, 5, pairs=True))
def test_loops(pooling):
    """Any number of dimensions and padding per side: a mean over the entries that count."""
    shape, (kernel, stride, padding), options = pooling
    network = avg_pool(shape, kernel, stride, padding, **options)
    operands = operands_of(network, shape, (kernel, stride, padding), options)
    x, dims = operands["x"], len(kernel)
    expected = torch.zeros(network.shape, dtype=torch.float64)
    for o in product(*map(range, network.shape[-dims:])):
        starts = [
            at * s - left for at, s, (left, _) in zip(o, stride or kernel, padding, strict=True)
        ]
        inside, counted = [], 1
        for start, k, size, (left, right) in zip(
            starts, kernel, x.shape[-dims:], padding, strict=True
        ):
            taps = [start + tap for tap in range(k)]
            inside.append(slice(max(start, 0), max(0, min(start + k, size))))
            low, high = (-left, size + right) if options["count_include_pad"] else (0, size)
            counted *= sum(low <= tap < high for tap in taps)
        part = x[(..., *inside)].sum(tuple(range(-dims, 0)))
        expected[(..., *o)] = part / counted if counted else 0.0
    assert_close(network.reference(**operands), expected)


def test_equal_counts_are_a_scale():
    """An operand only where windows differ: padding that is not counted, or cut by ceil_mode."""
    shape = (2, 3, 8, 8)
    for options in ({}, {"ceil_mode": True}, {"count_include_pad": False}):
        assert list(avg_pool(shape, 2, **options).operands) == ["x"]
    for options in ({"padding": 1, "count_include_pad": False}, {"ceil_mode": True}):
        assert list(avg_pool(shape, 3, 2, **options).operands) == ["x", "reciprocal_counts"]
    assert list(avg_pool(shape, 3, 2, 0, 5, ceil_mode=True).operands) == ["x"]
    assert pool_counts(shape, 3, 2, ceil_mode=True) == ((3, 3, 3, 2), (3, 3, 3, 2))


def test_bad_arguments():
    with pytest.raises(ValueError, match="divisor_override is 0"):
        avg_pool((2, 3, 8), (2,), None, 0, 0)
    with pytest.raises(ValueError, match="kernel of span 5"):
        avg_pool((2, 3, 4), (5,))
    with pytest.raises(ValueError, match="kernel_size"):
        avg_pool((2, 3, 4), (0,))
