"""Products of patches with themselves: values, plans and prices; no kernel of ours runs here.

Kernels themselves are run by `test_triton_kernels`.
"""

import pickle
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.own_kernels import DISTINCT, own_kernels, table, windows
from tests.strategies import Case, assert_close, geometries
from tnconv import Program, compile
from tnconv.codegen.kernels.patch_gram import operation, patch_gram
from tnconv.codegen.kernels.tiling import MOST_PARTS, SIDES, tiling
from tnconv.codegen.kernels.windows import Windows, gram_vjp
from tnconv.codegen.prices import accelerator_scales, calibration, cost, store
from tnconv.codegen.prices.tables import ACCELERATOR
from tnconv.diagrams import TensorNetwork, conv, input_factor, kfac_expand

GPU = torch.device("cuda", 0)
LAYER = (32, 64, 56, 56)


def by_definition(x: Tensor, given: Windows) -> Tensor:
    """Entry by entry of the unfolded input, from zeros outside of the image."""
    kernel_size, positions, stride, padding, dilation, groups = given
    entries = []
    for tap, at in product(*(product(*map(range, each)) for each in (kernel_size, positions))):
        steps = zip(at, stride, tap, dilation, padding, strict=True)
        place = tuple(o * s + k * d - p for o, s, k, d, p in steps)
        inside = all(0 <= i < size for i, size in zip(place, x.shape[2:], strict=True))
        read = x[:, :, *(place if inside else [0] * len(place))]
        entries.append(read if inside else 0 * read)
    count = prod(kernel_size), prod(positions)
    if not entries:
        return x.new_zeros(groups, given.rows(x), given.rows(x))
    unfolded = torch.stack(entries, -1).reshape(len(x), groups, -1 if len(x) else 1, *count)
    if not len(x):
        return x.new_zeros(groups, given.rows(x), given.rows(x))
    found = torch.einsum("ngcko,ngdlo->gckdl", unfolded, unfolded)
    return found.reshape(groups, given.rows(x), given.rows(x))


@example(DISTINCT[0])
@example(DISTINCT[1])
@example(DISTINCT[2])
@given(windows())
def test_values_and_gradients_are_those_of_the_definition(
    drawn: tuple[tuple[int, ...], Windows],
) -> None:
    shape, given = drawn
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found, expected = patch_gram(x, *given), by_definition(x, given)
    assert_close(found, expected)
    factor = torch.randn_like(found)
    by_hand = gram_vjp(x, factor, given)
    if expected.requires_grad:
        assert_close(by_hand, torch.autograd.grad(expected, x, factor, allow_unused=True)[0])
    else:
        assert not by_hand.any()
    numbers = (*map(list, given[:5]), given.groups)
    assert_close(operation(x, *numbers), expected)


def test_the_operation_is_what_torch_expects() -> None:
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    asked = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operation, (x, [3], [5], [1], [1], [1], 2), test_utils=asked)
    assert patch_gram(x.to("meta"), (3,), (5,), (1,), (1,), (1,), 2).shape == (2, 6, 6)


def factor(case: Case) -> TensorNetwork:
    network = input_factor(conv(case.input_shape, case.weight_shape, **case.kwargs), scale=1)
    assert isinstance(network, TensorNetwork)
    return network


def plans(network: Any, **options: Any) -> list[Program]:
    """The programs by our kernel that were considered."""
    with own_kernels():
        program = compile(network, **options)
    return [
        Program(program.network, ((plan,),), ())
        for plan in program.terms[0]
        if "patch gram" in plan.routes
    ]


