"""What every training loop may ask of the optimizers that precondition by factors."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.strategies import assert_close
from tnconv import tiered_compilation
from tnconv.optim import KFAC, SINGD, RFShampoo

pytestmark = pytest.mark.usefixtures("first_programs")
MADE = {
    "KFAC": lambda m, **s: KFAC(m, **{"lr": 0.01, "update_inverses_every": 2} | s),
    "SINGD": lambda m, **s: SINGD(
        m, **{"lr": 0.01, "structures": "hierarchical", "update_factors_every": 2} | s
    ),
    "RFShampoo": lambda m, **s: RFShampoo(
        m, **{"lr": 1e-3, "damping": 0.1, "update_factors_every": 2} | s
    ),
}
FACTORS = {"KFAC": ("A", "B"), "SINGD": ("K", "C"), "RFShampoo": ("K0", "K1")}
every = pytest.mark.parametrize("name", MADE)


@pytest.fixture
def first_programs():
    with tiered_compilation(True):
        yield


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4), nn.LayerNorm(4)
    )


def batch(seed, model):
    torch.manual_seed(seed)
    like = next(model.parameters())
    return torch.rand(6, 2, 4, 4).to(like), torch.randint(4, (6,))


def step(model, optimizer, seed):
    x, y = batch(seed, model)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def values(model):
    return [p.detach().clone() for p in model.parameters()]


@every
@pytest.mark.usefixtures("float64")
def test_grad_scaler(name):
    """A scaler whose scale changes; a batch with a gradient that is not finite leaves no trace."""
    ends = []
    for scaled in (False, True):
        model = network()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=scaled)
        more = {} if name == "RFShampoo" else {"loss_scale": scaler.get_scale}
        optimizer = MADE[name](model, **more)
        for at in (0, 1, 2, 3, 4):
            if at == 2 and not scaled:
                continue
            x, y = batch(at, model)
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            if at == 2:
                model[3].weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
        ends.append(values(model))
        assert not scaled or scaler.get_scale() not in (1.0, 2.0**10)
    for one, other in zip(*ends, strict=True):
        assert_close(one, other, 1e-10)


@every
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.usefixtures("float64")
def test_micro_batches_and_closures(name, micro):
    model, twin = network(), network()
    plain, other = MADE[name](model), MADE[name](twin)
    for at in range(3):
        step(model, plain, at)
        x, y = batch(at, twin)

        def closure(x=x, y=y):
            other.zero_grad()
            parts = zip(x.chunk(micro), y.chunk(micro), strict=True)
            losses = [F.cross_entropy(twin(a), b) / micro for a, b in parts]
            for loss in losses:
                loss.backward()
            return sum(losses)

        assert other.step(closure).item() > 0
    for one, two in zip(values(model), values(twin), strict=True):
        assert_close(one, two, 1e-10)


@every
def test_autocast(name):
    """Factors of bfloat16 activations are near those of float32, and are in float32."""
    found = []
    for enabled in (False, True):
        model = network()
        optimizer = MADE[name](model, update_factors_every=1)
        x, y = batch(0, model)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        state = optimizer.state[model[3].weight]
        found.append([state[each] for each in FACTORS[name]])
    for exact, near in zip(*found, strict=True):
        assert near.dtype == torch.float32
        assert float((near - exact).norm() / exact.norm()) < 0.02


@every
def test_resuming_and_copying_are_exact(name):
    """By keyword, from a file of plain tensors; a deep copy has a model of its own."""
    model = network()
    optimizer = MADE[name](model)
    for at in range(3):
        step(model, optimizer, at)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, saved = torch.load(file, weights_only=True)
    twin = network()
    twin.load_state_dict(weights)
    resumed = MADE[name](twin)
    resumed.load_state_dict(state_dict=saved)
    copied, deep = copy.deepcopy((model, optimizer))
    pairs = ((model, optimizer), (twin, resumed), (copied, deep))
    losses = [[step(*pair, at) for at in range(3, 7)] for pair in pairs]
    assert losses[0] == losses[1] == losses[2]
    for one, other, third in zip(*(values(m) for m, _ in pairs), strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)


@every
def test_a_model_that_is_moved_later(name):
    """``model.double()`` after the optimizer was made, and after steps were taken."""
    for before in (0, 2):
        model = network()
        optimizer = MADE[name](model, momentum=0.0)
        for at in range(before):
            step(model, optimizer, at)
        model.double()
        kept = values(model)
        step(model, optimizer, 3)
        now = values(model)
        assert all(p.dtype == torch.float64 and p.isfinite().all() for p in now)
        assert all(not torch.equal(a, b) for a, b in zip(kept, now, strict=True))


class Tied(nn.Module):
    """A layer whose bias is frozen, one that is used twice, and one that is not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared, self.unused = (nn.Linear(4, 4) for _ in range(3))
        self.first.bias.requires_grad_(False)

    def forward(self, x):
        return self.shared(torch.tanh(self.shared(torch.tanh(self.first(x)))))


@every
def test_frozen_shared_unused_and_clipped(name):
    """In groups with learning rates of their own; evaluation and clipping are as in any loop."""
    model = Tied()
    groups = [
        {"params": list(model.first.parameters()), "damping": 0.2},
        {"params": [*model.shared.parameters(), *model.unused.parameters()], "lr": 0.0},
    ]
    optimizer = MADE[name](model, params=groups)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        model.eval()
        model(torch.randn(2, 4)).sum().backward(inputs=[model.first.weight])
        model.train()
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"first.weight"}
    optimizer.param_groups[1]["lr"] = 0.01
    model(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"first.weight", "shared.weight", "shared.bias"}
    assert not optimizer.state[model.unused.weight].get("momentum_buffer", torch.zeros(1)).any()


@every
def test_clipping_scales_gradients_not_factors(name):
    """The step of a clipped gradient is the clipped step, where factors are of the passes."""
    model, twin = network(), network()
    settings = {"momentum": 0.0} | ({"kl_clip": torch.inf} if name == "KFAC" else {})
    moves = []
    for net, share in ((model, 1.0), (twin, 0.25)):
        optimizer = MADE[name](net, **settings)
        if name == "RFShampoo":  # learns from gradients: compare a step without an update
            step(net, optimizer, 0)
        before = values(net)
        x, y = batch(1, net)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        for p in net.parameters():
            p.grad *= share
        optimizer.step()
        moves.append([a - b for a, b in zip(values(net), before, strict=True)])
    weights = [0, 2]  # convolution and linear layer; others have running squares of gradients
    for at in weights:
        assert_close(moves[1][at], 0.25 * moves[0][at], 1e-4)
