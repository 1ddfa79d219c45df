"""Nothing is computed twice, and nothing is held that was reduced."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnconv
from benchmarks.measure import peak_memory
from tnconv import quantities as q
from tnconv.recursions.columns_walk import ColumnPlan

pytestmark = pytest.mark.usefixtures("float64")

LOSS = nn.CrossEntropyLoss()


def problem() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 5)
    )
    return model, LOSS, torch.randn(6, 2, 8, 8), torch.randint(5, (6,))


EXACT = [
    q.GGNDiagonal(),
    q.KFLR(),
    q.KFAC("expand", "type-2"),
    q.GGNDiagonal("type-2", 1, None, True),
]


@pytest.mark.parametrize(
    ("wanted", "passes", "codes"),
    [
        ([q.Gradient(), q.PerSampleGradients(), q.Variance()], 1, 1),
        (EXACT, 4, 2),
        ([*EXACT, q.SquaredNorms(), q.KFAC("reduce", "empirical")], 5, 1),
        ([q.KFAC("expand", "mc", 2), q.KFAC("reduce", "mc", 2), q.GGNDiagonal("mc", 2)], 2, 2),
        ([q.KFAC("expand", "forward-only")], 0, 2),
    ],
)
def test_vectors_go_backwards_once(
    wanted: Sequence[q.Quantity[Any]], passes: int, codes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all quantities together; and autograd makes no gradient of a parameter.

    The first batch has passes with codes, too, which show where the samples are: one if the loss's
    own gradient confirms it, else two.
    """
    model, *rest = problem()
    seen: list[int] = []
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: seen.append(-1))
    model[1].register_forward_hook(
        lambda module, args, output: output.register_hook(lambda grad: seen.append(1)) and None
    )
    send = ColumnPlan.send

    def sent(plan: ColumnPlan, vectors: Tensor, *others: Any) -> None:
        seen.extend([1] * len(vectors))
        send(plan, vectors, *others)

    monkeypatch.setattr(ColumnPlan, "send", sent)
    tnconv.compute(model, *rest, wanted)
    assert seen == [1] * (passes + codes)
    seen.clear()
    tnconv.compute(model, *rest, wanted)
    assert seen == [1] * passes


@pytest.mark.parametrize("quantity", [q.SquaredNorms(), q.Variance(), q.SumOfSquares()])
def test_reduced_quantities_hold_one_layer_at_a_time(quantity: q.Quantity[Tensor]) -> None:
    """All per-sample gradients are four times those of one layer, and twice what is left of it."""
    layers = [layer for _ in range(4) for layer in (nn.Linear(32, 32), nn.Tanh())]
    model, x, y = nn.Sequential(*layers), torch.randn(64, 32), torch.randint(32, (64,))
    every = 64 * sum(p.numel() for p in model.parameters()) * 8

    def peak(wanted: q.Quantity[Tensor]) -> int:
        tnconv.compute(model, LOSS, x, y, [wanted])
        return peak_memory(lambda: tnconv.compute(model, LOSS, x, y, [wanted]))

    assert peak(q.PerSampleGradients()) > every
    assert peak(quantity) < every / 2


def test_inputs_by_name_and_several() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(2, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.first(a) * self.second(b)

    model, a, b, y = Two(), torch.randn(5, 4), torch.randn(5, 2), torch.randint(3, (5,))
    one = tnconv.compute(model, LOSS, {"b": b, "a": a}, y, [q.GGNDiagonal()])[q.GGNDiagonal]
    other = tnconv.compute(model, LOSS, (a, b), y, [q.GGNDiagonal()])[q.GGNDiagonal]
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_dropout_that_is_on_is_that_of_the_one_pass() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(7, 6), torch.randint(3, (7,))
    torch.manual_seed(3)
    result = tnconv.compute(model, LOSS, x, y, [q.PerSampleGradients(), q.SquaredNorms()])
    torch.manual_seed(3)
    LOSS(model(x), y).backward()
    for name, parameter in model.named_parameters():
        each = result[q.PerSampleGradients][name]
        torch.testing.assert_close(each.sum(0), parameter.grad, rtol=1e-10, atol=1e-12)
        squares = each.flatten(1).square().sum(1)
        torch.testing.assert_close(result[q.SquaredNorms][name], squares, rtol=1e-10, atol=1e-12)
