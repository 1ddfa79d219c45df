"""Saving, resuming and copying KFAC."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from tests.optim.nets import small_net, train
from tnconv.optim import KFAC

pytestmark = pytest.mark.usefixtures("float64")


def make(seed: int, **settings) -> tuple[nn.Module, KFAC, nn.Module]:
    torch.manual_seed(seed)
    model, loss_fn = small_net(), nn.CrossEntropyLoss()
    generator = torch.Generator().manual_seed(seed)
    return model, KFAC(
        model,
        update_factors_every=2,
        update_inverses_every=3,
        weight_decay=0.01,
        loss_fn=loss_fn,
        generator=generator,
        **settings,
    ), loss_fn  # fmt: skip


@pytest.mark.parametrize("fallback", [None, partial(torch.optim.AdamW, lr=0.01)])
@pytest.mark.parametrize("inverse", ["cholesky", "eigen", "ekfac"])
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_state_dict_resumes_exactly(fisher, inverse, fallback) -> None:
    settings = {"fisher": fisher, "inverse": inverse, "fallback": fallback}
    model, optimizer, loss_fn = make(0, **settings)
    train(model, optimizer, 5, loss_fn=loss_fn)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, other, other_loss = make(1, **settings)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    first = train(model, optimizer, 4, seed=7, loss_fn=loss_fn)
    assert first == train(resumed, other, 4, seed=7, loss_fn=other_loss)
    for one, two in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


def test_factors_keep_their_dtype_when_they_are_loaded() -> None:
    layer = nn.Linear(3, 2).bfloat16()
    optimizer = KFAC(layer)
    layer(torch.rand(4, 3, dtype=torch.bfloat16)).square().mean().backward()
    optimizer.step()
    other = KFAC(nn.Linear(3, 2).bfloat16())
    other.load_state_dict(optimizer.state_dict())
    state, expected = (o.state[o.model.weight] for o in (other, optimizer))
    for name in ("A", "B", "A_inverse", "B_inverse"):
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], expected[name])
        assert state[name] is not expected[name]


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_deep_copies_train_apart(fisher: str) -> None:
    model, optimizer, loss_fn = make(0, fisher=fisher)
    train(model, optimizer, 3, loss_fn=loss_fn)
    twin, other = copy.deepcopy((model, optimizer))
    assert other.model is twin
    before = [p.detach().clone() for p in model.parameters()]
    first = train(twin, other, 4, seed=7, loss_fn=loss_fn)
    for old, p in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, p)
    assert first == train(model, optimizer, 4, seed=7, loss_fn=loss_fn)


def test_a_model_can_change_its_dtype_afterwards() -> None:
    model, optimizer, loss_fn = make(0, fisher="mc")
    train(model, optimizer, 2, loss_fn=loss_fn)
    model.to(torch.float32)
    torch.set_default_dtype(torch.float32)
    for state in optimizer.state.values():
        state.pop("momentum_buffer", None)
    losses = train(model, optimizer, 3, loss_fn=loss_fn)
    assert all(loss == loss for loss in losses)


def test_pickling_is_refused() -> None:
    with pytest.raises(TypeError, match="save its state_dict instead"):
        pickle.dumps(KFAC(nn.Linear(2, 2)))
