"""Columns that are sent backwards a few at a time: the same results, and less memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnconv
from benchmarks.measure import peak_memory
from tests.models.test_capture import Residual, data, hooks
from tests.models.test_propagate import assert_same
from tests.models.test_second_order import Pixels, diagonals
from tests.strategies import assert_close
from tnconv import diagrams
from tnconv import quantities as q
from tnconv.models import propagation
from tnconv.recursions import ColumnPlan

pytestmark = pytest.mark.usefixtures("float64")


@dataclass(frozen=True)
class Columns(q.Quantity[Tensor]):
    """``J[m, n, θ]``: no sum over columns, so that all are needed at once."""

    def statistics(self) -> Mapping[str, q.Statistic]:
        each = diagrams.per_sample_gradients
        return {"each": q.Statistic(each, samples=1, vectors=q.ExactColumns())}

    def result(self, found: Mapping[str, Tensor], samples: int) -> Tensor:
        return found["each"]


EXACT, EACH = q.GGNDiagonal(), q.GGNDiagonal(per_sample=True)
SUMS: list[q.Quantity[Any]] = [
    EXACT,
    EACH,
    q.KFAC("expand", "type-2"),
    q.KFAC("reduce", "type-2", joint=True),
    q.KFLR(),
    q.KFAC("reduce", "forward-only"),
]
LOSS = nn.CrossEntropyLoss()


@pytest.mark.parametrize("size", [1, 2, 5, 11, 12, 100])
def test_results_are_the_same(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all twelve columns at 2 by 2 positions, and of layers that are called on two sizes."""
    pixels = Pixels(), torch.randn(3, 2, 4, 4), torch.randint(4, (3, 4))
    for model, x, y in (pixels, (Residual().eval(), *data())):
        monkeypatch.setattr(propagation, "AT_A_TIME", 10**6)
        expected = tnconv.compute(model, LOSS, x, y, SUMS)
        monkeypatch.setattr(propagation, "AT_A_TIME", size)
        found = tnconv.compute(model, LOSS, x, y, [*SUMS, q.SquaredNorms()])
        assert_same(found, expected, SUMS)
        for name, value in found[EACH].items():
            assert_close(value, diagonals(model, LOSS, x, y)[name], 1e-10)
        assert hooks(model) == 0


class Tied(nn.Module):
    """One layer before and after others."""

    def __init__(self) -> None:
        super().__init__()
        self.tied, self.other = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.other(self.tied(x).tanh())).flatten(1)


@pytest.mark.parametrize("block", [1, 500, 2000])
def test_samples_in_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What adds up over samples is the same, and nothing else is sent in blocks."""
    tied = Tied(), torch.randn(5, 2, 4, 4), torch.randint(32, (5,))
    sent: list[int] = []
    walk = ColumnPlan._walk
    monkeypatch.setattr(ColumnPlan, "_walk", lambda *given: sent.append(1) or walk(*given))
    generator = torch.Generator()
    sampled = q.GGNDiagonal("mc", 3, generator)
    plain = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
                          nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 3))  # fmt: skip
    for model, x, y in (tied, (plain, *data(5))):
        for wanted in ([EXACT], [EXACT, EACH], [EXACT, q.KFLR()], [sampled, q.Gradient()]):
            found = []
            for size in (10**9, block):
                monkeypatch.setattr(propagation, "BLOCK", size)
                generator.manual_seed(0)
                sent.clear()
                found.append((tnconv.compute(model, LOSS, x, y, wanted), len(sent)))
            (expected, once), (result, often) = found
            assert_same(result, expected, wanted)
            adds_up = wanted == [EXACT] or sampled in wanted
            assert once == 1 and (often > 1) == (adds_up and not isinstance(model, Tied))


@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples line up, also where one output has several passes in it."""
    monkeypatch.setattr(propagation, "AT_A_TIME", size)
    model, (x, y) = Residual().eval(), data(6)
    with tnconv.observe(model, SUMS) as observation:
        output = torch.cat([model(x[:1]), model(x[1:4])])
        observation.propagate(LOSS, output, y[:4], 4 / 6)
        observation.propagate(LOSS, model(x[4:]), y[4:], 2 / 6)
    assert_same(observation.result(), tnconv.compute(model, LOSS, x, y, SUMS), SUMS)


def test_statistics_that_need_all_columns_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = nn.Linear(4, 5), torch.randn(6, 4), torch.randint(5, (6,))
    monkeypatch.setattr(propagation, "AT_A_TIME", 1)
    result = tnconv.compute(model, LOSS, x, y, [Columns(), EXACT])
    for name, diagonal in result[EXACT].items():
        assert result[Columns][name].shape[:2] == (4, 6)
        assert_close(result[Columns][name].square().sum((0, 1)), diagonal, 1e-12)


def test_losses_without_columns() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    result = tnconv.compute(layer, nn.L1Loss(), x, torch.randn(4, 2), [EXACT, EACH])
    assert_close(result[EXACT]["weight"], torch.zeros(2, 3))
    assert_close(result[EACH]["bias"], torch.zeros(4, 2))


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 64, 60),
    )  # fmt: skip
    return model, torch.randn(4, 2, 8, 8), torch.randint(60, (4,))


def test_a_memory_limit_bounds_what_columns_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """What all columns hold after all layers, here some 2 MB of float64, is most of the peak."""
    model, x, y = problem()
    held = 59 * 8 * (2 * 4 * 8 * 64 + 4 * 60)
    limit = held // 5
    whole = tnconv.compute(model, LOSS, x, y, [EXACT])
    tight = tnconv.compute(model, LOSS, x, y, [EXACT], limit)
    assert_same(tight, whole, [EXACT])
    monkeypatch.setattr(propagation, "AT_A_TIME", 59)
    high = peak_memory(lambda: tnconv.compute(model, LOSS, x, y, [EXACT]))
    low = peak_memory(lambda: tnconv.compute(model, LOSS, x, y, [EXACT], limit))
    assert high > held
    assert low < high - held / 2


def test_columns_are_made_in_parts() -> None:
    """Outputs with positions have a column for each: all of them would be their square."""
    loss_fn, y = nn.CrossEntropyLoss(), torch.randn(2, 3, 4)
    targets = torch.randint(3, (2, 4))
    parts = list(q.ExactColumns().parts(loss_fn, y, targets, 3))
    assert [len(part) for part in parts] == [3, 3, 2]
    assert_close(torch.cat(parts), q.ExactColumns().columns(loss_fn, y, targets), 0)
