"""RF-Shampoo: its formula replayed densely, KL-Shampoo, how parameters are read, saving."""

import copy
import io
from itertools import pairwise
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.optim.nets import small_net, train
from tests.strategies import assert_close
from tnconv.optim import RFShampoo
from tnconv.optim.axes import axes
from tnconv.optim.structures import STRUCTURES, structure

pytestmark = pytest.mark.usefixtures("float64")


def mode(x, n):
    return x.movedim(n, 0).reshape(x.shape[n], -1)


def apply(x, n, matrix):
    return torch.tensordot(matrix, x, ([1], [n])).movedim(0, n)


class Replay:
    """The formula of the docstring on dense matrices, for one tensor."""

    def __init__(self, weight, families, whitened):
        self.w, self.families, self.whitened, self.v = weight, families, whitened, 0.0
        self.k = [torch.eye(f.size) for f in families]
        self.m = [torch.zeros_like(k) for k in self.k]

    def step(self, g, samples):
        given = g
        for n, k in enumerate(self.k if self.whitened else ()):
            given = apply(given, n, k.mT)
        new = []
        for n, (family, k) in enumerate(zip(self.families, self.k, strict=True)):
            rest = g.numel() / family.size
            second = mode(given, n) @ mode(given, n).mT
            second = second if self.whitened else k.mT @ second @ k
            others = [o for at, o in enumerate(self.k) if at != n] if self.whitened else []
            spread = prod(float((o.mT @ o).diagonal().mean()) for o in others)
            curve = samples / rest * second + 0.1 * spread * k.mT @ k
            slope = (family.dense(family.project(curve)) - torch.eye(family.size)) / 2
            self.m[n] = 0.5 * self.m[n] + 0.5 * slope
            new.append(k - 0.2 / max(1, self.m[n].norm()) * k @ self.m[n])
        self.k = new
        direction = g
        for n, k in enumerate(self.k):
            direction = apply(direction, n, k @ k.mT)
        self.v = 0.9 * self.v + direction + 0.01 * self.w
        self.w = self.w - 0.1 * self.v


LAYERS = {
    "linear with bias": (lambda: nn.Linear(5, 4), {}, (4, 6)),
    "kernel with four axes": (lambda: nn.Conv2d(4, 4, 3, groups=2, bias=False), {}, (4, 2, 3, 3)),
    "kernel as a matrix": (lambda: nn.Conv2d(2, 3, 3), {"kernels": "matrix"}, (3, 19)),
    "merged axes": (lambda: nn.Conv1d(2, 3, 3, bias=False), {"merge": 6}, (6, 3)),
    "vector": (lambda: nn.LayerNorm(5, bias=False), {}, (5,)),
}


@pytest.mark.parametrize("whitened", [True, False])
@pytest.mark.parametrize("structures", ["dense", "diagonal", "hierarchical", "triangular_toeplitz"])
@pytest.mark.parametrize("layer", LAYERS)
def test_ten_steps_replay(layer, structures, whitened):
    made, how, shape = LAYERS[layer]
    model = made()
    optimizer = RFShampoo(
        model, lr=0.1, damping=0.1, weight_decay=0.01, factor_lr=0.2, structures=structures,
        batch_size=7, whitened=whitened, **how,
    )  # fmt: skip
    (read,) = axes(
        model, list(model.parameters()), how.get("kernels", "tensor"), merged=how.get("merge", 1)
    )
    assert read.shape == shape
    values = {p: p.detach().clone() for p in model.parameters()}
    replay = Replay(read.tensor(values), [structure(structures, d) for d in shape], whitened)
    for _ in range(10):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        replay.step(read.tensor({p: p.grad for p in model.parameters()}), 7)
        optimizer.step()
        assert_close(read.tensor({p: p.detach() for p in model.parameters()}), replay.w, 1e-11)


