"""Forced orders of contraction of Gram matrices: random layers, one batch and two."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.models.test_layers import LAYERS, weighted
from tests.operators.test_low_rank import Tied, Words
from tests.strategies import Case, assert_close, geometries, operands_for, transposed
from tnconv import compile
from tnconv.codegen import Nest
from tnconv.diagrams import TensorNetwork, conv, conv_transpose, gradient_dots, ntk_block
from tnconv.operators.low_rank import ORDERS, JacobianRows, Order, low_rank_ggn
from tnconv.operators.low_rank.orders import nest
from tnconv.operators.low_rank.sources import LossGradients
from tnconv.quantities.second_order import columns

pytestmark = pytest.mark.usefixtures("float64")


def layer_of(case: Case, batch: int, turned: bool) -> TensorNetwork:
    shape = case.output_shape if turned else case.input_shape
    shape = (batch, *shape[1:])
    if turned:
        return conv_transpose(shape, case.weight_shape, **transposed(case))
    return conv(shape, case.weight_shape, **case.kwargs)


@settings(max_examples=settings().max_examples // 2)
@given(
    case=geometries(max_dims=2, empty=False),
    turned=st.booleans(),
    vectors=st.sampled_from([None, 1, 2]),
    order=st.sampled_from(ORDERS),
)
def test_orders_of_random_layers(
    case: Case, turned: bool, vectors: int | None, order: Order
) -> None:
    if not case.batched:
        return
    layer, other = (layer_of(case, batch, turned) for batch in (2, 3))
    for network in (
        gradient_dots(layer, "weight", vectors),
        ntk_block(layer, other, "weight", vectors, 2),
    ):
        operands = operands_for(network)
        program = compile(network, order=nest(network, order))
        assert_close(program(**operands), network.reference(**operands), 1e-10)


LAYER = conv((3, 2, 7), (5, 2, 3), padding=1)
N, C, D, K, W, M = 3, 2, 5, 3, 7, 4
INTERMEDIATE = {
    "parameter_space": {M * N * D * C * K},
    "data_space": {N * N * W * W, M * N * M * N * W * W},
    "mixed": {N * N * W * W, M * N * D * N * W},
    "one_sided": {M * N * D * C * K, M * N * D * N * W},
    "pixel_gram": {N * W * N * W, M * N * D * N * W},
}


@pytest.mark.parametrize("order", ORDERS)
def test_orders_are_forced(order: Order) -> None:
    """Every order makes the tensors that it is named for, and no other order makes the same."""
    network = gradient_dots(LAYER, "weight", M)
    program = compile(network, order=nest(network, order))
    made = {step.value.size for step in program.steps}
    assert made >= INTERMEDIATE[order]
    others = set().union(*INTERMEDIATE.values()) - INTERMEDIATE[order]
    assert made.isdisjoint(others)
    assert ("pixel gram" in program.terms[0][0].routes) == (order == "pixel_gram")


def rows_of(model: nn.Module, x: Tensor) -> JacobianRows:
    loss_fn, targets = weighted(model, x)
    return JacobianRows.of(model, loss_fn, x, targets, LossGradients())


@settings(max_examples=settings().max_examples // 2)
@given(name=st.sampled_from(sorted(LAYERS)), order=st.sampled_from(ORDERS), chosen=st.booleans())
def test_orders_of_every_kind_of_layer(name: str, order: Order, chosen: bool) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    model = build()
    rows, other = rows_of(model, torch.rand(shape)), rows_of(model, torch.rand(2, *shape[1:]))
    j, k = (explicit(each) for each in (rows, other))
    how = {key: order for key in rows.like} if chosen else order
    assert_close(rows.gram(how), torch.einsum("mnp,ijp->mnij", j, j), 1e-10)
    assert_close(rows.cross_gram(other, how), torch.einsum("mnp,ijp->mnij", j, k), 1e-10)


def explicit(rows: JacobianRows) -> Tensor:
    return torch.cat([term.gradients.flatten(2) for term in rows.terms.values()], 2)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "model, x",
    [(Tied, (4, 3, 6)), (Words, (4, 3))],
    ids=["tied", "words"],
)
def test_calls_that_add_up(model: type[nn.Module], x: tuple[int, ...], order: Order) -> None:
    torch.manual_seed(0)
    network = model()
    batch = torch.randint(7, x) if model is Words else torch.rand(x)
    how = network, nn.CrossEntropyLoss(), batch, torch.tensor([0, 3, 1, 1])
    expected = low_rank_ggn(*how).gram
    for limit in (None, 2**16):
        found = low_rank_ggn(*how, order=order, memory_limit=limit)
        torch.testing.assert_close(found.gram, expected, rtol=1e-9, atol=1e-12)


def test_within_a_memory_limit() -> None:
    network = gradient_dots(conv((4, 8, 9), (8, 8, 3)), "weight", 3)
    operands = operands_for(network)
    order = nest(network, "parameter_space")
    whole = compile(network, order=order).peak_memory(torch.float64)
    program = compile(network, order=order, memory_limit=whole // 3, dtype=torch.float64)
    assert program.peak_memory(torch.float64) <= whole // 3 and program.chunks
    assert_close(program(**operands), network.reference(**operands), 1e-10)


def test_unknown_orders_are_refused() -> None:
    model, x, targets = Tied(), torch.rand(4, 3, 6), torch.tensor([0, 3, 1, 1])
    how = model, nn.CrossEntropyLoss(), x, targets
    with pytest.raises(ValueError, match="order is 'fast'; expected one of"):
        low_rank_ggn(*how, order="fast")
    with pytest.raises(ValueError, match=r"no parameters are called tail\.weight"):
        low_rank_ggn(*how, order={"tail.weight": "mixed"})
    rows = JacobianRows.of(*how, columns("type-2", 1, None))
    with pytest.raises(ValueError, match="order is 'fast'; expected one of"):
        rows.gram("fast")
    with pytest.raises(ValueError, match=r"order has tensors \(0, 1\); expected 0 to 3"):
        compile(gradient_dots(LAYER), order=Nest((0, 1)))
    with pytest.raises(ValueError, match="an order is given for 2 networks"):
        compile([LAYER, LAYER], order=Nest((0, 1)))
