"""AdaHesScale and StepSizeScaler against their formulas, and as optimizers of torch."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import tnconv
from tests.optim.nets import batch, small_net
from tests.strategies import assert_close
from tnconv.optim import KFAC, AdaHesScale, StepSizeScaler

pytestmark = pytest.mark.usefixtures("float64")
LOSS = nn.CrossEntropyLoss()


def make_net() -> nn.Sequential:
    net = small_net()
    net[1].eval()
    return net


def train(model: nn.Module, optimizer, steps: int, seed: int = 0, loss_fn: nn.Module = LOSS):
    """A plain loop over random batches from a seed; the losses."""
    torch.manual_seed(seed)
    losses = []
    for _ in range(steps):
        x, y = batch()
        loss = loss_fn(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def curvatures(model: nn.Module, x: Tensor, y: Tensor, method: str) -> list[Tensor]:
    found = tnconv.hesscale(model, LOSS, x, y, method)
    return [found[name] for name, _ in model.named_parameters()]


@pytest.mark.parametrize("method", ["hesscale", "gn", "bl89", "hesscale+"])
@pytest.mark.parametrize("variant", ["adam", "sqrt", "plain"])
def test_ten_steps_of_the_formula(variant: str, method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 6), nn.Tanh(), nn.Linear(6, 3))
    how = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    twin, loss_fn = copy.deepcopy(model), nn.CrossEntropyLoss()
    optimizer = AdaHesScale(model, loss_fn, **how, variant=variant, method=method)
    train(model, optimizer, 10, loss_fn=loss_fn)
    torch.manual_seed(0)
    theta = list(twin.parameters())
    m, v = ([torch.zeros_like(p) for p in theta] for _ in range(2))
    for t in range(1, 11):
        x, y = batch()
        grads = torch.autograd.grad(LOSS(twin(x), y), theta)
        for at, h in enumerate(curvatures(twin, x, y, method)):
            m[at] = 0.8 * m[at] + 0.2 * grads[at]
            v[at] = 0.95 * v[at] + 0.05 * (h**2 if variant == "adam" else h.abs())
            d = v[at] / (1 - 0.95**t)
            d = d if variant == "plain" else d**0.5
            step = 0.02 / (1 - 0.8**t) * m[at] / (d + 1e-3)
            theta[at].data = theta[at].data * (1 - 0.002) - step
    for p, expected in zip(model.parameters(), theta, strict=True):
        assert_close(p.detach(), expected.detach(), 1e-12)


@pytest.mark.parametrize("variant", ["adam", "plain"])
def test_the_first_step_and_losses_of_another_scale(variant: str) -> None:
    """``-η g / (|h| + ε)``, and a factor of the loss cancels as ε goes to 0."""
    found = []
    for factor in (1.0, 7.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(50, 6), nn.Tanh(), nn.Linear(6, 3))
        before = copy.deepcopy(model)
        optimizer = AdaHesScale(model, LOSS, lr=1e-3, eps=1e-14, variant=variant)
        for _ in range(3):
            x, y = batch()
            optimizer.zero_grad()
            output = model(x)
            optimizer.backward(output, y, factor)
            optimizer.step()
            if not found:
                gradients = torch.autograd.grad(LOSS(before(x), y), list(before.parameters()))
                pairs = zip(curvatures(before, x, y, "hesscale"), gradients, strict=True)
                first = [-1e-3 * g / (h.abs() + 1e-14) for h, g in pairs]
                for p, old, step in zip(
                    model.parameters(), before.parameters(), first, strict=True
                ):
                    assert_close((p - old).detach(), step, 1e-10)
                found.append(None)
        found.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(found[1], found[2], strict=True):
        assert_close(one, other, 1e-8)


def test_several_losses_and_micro_batches() -> None:
    """Losses of one pass add up; passes are averaged, whatever order they come in."""

    def steps(run) -> list[Tensor]:
        torch.manual_seed(0)
        model, loss_fn = make_net(), nn.CrossEntropyLoss()
        x, y = batch(8)
        optimizer = AdaHesScale(model, loss_fn, lr=0.01)
        run(model, loss_fn, x, y, optimizer)
        optimizer.step()
        return [p.detach() for p in model.parameters()]

    def whole(model, loss_fn, x, y, optimizer) -> None:
        loss_fn(model(x), y).backward()

    def halves(model, loss_fn, x, y, optimizer) -> None:
        outputs = [model(part) for part in x.chunk(2)]
        losses = [loss_fn(out, part) for out, part in zip(outputs, y.chunk(2), strict=True)]
        (sum(losses) / 2).backward()

    def twice(model, loss_fn, x, y, optimizer) -> None:
        output = model(x)
        (loss_fn(output, y) + loss_fn(2 * output, y)).backward()

    def by_hand(model, loss_fn, x, y, optimizer) -> None:
        output = model(x)
        optimizer.backward(output, y)
        optimizer.backward(2 * output, y)

    def propagated(model, loss_fn, x, y, optimizer) -> None:
        output = model(x)
        optimizer.propagate(output, y)
        torch.nn.functional.cross_entropy(output, y).backward()

    for one, other in ((whole, halves), (twice, by_hand), (whole, propagated)):
        for a, b in zip(steps(one), steps(other), strict=True):
            assert_close(a, b, 1e-12)


INNER = {
    "sgd": lambda p: torch.optim.SGD(p, 0.5, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.05),
}


@pytest.mark.parametrize("inner", [*INNER, "adahesscale", "kfac"])
def test_ten_scaled_steps(inner: str) -> None:
    """The formula, next to the optimizer itself, which goes where the scaled one went."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 6), nn.Tanh(), nn.Linear(6, 3))
    twin, loss_fn, delta = copy.deepcopy(model), nn.CrossEntropyLoss(), 1e-5

    def made(model: nn.Module, loss_fn: nn.Module):
        if inner == "adahesscale":
            return AdaHesScale(model, loss_fn, lr=0.3, betas=(0.9, 0.99))
        return KFAC(model) if inner == "kfac" else INNER[inner](model.parameters())

    own_loss = nn.CrossEntropyLoss()
    other = made(twin, own_loss)
    optimizer = StepSizeScaler(made(model, loss_fn), model, loss_fn, delta, beta=0.99)
    v = [torch.zeros_like(p) for p in model.parameters()]
    active = 0
    for _ in range(10):
        x, y = batch()
        for net, opt, loss in ((model, optimizer, loss_fn), (twin, other, own_loss)):
            opt.zero_grad()
            loss(net(x), y).backward()
        v = [
            0.99 * a + 0.01 * h**2
            for a, h in zip(v, curvatures(twin, x, y, "hesscale"), strict=True)
        ]
        before = [p.detach().clone() for p in twin.parameters()]
        optimizer.step()
        other.step()
        steps = [a - p.detach() for a, p in zip(before, twin.parameters(), strict=True)]
        change = sum((a.sqrt() * u**2).sum() for a, u in zip(v, steps, strict=True))
        scale = min(1.0, float((2 * delta / change) ** 0.5))
        predicted = 0.5 * scale**2 * change
        assert predicted <= delta * (1 + 1e-12)
        if scale < 1:
            active += 1
            assert_close(predicted, torch.tensor(delta), 1e-15)
        assert_close(optimizer.scales[0], torch.tensor(scale), 1e-12)
        for p, q, a, u in zip(model.parameters(), twin.parameters(), before, steps, strict=True):
            assert_close(p.detach(), a - scale * u, 1e-12)
            q.data = p.detach().clone()
    assert active