def test_it_is_kl_shampoo_without_inverses():
    """``S <- (1 - β) S + β B/d' G S'⁻¹ Gᵀ`` for both sides, up to β²: the error falls by four."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False)
    grads = [torch.randn(3, 4) for _ in range(3)]
    errors = []
    for rate in (0.04, 0.02, 0.01, 0.005):
        # From factors that are no identities any more: a step at a rate of its own.
        rates = [0.3, 0.3, rate]
        optimizer = RFShampoo(
            layer, lr=0.0, damping=1e-300, factor_lr=lambda t, rates=rates: rates[t],
            batch_size=0.05, riemannian_momentum=0.0,
        )  # fmt: skip
        inverses = [torch.eye(3), torch.eye(4)]
        for g in grads:
            layer.weight.grad = g.clone()
            before = [k.clone() for k in inverses]
            optimizer.step()
            k = [
                optimizer.state[layer.weight][name][0].reshape(d, d)
                for name, d in (("K0", 3), ("K1", 4))
            ]
            inverses = [each @ each.mT for each in k]
        first, second = (torch.linalg.inv(each) for each in before)
        left = (1 - rate) * first + rate * 0.05 / 4 * g @ before[1] @ g.mT
        right = (1 - rate) * second + rate * 0.05 / 3 * g.mT @ before[0] @ g
        each = zip(inverses, (left, right), strict=True)
        errors.append([float((own - torch.linalg.inv(s)).norm()) for own, s in each])
    for one, other in pairwise(errors):
        assert all(3.7 < a / b < 4.3 for a, b in zip(one, other, strict=True)), errors


def test_blocks_are_parameters_of_their_own():
    torch.manual_seed(0)
    whole = nn.Linear(7, 4, bias=False)
    optimizer = RFShampoo(whole, lr=0.1, batch_size=3, max_size=4, factor_lr=0.1)
    parts = [nn.Linear(d, 4, bias=False) for d in (4, 3)]
    others = []
    for part, at in zip(parts, (slice(0, 4), slice(4, 7)), strict=True):
        part.weight.data = whole.weight.detach()[:, at].clone()
        others.append(RFShampoo(part, lr=0.1, batch_size=3, factor_lr=0.1))
    for _ in range(4):
        whole.weight.grad = torch.randn(4, 7)
        for part, other, at in zip(parts, others, (slice(0, 4), slice(4, 7)), strict=True):
            part.weight.grad = whole.weight.grad[:, at].clone()
            other.step()
        optimizer.step()
    assert_close(
        torch.cat([part.weight.detach() for part in parts], 1), whole.weight.detach(), 1e-12
    )


def test_how_parameters_are_read():
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(7, 3),
            "conv": nn.Conv2d(3, 8, (1, 3)),
            "up": nn.ConvTranspose2d(8, 2, 2),
            "norm": nn.BatchNorm2d(8),
            "head": nn.Linear(8, 1),
        }
    )
    model["tied"] = nn.Linear(3, 7, bias=False)
    model["tied"].weight = model["embedding"].weight
    trained = [p for p in model.parameters() if p is not model["head"].bias]
    shapes = {each.name: each.shape for each in axes(model, trained)}
    assert shapes == {
        "embedding.weight": (21,), "conv.weight": (8, 3, 3), "conv.bias": (8,),
        "up.weight": (8, 2, 2, 2), "up.bias": (2,), "norm.weight": (8,), "norm.bias": (8,),
        "head.weight": (8,),
    }  # fmt: skip
    shapes = {each.name: each.shape for each in axes(model, trained, "matrix", merged=24)}
    assert shapes["conv.weight"] == (8, 10) and shapes["up.weight"] == (16, 4)
    optimizer = RFShampoo(model)
    x = model["conv"](torch.randn(2, 3, 3, 3)).mean((2, 3))
    (
        model["head"](x) + model["embedding"](torch.tensor([1, 2])).sum(1, keepdim=True)
    ).sum().backward()
    optimizer._samples._count = 2
    optimizer.step()
    assert optimizer.state[model["embedding"].weight]["K0"].shape == (1, 21)


@pytest.mark.parametrize("structures", STRUCTURES)
def test_half_precision_trains_and_resumes_exactly(structures):
    torch.manual_seed(0)
    model = small_net().to(torch.bfloat16)

    def trained(model, optimizer, steps, seed):
        losses = []
        for at in range(steps):
            torch.manual_seed(seed + at)
            x, y = torch.rand(16, 2, 5, 5).bfloat16(), torch.randint(3, (16,))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x).float(), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    settings = {
        "lr": 1e-3,
        "structures": structures,
        "momentum_dtype": torch.float32,
        "damping": 0.1,
    }
    optimizer = RFShampoo(model, **settings)
    trained(model, optimizer, 3, 0)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, saved = torch.load(file, weights_only=True)
    twin = small_net().to(torch.bfloat16)
    twin.load_state_dict(weights)
    resumed = RFShampoo(twin, **settings)
    resumed.load_state_dict(state_dict=saved)
    deep = copy.deepcopy(optimizer)
    each = ((model, optimizer), (twin, resumed), (deep.model, deep))
    losses = [trained(*pair, 4, 9) for pair in each]
    assert losses[0] == losses[1] == losses[2]
    state = resumed.state[twin[0].weight]
    assert state["K0"].dtype == torch.bfloat16 and state["momentum_buffer"].dtype == torch.float32


def test_what_training_loops_do():
    torch.manual_seed(0)
    model = small_net()
    model[4].bias.requires_grad_(False)
    optimizer = RFShampoo(model, factor_lr=lambda step: 0.1 / (1 + step), damping=0.1, lr=1e-3)
    train(model, optimizer, 2)
    k = optimizer.state[model[4].weight]["K0"].clone()
    optimizer.zero_grad()
    model(torch.randn(3, 2, 5, 5)).sum().backward()  # a step that a GradScaler skips
    optimizer.zero_grad()
    model(torch.randn(5, 2, 5, 5)).sum().backward()
    assert optimizer._samples._count == 5
    model[4].weight.grad[0, 0] = torch.nan
    optimizer.step()
    assert torch.equal(optimizer.state[model[4].weight]["K0"], k)
    with pytest.raises(RuntimeError, match="not called in training mode since the last step"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"structures are 2 for '0.weight'; expected one for each"):
        RFShampoo(model, structures={3: ("dense", "dense"), "default": "dense"})
    with pytest.raises(ValueError, match=r"structures has no choice for '0.weight' with 3 axes"):
        RFShampoo(model, structures={2: "dense"})
    with pytest.raises(ValueError, match="kernels is 'vector'; expected 'tensor' or 'matrix'"):
        RFShampoo(model, kernels="vector")