@settings(max_examples=settings.default.max_examples // 4)
@given(geometries(), st.booleans())
def test_plans_give_the_factor(case: Case, halves: bool) -> None:
    network = factor(case)
    x = torch.randn(case.input_shape, dtype=torch.float64)
    dtype = torch.float16 if halves else torch.float64
    for program in plans(network, routes=["patch gram"], dtype=dtype):
        assert_close(program(x=x), network.reference(x=x))


def test_calls_are_readable() -> None:
    """Zeros are written before, or left to the kernel; a program names what it needs."""
    found = plans(kfac_expand((8, 3, 32, 32), 3, stride=2, padding=1), routes=["patch gram"])
    sources = [program.source for program in found]
    assert any("F.pad" in source for source in sources)
    (inside,) = (source for source in sources if "F.pad" not in source)
    assert "from tnconv.codegen.kernels.patch_gram import patch_gram" in inside
    call = "patch_gram(x, kernel_size=(3, 3), positions=(16, 16), stride=(2, 2), padding=(1, 1)"
    assert call in "".join(inside.split("\n")).replace(" " * 8, " ").replace("( ", "(")
    for program in found:
        x = torch.randn(8, 3, 32, 32)
        again = pickle.loads(pickle.dumps(program))
        assert torch.equal(again(x=x), program(x=x))


def test_numbers_of_sixteen_bits_have_channels_innermost() -> None:
    """So that they are loaded in vectors; others are loaded as they lie."""
    for dtype, channels, copied in (
        (torch.bfloat16, 64, True),
        (torch.bfloat16, 24, False),
        (torch.float32, 64, False),
    ):
        network = kfac_expand((4, channels, 8, 8), 3, padding=1)
        for program in plans(network, routes=["patch gram"], dtype=dtype):
            names = [step.operation.name for step in program.steps]
            assert ("contiguous" in names) == copied
            x = torch.randn(4, channels, 8, 8, dtype=torch.float64)
            assert_close(program(x=x), network.reference(x=x))


def test_what_is_no_product_with_itself_has_no_such_plan() -> None:
    """Nor has anything on devices without our kernels, or in complex numbers."""
    layer = conv((2, 3, 6), (4, 3, 3), padding=1)
    assert not plans(layer) and not plans(layer.vjp("weight"))
    assert not plans(kfac_expand((2, 3, 6), 3).vjp("x").terms[0])
    network = kfac_expand((2, 3, 6), 3)
    assert plans(network) and not plans(network, dtype=torch.complex64)
    for program in (compile(network), compile(network, routes=["patch gram"])):
        assert all("patch gram" not in plan.routes for plan in program.terms[0])


def test_it_is_chosen_where_it_is_clearly_faster() -> None:
    """Its time was never measured: another plan has to take 1.3 times as long by prediction."""
    seen = set()
    for shape, kernel, options in (
        ((32, 3, 224, 224), 7, {"stride": 2, "padding": 3}),
        (LAYER, 3, {"padding": 1}),
        ((32, 128, 56, 56), 3, {"padding": 1, "groups": 32}),
        ((32, 512, 7, 7), 3, {"padding": 1}),
    ):
        with own_kernels():
            program = compile(kfac_expand(shape, kernel, **options))
        best, *others = program.terms[0]
        ours = "patch gram" in best.routes
        seen.add(ours)
        if ours:
            rest = [plan.seconds for plan in others if "patch gram" not in plan.routes]
            assert 1.3 * best.seconds < min(rest)
    assert seen == {True, False}


@given(
    rows=st.integers(1, 5000),
    groups=st.integers(1, 64),
    positions=st.integers(1, 10**6),
    item=st.sampled_from((2, 4, 8)),
    units=st.integers(1, 200),
    tensor_cores=st.booleans(),
)
def test_tiles_cover_the_triangle(
    rows: int, groups: int, positions: int, item: int, units: int, tensor_cores: bool
) -> None:
    found = tiling(rows, groups, positions, item, units, tensor_cores)
    assert found.block in SIDES and found.block**2 * max(4, item) <= 2**16
    assert (found.side - 1) * found.block < rows
    assert found.side * found.block >= rows and found.per_split % found.depth == 0
    assert (found.splits - 1) * found.per_split < positions <= found.splits * found.per_split
    parts = 4 * groups * found.entries * found.splits
    assert found.splits == 1 or parts <= MOST_PARTS
    assert found.entries * 2 >= rows**2


def test_lines_of_tiles_are_the_triangle() -> None:
    """The arithmetic of `triton_grams._upper`, for all small sides."""
    for side in range(1, 20):
        even, seen = 1 - side % 2, []
        for tile in range(side * (side + 1) // 2):
            line, at = divmod(tile, side + even)
            first = at < side - line
            seen.append((line, line + at) if first else (side - line - even, at - even))
        assert sorted(seen) == [(i, j) for i in range(side) for j in range(i, side)]


def test_prices_follow_the_triangle() -> None:
    with cost.using(table(GPU, torch.float32)):
        small, large = (cost.patch_gram(1, rows, 10**5, 10**7) for rows in (576, 1152))
        assert 2.5 < large.seconds / small.seconds < 4.5
        assert large.flops < 1.3 * 1152**2 * 10**5  # twice as many for the whole square
        inside = cost.patch_gram(1, 576, 10**5, 10**7, 2)
        assert small.seconds < inside.seconds < 2 * small.seconds
        moved = cost.patch_gram(1, 16, 10**5, 10**9)
        assert moved.seconds >= 4e9 / cost.in_use().value("Calls.bandwidth")
    unfolded = cost.patch_gram(1, 576, 10**4, 10**6)
    assert unfolded.seconds == cost.matmul(1, 576, 576, 10**4).seconds


def test_only_devices_with_the_kernel_are_asked_for_its_time() -> None:
    own = replace(ACCELERATOR, own_kernels=True)
    assert accelerator_scales.PATCH_GRAMS in dict(accelerator_scales.probes(own))
    assert accelerator_scales.PATCH_GRAMS not in dict(accelerator_scales.probes(ACCELERATOR))
    start = table(GPU, torch.float32)
    times = {name: each.seconds(start) for name, each in accelerator_scales.probes(ACCELERATOR)}
    found, refused = accelerator_scales.scaled(start, times)
    assert not refused and found.value("PatchGram.speed") == start.value("PatchGram.speed")


def test_a_table_without_the_kernels_time_is_not_taken_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Installing Triton later changes the key, so that the device is measured again."""
    monkeypatch.setattr(store, "device_name", str)
    keys = []
    for version in ("3.9.0", "not installed"):
        monkeypatch.setattr(store, "_version", lambda _, version=version: version)
        keys.append(calibration._key(GPU, torch.float32))
    assert keys[0]["triton"] != keys[1]["triton"]
    assert "triton" not in calibration._key(torch.device("cpu"), torch.float32)
