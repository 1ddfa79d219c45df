"""Quantities within a memory limit are the same; below what is needed there is an error first."""

import pytest
import torch
from torch import nn

import tnconv
from tnconv import quantities as q

pytestmark = pytest.mark.usefixtures("float64")

WANTED: list[q.Quantity[object]] = [
    q.Gradient(),
    q.PerSampleGradients(),
    q.SquaredNorms(),
    q.Variance(),
    q.DotProducts(),
    q.GGNDiagonal(),
    q.KFAC("expand", "type-2"),
    q.KFAC("reduce", "empirical"),
]
LIMIT = 400_000


def problem() -> tuple[nn.Module, nn.Module, torch.Tensor, torch.Tensor]:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(),
        nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5),
    )  # fmt: skip
    return model, nn.CrossEntropyLoss(), torch.randn(12, 4, 9, 9), torch.randint(5, (12,))


@pytest.mark.parametrize("quantity", WANTED)
def test_results_are_the_same(quantity: q.Quantity[object]) -> None:
    args = problem()
    free = tnconv.compute(*args, [quantity])
    tnconv.cache_clear()
    tight = tnconv.compute(*args, [quantity], memory_limit=LIMIT)
    for name, value in free[quantity].items():
        torch.testing.assert_close(tight[quantity][name], value, rtol=1e-10, atol=1e-12)


def test_programs_are_made_for_the_limit() -> None:
    """Per-sample gradients of all samples do not fit, so their norms are made in another way."""
    model, loss_fn, x, y = problem()
    tnconv.cache_clear()
    result = tnconv.compute(model, loss_fn, x, y, [q.SquaredNorms()], memory_limit=LIMIT)
    assert tnconv.cache_info().misses == len(list(model.parameters()))
    assert result.total(q.SquaredNorms).shape == (12,)


def test_in_a_loop() -> None:
    model, loss_fn, x, y = problem()
    found = []
    for limit in (None, LIMIT):
        with tnconv.observe(model, [q.Variance()], limit) as observation:
            loss_fn(model(x), y).backward()
        found.append(observation.result()[q.Variance])
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-10, atol=1e-12)


def test_too_tight_a_limit_names_the_layer() -> None:
    args = problem()
    with pytest.raises(ValueError, match=r"'weight' of a layer with operands.*least that would do"):
        tnconv.compute(*args, [q.PerSampleGradients()], memory_limit=1000)
    assert not any(module._forward_hooks for module in args[0].modules())
    with pytest.raises(ValueError, match="memory_limit is 0; expected a positive"):
        tnconv.compute(*args, [q.Variance()], memory_limit=0)
