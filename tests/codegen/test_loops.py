from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import inf

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.measure import peak_memory
from tests.strategies import Case, assert_close, geometries, operands_for, shipped
from tnconv import Program, compile
from tnconv.codegen import ROUTES, search
from tnconv.codegen.lowering.covers import Cover
from tnconv.codegen.lowering.finish import finished
from tnconv.codegen.planner import looped
from tnconv.codegen.prices import cost
from tnconv.codegen.prices.tables import Table
from tnconv.diagrams import (
    TensorNetwork,
    conv,
    conv_transpose,
    ggn_diagonal,
    gradient_norms,
    linear,
)

LAYER = conv((5, 4, 7, 6), (6, 2, 3, 2), stride=(2, 1), padding=((1, 0), (2, 1)), groups=2)
ONE_BY_ONE = [
    LAYER.vjp("weight", per_sample=True).terms[0],
    LAYER.vjp("weight", per_sample=True, extra={"m": 2}).terms[0],
    gradient_norms(LAYER),
    gradient_norms(LAYER, vectors=3),
    ggn_diagonal(LAYER),
    ggn_diagonal(LAYER, vectors=1),
    ggn_diagonal(LAYER, vectors=3),
    ggn_diagonal(LAYER, vectors=3, per_sample=True),
    gradient_norms(conv_transpose((3, 4, 5), (4, 3, 3), stride=2)),
    gradient_norms(linear((4, 5, 3), (2, 3))),
    ggn_diagonal(linear((4, 3), (2, 3)), vectors=2),
]


def programs(network: TensorNetwork, *routes: str) -> Iterator[Program]:
    """The programs that compute one position at a time, however slow, by all or these routes."""
    start = Cover.of(network, {name: at for at, name in enumerate(network.operands)})
    tried = {route: ROUTES[route] for route in routes or ROUTES if route != "loop"}
    for cover in looped(start, tried):
        yield Program(network, ((finished(cover, "as given", "auto", "contiguous"),),), ())


@pytest.mark.parametrize("network", ONE_BY_ONE, ids=str)
def test_one_position_at_a_time(network: TensorNetwork) -> None:
    operands = operands_for(network)
    found = list(programs(network))
    assert 1 <= len(found) <= 2
    for program in found:
        assert "for part_1" in program.source and "split(1" in program.source
        assert_close(program(**operands), network.reference(**operands), 1e-10)


@given(network=shipped(max_dims=2))
def test_wherever_it_applies(network: TensorNetwork) -> None:
    for program in programs(network):
        operands = operands_for(network)
        assert_close(program(**operands), network.reference(**operands), 1e-10)


@given(case=geometries(max_dims=3, empty=False), data=st.data())
def test_per_sample_quantities_of_any_convolution(case: Case, data: st.DataObject) -> None:
    layer = conv(case.input_shape, case.weight_shape, **case.kwargs)
    gradients = layer.vjp("weight", per_sample=True).terms[0]
    squares = [ggn_diagonal(layer, vectors=several) for several in (None, 1, 2)]
    network = data.draw(st.sampled_from([gradients, gradient_norms(layer), *squares]))
    for program in programs(network):
        operands = operands_for(network)
        assert_close(program(**operands), network.reference(**operands), 1e-10)


NO_CACHE = Table(cost.SHIPPED.values, replace(cost.SHIPPED.machine, cached=0))


def by_vector(network: TensorNetwork, item: int = cost.ITEM) -> list[Program]:
    """The programs that add the square of one vector at a time, where nothing fits in a cache."""
    with cost.using(NO_CACHE, item), pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "HOPELESS", inf)  # small turns are slow
        return [each for each in programs(network) if "part_3 in part_2.split(1)" in each.source]


@given(case=geometries(max_dims=2, empty=False), vectors=st.integers(2, 4))
def test_squares_of_vectors_are_added_within_a_turn(case: Case, vectors: int) -> None:
    """What needs no vector is computed once in a turn: patches."""
    layer = conv(case.input_shape, case.weight_shape, **case.kwargs)
    network = ggn_diagonal(layer, vectors=vectors)
    for program in by_vector(network):
        operands = operands_for(network)
        assert_close(program(**operands), network.reference(**operands), 1e-10)
        assert "part_1" not in program.source.split("part_3 in part_2")[1]


