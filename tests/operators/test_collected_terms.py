"""Vectors that arrive in parts are joined once for all parameters that they are of."""

import pytest
import torch
from torch import Tensor, nn

from tests.strategies import assert_close
from tnconv import low_rank_ggn
from tnconv.models import propagation
from tnconv.operators.low_rank import collected_terms

LOSS = nn.CrossEntropyLoss()


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(48, 4))
    return model.double(), torch.randn(5, 2, 6, 6).double(), torch.randint(4, (5,))


def test_weight_and_bias_share_what_was_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = problem()
    expected = low_rank_ggn(model, LOSS, x, y).eigvalsh()
    joins: list[int] = []
    joined = collected_terms._Last.joined

    def noted(last: collected_terms._Last, parts: list[Tensor]) -> Tensor:
        whole = joined(last, parts)
        joins.append(whole.data_ptr())
        return whole

    monkeypatch.setattr(collected_terms._Last, "joined", noted)
    monkeypatch.setattr(propagation, "FRONT", 1)  # a vector at a time
    assert_close(low_rank_ggn(model, LOSS, x, y).eigvalsh(), expected, 1e-10)
    assert len(joins) > len({*joins})


@pytest.mark.parametrize("change", ["place", "shape", "steps"])
def test_other_vectors_are_joined_anew(change: str) -> None:
    last, part = collected_terms._Last(), torch.randn(2, 3, 3)
    one = last.joined([part, part])
    assert last.joined([part, part]) is one
    other = {"place": part.clone(), "shape": part.flatten(1), "steps": part.mT}[change]
    assert_close(last.joined([other, other]), torch.cat([other, other]), 0.0)
