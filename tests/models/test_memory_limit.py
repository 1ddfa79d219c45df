"""Quantities within a memory limit are the same; below what is needed there is an error first."""

from typing import Any

import pytest
import torch
from torch import nn

import tnconv
from tnconv import quantities as q
from tnconv.models import contracted

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
LIMIT = 360_000


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_programs_are_made_for_the_limit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per-sample gradients of all samples do not fit, so their norms are made in another way.

    What is chosen stays below the limit in the bytes of the dtype that it runs in.
    """
    model, loss_fn, x, y = problem()
    model, x, made = model.to(dtype), x.to(dtype), []

    look_up = contracted.looked_up

    def noted(*given: Any) -> tnconv.Program:
        made.append(look_up(*given))
        return made[-1]

    monkeypatch.setattr(contracted, "looked_up", noted)
    limit = LIMIT if dtype == torch.float64 else LIMIT // 2
    for tight in (False, True):
        tnconv.cache_clear()
        made.clear()
        how = {"memory_limit": limit} if tight else {}
        result = tnconv.compute(model, loss_fn, x, y, [q.SquaredNorms(), q.Variance()], **how)
        assert len(made) == len(list(model.parameters()))
        assert result.total(q.SquaredNorms).shape == (12,)
        most = max(program.peak_memory(dtype) for program in made)
        assert (most <= limit) == tight


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