def test_bounds_per_group_schedules_and_inactive_bounds() -> None:
    torch.manual_seed(0)
    model, loss_fn = make_net(), nn.CrossEntropyLoss()
    weights, biases = ([p for p in model.parameters() if (p.dim() > 1) == w] for w in (True, False))
    groups = [{"params": weights, "lr": 0.5}, {"params": biases, "lr": 1e-9}]
    inner = torch.optim.SGD(groups, lr=0.1)
    optimizer = StepSizeScaler(inner, model, loss_fn, 1e-7, per_group=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    before = [p.detach().clone() for p in biases]
    train(model, optimizer, 1, loss_fn=loss_fn)
    schedule.step()
    assert optimizer.scales[0] < 1 and optimizer.scales[1] == 1
    assert [group["lr"] for group in inner.param_groups] == [0.25, 5e-10]
    for p, old in zip(biases, before, strict=True):
        assert torch.equal(p, old - 1e-9 * p.grad)


def made(kind: str, seed: int):
    torch.manual_seed(seed)
    model, loss_fn = make_net(), nn.CrossEntropyLoss()
    how = {"update_diagonal_every": 2, "weight_decay": 0.01, "eps": 0.01}
    own = AdaHesScale(model, loss_fn, 0.01, **how)
    if kind == "scaled":
        inner = torch.optim.Adam(model.parameters(), 0.01)
        return model, StepSizeScaler(inner, model, loss_fn, 1e-6), loss_fn
    if kind == "both":
        return model, StepSizeScaler(own, model, delta=1e-6), loss_fn
    return model, own, loss_fn


KINDS = ("own", "scaled", "both")


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_resumes_exactly(kind: str) -> None:
    model, optimizer, loss_fn = made(kind, 0)
    train(model, optimizer, 5, loss_fn=loss_fn)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, other, other_loss = made(kind, 1)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    first = train(model, optimizer, 4, seed=7, loss_fn=loss_fn)
    assert first == train(resumed, other, 4, seed=7, loss_fn=other_loss)
    for one, two in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", KINDS)
def test_deep_copies_train_apart(kind: str) -> None:
    model, optimizer, loss_fn = made(kind, 0)
    train(model, optimizer, 3, loss_fn=loss_fn)
    twin, other = copy.deepcopy((model, optimizer))
    assert other.model is twin
    before = [p.detach().clone() for p in model.parameters()]
    first = train(twin, other, 4, seed=7, loss_fn=loss_fn)
    for old, p in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, p)
    assert first == train(model, optimizer, 4, seed=7, loss_fn=loss_fn)
    with pytest.raises(TypeError, match="save its state_dict"):
        pickle.dumps(optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_closures(kind: str) -> None:
    model, optimizer, loss_fn = made(kind, 0)
    twin, other, other_loss = made(kind, 0)
    x, y = batch()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    other_loss(twin(x), y).backward()
    other.step()
    assert loss == other_loss(twin.eval()(x), y) or loss > 0
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", KINDS)
def test_scaled_gradients(kind: str) -> None:
    """A GradScaler's factor is taken off before the step; steps with infinities are left out."""
    found = []
    for enabled in (False, True):
        model, optimizer, loss_fn = made(kind, 0)
        scaler = torch.amp.GradScaler("cpu", 1024.0, enabled=enabled)
        torch.manual_seed(3)
        for _ in range(3):
            x, y = batch()
            optimizer.zero_grad()
            scaler.scale(loss_fn(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append([p.detach() for p in model.parameters()])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_what_is_not_seen_is_an_error() -> None:
    model, loss_fn = make_net(), nn.CrossEntropyLoss()
    optimizer = AdaHesScale(model, loss_fn)
    x, y = batch()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="6 of 6 parameters have a gradient, but no loss"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"betas is \(0.9, 1\); expected two numbers in \[0, 1\)"):
        AdaHesScale(model, loss_fn, betas=(0.9, 1))
    with pytest.raises(ValueError, match="lr is -1; expected a number"):
        AdaHesScale(model, loss_fn, -1)
    with pytest.raises(ValueError, match="variant is 'rms'; expected"):
        AdaHesScale(model, loss_fn, variant="rms")
    with pytest.raises(ValueError, match="made without loss_fn"):
        AdaHesScale(model).propagate(model(x), y)
    with pytest.raises(ValueError, match="delta is 0; expected a positive number"):
        StepSizeScaler(optimizer, model, delta=0)
    with pytest.raises(TypeError, match="optimizer is a Sequential"):
        StepSizeScaler(model, model)


def test_evaluation_adds_nothing() -> None:
    model, optimizer, loss_fn = made("own", 0)
    twin, other, other_loss = made("own", 0)
    x, y = batch()
    with torch.no_grad():
        loss_fn(model(x), y)
    model.eval()
    loss_fn(model(x), y)
    model.train(), model[1].eval()
    for net, opt, loss in ((model, optimizer, loss_fn), (twin, other, other_loss)):
        loss(net(x), y).backward()
        opt.step()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


def test_hooks_go() -> None:
    model, loss_fn = make_net(), nn.CrossEntropyLoss()
    optimizer = StepSizeScaler(torch.optim.SGD(model.parameters()), model, loss_fn)
    assert model._forward_hooks and loss_fn._forward_hooks
    optimizer.remove_hooks()
    assert not model._forward_hooks and not loss_fn._forward_hooks
    optimizer = AdaHesScale(model, loss_fn)
    del optimizer
    assert not model._forward_hooks and not loss_fn._forward_hooks
