"""Gram matrices in tiles, within limits, and of rows that are kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.operators.test_low_rank import case
from tests.operators.test_orders import layer_of
from tests.strategies import Case, assert_close, geometries, operands_for
from tnconv import compile
from tnconv.codegen.baseline import baseline
from tnconv.diagrams import conv, gradient_dots, ntk_block, per_sample_gradients
from tnconv.diagrams.errors import TooLittleMemory
from tnconv.operators.low_rank import gram_plans, low_rank_ggn
from tnconv.operators.low_rank.gram_plans import Settings, planned
from tnconv.operators.low_rank.tiles import OTHER, Tiled, block_rows, squares, tiled

pytestmark = pytest.mark.usefixtures("float64")


@settings(max_examples=settings().max_examples // 2)
@given(
    case=geometries(max_dims=2, empty=False),
    turned=st.booleans(),
    vectors=st.sampled_from([None, 2]),
    samples=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    count=st.integers(1, 6),
    triangle=st.booleans(),
)
def test_tiles_of_random_layers(
    case: Case,
    turned: bool,
    vectors: int | None,
    samples: tuple[int, int],
    count: int,
    triangle: bool,
) -> None:
    if not case.batched:
        return
    first, second = (layer_of(case, batch, turned) for batch in samples)
    pair = ntk_block(first, second, "weight", vectors, vectors)
    found = tiled(pair, False, squares(*samples, count, False), baseline)
    operands = operands_for(pair)
    value = found.run(*[operands[name] for name in found.operands])
    assert_close(value, pair.reference(**operands), 1e-10)
    own = ntk_block(first, first, "weight", vectors, vectors)
    spans = block_rows(samples[0], count) if triangle else squares(*samples[:1] * 2, count, True)
    found = tiled(own, True, spans, baseline)
    assert not any(name.startswith(OTHER) for name in found.operands)
    value = found.run(*[operands[name] for name in found.operands])
    expected = gradient_dots(first, "weight", vectors)
    assert_close(value, expected.reference(**{n: operands[n] for n in found.operands}), 1e-10)


LAYER = conv((6, 3, 9), (4, 3, 3), padding=0)


@pytest.mark.parametrize("order", ["auto", "parameter_space"])
def test_tiles_where_memory_is_limited(order: str) -> None:
    network, pair = gradient_dots(LAYER, "weight", 3), ntk_block(LAYER, LAYER, "weight", 3, 3)
    rows = per_sample_gradients(LAYER, "weight", 3)
    whole = planned(Settings(compile, "cpu", order, None), network, pair, rows)
    least = 8 * 18 * 18 + 6000  # the result, and one tile
    plan = planned(Settings(compile, "cpu", order, (least, torch.float64)), network, pair, rows)
    assert isinstance(plan.way, Tiled) and plan.way.peak(8) <= least and plan.form is None
    with pytest.raises(TooLittleMemory, match="memory_limit is 100 bytes; the Gram matrix alone"):
        planned(Settings(compile, "cpu", order, (100, torch.float64)), network, pair, rows)
    operands = operands_for(network)
    for way in (whole, plan):
        found = way.run(*[operands[name] for name in way.operands])
        assert_close(found, network.reference(**operands), 1e-10)


@pytest.mark.parametrize("loss", ["cross-entropy", "squares"])
@pytest.mark.parametrize("how", [{}, {"curvature_samples": [1, 3], "gradient_samples": [0, 1]}])
def test_rows_that_are_kept(
    monkeypatch: pytest.MonkeyPatch, loss: str, how: dict[str, list[int]]
) -> None:
    """Everything that follows a Gram matrix is the same where rows are explicit."""
    model, loss_fn, x, targets = case("strided", loss)
    plain = low_rank_ggn(model, loss_fn, x, targets, order="mixed", **how)
    monkeypatch.setattr(gram_plans, "QUICK", 0.0)
    monkeypatch.setattr(gram_plans, "FORMED", 100.0)
    kept = low_rank_ggn(model, loss_fn, x, targets, order="parameter_space", **how)
    close(kept.gram, plain.gram)
    assert kept.block._columns.terms["0.weight"].v is None
    assert plain.block._columns.terms["0.weight"].v is not None
    for ggn in (plain, kept):
        ggn.eigh()
    found, expected = kept.directional_derivatives(k=2), plain.directional_derivatives(k=2)
    close(found.slopes.square(), expected.slopes.square())
    close(found.curvatures, expected.curvatures)
    vector = torch.rand(kept.shape[0])
    for one, other in (
        (kept @ vector, plain @ vector),
        (kept.solve(vector, 0.3), plain.solve(vector, 0.3)),
        *zip(kept.newton_step(0.1).values(), plain.newton_step(0.1).values(), strict=True),
        *zip(kept.gradient().values(), plain.gradient().values(), strict=True),
        *zip(kept.diagonal().values(), plain.diagonal().values(), strict=True),
    ):
        close(one, other)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_one_sample_needs_no_tiles() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    ggn = low_rank_ggn(model, nn.CrossEntropyLoss(), torch.rand(1, 2, 6), torch.tensor([1]))
    assert ggn.block.rank == 2
