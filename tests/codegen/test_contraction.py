"""Products of two tensors are written as they are wanted."""

import random
from collections.abc import Sequence
from math import prod

import cotengra
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import assert_close, operands_for
from tnconv.codegen import compile
from tnconv.codegen.lowering.contraction import contraction_path
from tnconv.codegen.lowering.exhaustive import best_path
from tnconv.codegen.lowering.strided import operand
from tnconv.codegen.lowering.writer import CONTIGUOUS, MATMUL, SUM
from tnconv.diagrams import conv, kfac_reduce, linear, per_sample_gradients


def test_outer_products_need_no_copy_of_the_result() -> None:
    """Per-sample gradients ``v[n, d] x[n, c]``, where x comes first and d is wanted before c."""
    network = per_sample_gradients(linear((8, 96), (64, 96)))
    program, operands = compile(network), operands_for(network)
    assert [step.shape for plan in program.terms[0][:1] for step in plan.steps] == [(8, 64, 96)]
    value = program(**operands)
    assert value.is_contiguous() and value.shape == torch.Size((8, 64, 96))
    assert_close(value, network.reference(**operands), 1e-12)


def test_the_copy_of_a_result_in_another_order_is_priced() -> None:
    """Per-sample gradients of few positions: reordering the result would cost most of the time."""
    network = conv((8, 192, 8, 8), (192, 192, 3, 3)).vjp("weight", per_sample=True)
    program = compile(network, routes=("window",))
    assert CONTIGUOUS not in [step.operation for step in program.steps]
    x, v = (torch.randn(shape, dtype=torch.float64) for shape in program.operands.values())
    weights = [
        torch.nn.grad.conv2d_weight(one, (192, 192, 3, 3), given)
        for one, given in zip(x.split(1), v.split(1), strict=True)
    ]
    operands = dict(zip(program.operands, (x, v), strict=True))
    assert_close(program(**operands), torch.stack(weights), 1e-10)


def test_the_last_product_has_its_legs_in_the_wanted_order() -> None:
    """Its factor is copied anyway: with the rows in order, the large result is not copied again."""
    network = kfac_reduce((8, 64, 32, 32), 3, 2, 1, transposed=True, output_padding=1)
    program, operands = compile(network), operands_for(network)
    products = [step for step in program.steps if prod(step.shape) == prod(network.shape)]
    assert "copy" not in [step.kernel.kind for step in products]
    assert_close(program(**operands), network.reference(**operands), 1e-10)


def test_a_factor_is_copied_by_the_longer_rows() -> None:
    """All samples in one product: the gradient's channels are exchanged with them by whole rows."""
    network = conv((8, 512, 8, 8), (192, 512, 1, 1)).vjp("x")
    program, operands = compile(network), operands_for(network)
    copy, product, _ = program.steps
    given = operand(list(network.operands).index("grad_output"), (8, 192, 8, 8))
    assert copy.value.inputs == (given.permute((1, 0, 2, 3)),)
    assert product.operation is MATMUL
    assert_close(program(**operands), network.reference(**operands), 1e-10)


@pytest.mark.parametrize("size", [(64, 60), (16, 32, 28)])
def test_sums_in_steps_take_other_dimensions_first_as_they_are(size: tuple[int, ...]) -> None:
    """Columns that a stride skips are summed along, as vectors, and left out of the last sum."""
    network = kfac_reduce((8, 16, *size), 1, stride=2)
    program, operands = compile(network), operands_for(network)
    *others, last = [step for step in program.steps if step.operation is SUM]
    columns = (size[-1] // 2, 2)
    read = [
        [(view.shape[-1], view.strides[-1]) for view in step.value.inputs[0].views]
        for step in (*others, last)
    ]
    assert len(others) == len(size) - 1 and columns in read.pop()
    assert not any(columns in views for views in read)
    assert_close(program(**operands), network.reference(**operands), 1e-10)


@pytest.mark.parametrize(
    ("channels", "size", "native"), [((192, 64), 35, True), ((32, 16), 128, False)]
)
def test_threads_share_products_where_they_are_clearly_faster(
    channels: tuple[int, int], size: int, native: bool
) -> None:
    """Measured on two: about torch's speed on 35x35 pixels, and 1.2 to 1.5 of it on 128x128."""
    summed, kept = channels
    network = conv((8, summed, size, size), (kept, summed, 1, 1)).vjp("x")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ((chosen, *_),) = compile(network).terms
        assert chosen.is_torchs == native
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("seed", range(4))
def test_orders_of_long_chains_are_nearly_the_best(seed: int) -> None:
    """Against the classical dynamic programme over parentheses, for 60 matrices."""
    sizes = random.Random(seed).choices((2, 3, 5, 8, 16, 64), k=61)
    legs = [(f"a{at}", f"a{at + 1}") for at in range(60)]
    path = contraction_path(legs, ("a0", "a60"), {f"a{at}": size for at, size in enumerate(sizes)})
    left, work = [(at, at + 1) for at in range(60)], 0
    for first, second in path:
        (a, b), (c, d) = sorted((left[first], left[second]))
        assert b == c
        left = [ends for at, ends in enumerate(left) if at not in (first, second)] + [(a, d)]
        work += sizes[a] * sizes[b] * sizes[d]
    best = {(at, at + 1): 0 for at in range(60)}
    for length in range(2, 61):
        for a in range(61 - length):
            d = a + length
            best[a, d] = min(
                best[a, b] + best[b, d] + sizes[a] * sizes[b] * sizes[d] for b in range(a + 1, d)
            )
    assert work <= 1.02 * best[0, 60]


@given(data=st.data(), count=st.integers(3, 6))
def test_no_path_of_few_values_is_better(data: st.DataObject, count: int) -> None:
    """Against cotengra, also for hyper-edges, scalars, and networks that fall apart."""
    legs = st.lists(st.integers(0, 6), max_size=4, unique=True).map(tuple)
    inputs = data.draw(st.lists(legs, min_size=count, max_size=count))
    used = sorted({leg for some in inputs for leg in some})
    output = data.draw(st.lists(st.sampled_from(used), max_size=3, unique=True)) if used else []
    sizes = data.draw(st.lists(st.sampled_from((2, 3, 8, 16)), min_size=7, max_size=7))
    names = [tuple(f"l{leg}" for leg in some) for some in (*inputs, output)]
    sized = {f"l{leg}": size for leg, size in enumerate(sizes)}
    search = cotengra.OptimalOptimizer(minimize="flops")
    tree = cotengra.array_contract_tree(names[:-1], names[-1], sized, optimize=search)
    path = best_path(inputs, tuple(output), tuple(sizes))
    assert multiplications(path, inputs, output, sizes) <= multiplications(
        tree.get_path(), inputs, output, sizes
    )


def multiplications(
    path: Sequence[Sequence[int]],
    inputs: Sequence[tuple[int, ...]],
    output: Sequence[int],
    sizes: Sequence[int],
) -> int:
    """Those along a path, where legs that nothing else holds are summed first."""
    left, total = [frozenset(legs) for legs in inputs], 0
    for positions in path:
        first, second = (left[at] for at in positions)
        left = [legs for at, legs in enumerate(left) if at not in positions]
        needed = frozenset(output).union(*left)
        met = first & (needed | second) | second & (needed | first)
        total += prod(sizes[leg] for leg in met)
        left.append(met & needed)
    assert len(left) == 1 and left[0] == frozenset(output)
    return total
