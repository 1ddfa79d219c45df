"""RF-RMSProp and RF-AdamW: the formulas, the batch size, dtypes, saving."""

import copy
import io

import pytest
import torch
from torch import nn

from tests.optim.nets import batch, small_net
from tnconv.optim import RFAdamW, RFRMSProp

pytestmark = pytest.mark.usefixtures("float64")
KINDS = {
    "rmsprop": lambda p, **more: RFRMSProp(p, lr=0.01, weight_decay=0.1, **more),
    "plain rmsprop": lambda p, **more: RFRMSProp(p, lr=0.01, momentum=0.0, **more),
    "adamw": lambda p, **more: RFAdamW(p, lr=0.01, weight_decay=0.1, **more),
    "corrected adamw": lambda p, **more: RFAdamW(p, lr=0.01, bias_correction=True, **more),
}


def replayed(kind, w, grads, samples, eps=1e-4):
    """The formulas, one parameter, step by step."""
    s, m = torch.full_like(w, 1 / samples), torch.zeros_like(w)
    for t, g in enumerate(grads, 1):
        if "rmsprop" in kind:
            decay, mu, gamma = (
                0.99,
                0.0 if "plain" in kind else 0.9,
                0.0 if "plain" in kind else 0.1,
            )
            s = decay * s + (1 - decay) * g**2
            m = mu * m + g / (samples * s + eps) + gamma * w
            w = w - 0.01 * m
        else:
            corrected, gamma = "corrected" in kind, 0.01 if "corrected" in kind else 0.1
            c1, c2 = (1 - 0.9**t, 1 - 0.999**t) if corrected else (1, 1)
            w = w * (1 - 0.01 * gamma)
            m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2
            w = w - 0.01 / c1 * m / (samples * s / c2 + eps)
    return w


@pytest.mark.parametrize("kind", KINDS)
def test_formulas_replay(kind):
    weights = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
    optimizer = KINDS[kind](weights, batch_size=7)
    before, grads = [w.detach().clone() for w in weights], [[], []]
    for _ in range(12):
        for w, seen in zip(weights, grads, strict=True):
            w.grad = torch.randn_like(w)
            seen.append(w.grad.clone())
        optimizer.step()
    for w, start, seen in zip(weights, before, grads, strict=True):
        torch.testing.assert_close(
            w.detach(), replayed(kind, start, seen, 7), rtol=1e-13, atol=1e-13
        )


@pytest.mark.parametrize("kind", KINDS)
def test_scale_of_the_loss_does_not_matter_with_its_batch_size(kind):
    """B only enters as B·s: a sum with B = 1 has s and g B times larger."""
    weights = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    gradient = torch.randn(4)
    one = KINDS[kind]([weights[0]], batch_size=8)
    weights[0].grad = gradient.clone()
    one.step()
    assert torch.equal(one.state[weights[0]]["s"] > 0, torch.ones(4).bool())
    other = KINDS[kind]([weights[1]], batch_size=1)
    weights[1].grad = gradient * 8**0.5
    other.step()
    torch.testing.assert_close(one.state[weights[0]]["s"] * 8, other.state[weights[1]]["s"])


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_a_watched_model(kind):
    """All micro-batches of a step count, evaluation does not."""
    ends = []
    for given in ("model", "number", "callable"):
        torch.manual_seed(0)
        model = small_net()
        chosen = {"model": model, "number": 10, "callable": lambda: 10}[given]
        optimizer = KINDS[kind](model.parameters(), batch_size=chosen)
        for seed in range(3):
            torch.manual_seed(seed)
            for samples in (4, 6):
                x, y = batch(samples)
                (nn.functional.cross_entropy(model(x), y) * samples / 10).backward()
            with torch.no_grad():
                model(x)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[1], ends[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_state_keeps_its_dtype_and_resumes_exactly(kind, dtype):
    def trained(model, optimizer, steps, seed):
        torch.manual_seed(seed)
        for _ in range(steps):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()

    model = nn.Linear(4, 3).bfloat16()
    optimizer = KINDS[kind](model.parameters(), batch_size=4, state_dtype=dtype)
    trained(model, optimizer, 3, 0)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, saved = torch.load(file, weights_only=True)
    twin = nn.Linear(4, 3).bfloat16()
    twin.load_state_dict(weights)
    resumed = KINDS[kind](twin.parameters(), batch_size=4, state_dtype=dtype)
    resumed.load_state_dict(state_dict=saved)
    assert resumed.state[twin.weight]["s"].dtype == dtype
    deep = copy.deepcopy((model, optimizer))
    for each in ((model, optimizer), (twin, resumed), deep):
        trained(*each, 4, 1)
    assert torch.equal(model.weight, twin.weight) and torch.equal(model.weight, deep[0].weight)


def test_a_copy_counts_its_own_model():
    model = small_net()
    optimizer = RFAdamW(model.parameters(), batch_size=model)
    twin, other = copy.deepcopy((model, optimizer))
    x, y = batch(5)
    nn.functional.cross_entropy(twin(x), y).backward()
    other.step()
    with pytest.raises(RuntimeError, match="not called in training mode since the last step"):
        optimizer.step()


def test_errors_come_before_work():
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"betas is \(0.9, 1.0\); expected two numbers"):
        RFAdamW([weight], betas=(0.9, 1.0), batch_size=1)
    with pytest.raises(ValueError, match="batch_size is 0; expected a positive number"):
        RFRMSProp([weight], batch_size=0)
    with pytest.raises(TypeError, match="batch_size is a str; expected a number, a callable or"):
        RFRMSProp([weight], batch_size="8")
    with pytest.raises(NotImplementedError, match="a parameter is complex"):
        RFRMSProp([nn.Parameter(torch.ones(2, dtype=torch.complex64))], batch_size=1)
    optimizer = RFAdamW([weight], batch_size=lambda: -1.0)
    with pytest.raises(ValueError, match=r"batch_size is -1.0; expected a positive"):
        optimizer.step()