def test_squares_that_no_cache_holds_are_added_by_vector() -> None:
    """Where turns are small, one kernel for all vectors has fewer calls."""
    assert by_vector(ggn_diagonal(LAYER, vectors=3))
    for channels, expected in ((128, True), (8, False)):
        layer = conv((2, channels, 6, 6), (channels, channels, 3, 3), padding=1)
        network = ggn_diagonal(layer, vectors=9)
        program = compile(network)
        assert ("part_3 in part_2.split(1)" in program.source) is expected
        x, v = (torch.randn(s, dtype=torch.float64) for s in program.operands.values())
        each = [
            torch.nn.grad.conv2d_weight(x[n, None], layer.operands["weight"], v[m, n, None], 1, 1)
            for m in range(9)
            for n in range(2)
        ]
        assert_close(program.run(x, v), torch.stack(each).square().sum(0), 1e-10)


@given(case=geometries(max_dims=3, empty=False))
def test_samples_alone_have_a_price_of_their_own(case: Case) -> None:
    """Turns of one sample whose results are joined take ``Loop.alone`` times as long.

    Not so turns whose results are added, or where another dimension is before the samples.
    """
    layer = conv(case.input_shape, case.weight_shape, **case.kwargs)
    apart = layer.vjp("weight", per_sample=True).terms[0]
    inside = layer.vjp("weight", per_sample=True, extra={"m": 2}).terms[0]
    for network in (apart, inside, ggn_diagonal(layer)):
        found = []
        for alone in (1.0, 2.0):
            with cost.using(cost.SHIPPED.changed({"Loop.alone": alone})):
                found.append([(program.seconds, program.source) for program in programs(network)])
        for (once, source), (twice, same) in zip(*found, strict=True):
            assert source == same
            dearer = network is apart and "one n at a time" in source
            assert (twice > once) if dearer else (twice == once)


WIDE = conv((6, 8, 14, 14), (12, 8, 3, 3), padding=1)


@pytest.mark.parametrize("route", ["native", "window", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "network",
    [
        *WIDE.vjp("weight", per_sample=True).terms,
        gradient_norms(WIDE),
        ggn_diagonal(WIDE, vectors=2),
        ggn_diagonal(WIDE, vectors=2, per_sample=True),
    ],
    ids=str,
)
def test_what_turns_hold_is_counted(network: TensorNetwork, dtype: torch.dtype, route: str) -> None:
    """A turn's values are held until those of the next one replace them."""
    with cost.using(cost.SHIPPED, dtype.itemsize):
        program, *_ = programs(network, route)
    for each in (program, *(by_vector(network, dtype.itemsize) if route == "window" else ())):
        lean = replace(each, spare_memory=0)
        operands = {name: torch.randn(s, dtype=dtype) for name, s in lean.operands.items()}
        measured, predicted = peak_memory(partial(lean, **operands)), lean.peak_memory(dtype)
        assert 0.6 * predicted < measured <= predicted


SMALL = conv((2, 2, 3, 2), (2, 1, 2, 2), padding=(0, 1), groups=2)


@pytest.mark.parametrize(
    "network",
    [
        SMALL.vjp("weight", per_sample=True).terms[0],
        gradient_norms(SMALL, vectors=2),
        ggn_diagonal(SMALL, vectors=2),
    ],
    ids=str,
)
def test_torch_can_transform_it(network: TensorNetwork) -> None:
    program, *_ = programs(network)
    for each in (program, *by_vector(network)):
        operands = operands_for(network)
        given = [operands[name].requires_grad_() for name in each.operands]
        assert torch.autograd.gradcheck(each.run, given)
        assert torch.autograd.gradgradcheck(each.run, given)
    first, *rest = [array.detach() for array in given]
    several = torch.stack([first, 2 * first])
    one_side = torch.func.vmap(program.run, in_dims=(0, *(None for _ in rest)))
    expected = torch.stack([program.run(x, *rest) for x in several])
    torch.testing.assert_close(one_side(several, *rest), expected)
    whole = torch.compile(program.function, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(first, *rest), program.run(first, *rest))
