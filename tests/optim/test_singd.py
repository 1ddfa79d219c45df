"""SINGD: its formulas replayed densely, invariances, saving, and all that a training loop does."""

import copy
import io
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.optim.nets import batch, small_net, train
from tests.strategies import assert_close
from tnconv import tiered_compilation
from tnconv.optim import SINGD
from tnconv.optim.structures import STRUCTURES, BlockDiagonal, structure

pytestmark = pytest.mark.usefixtures("float64", "first_programs")
LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (6, 5)),
    "linear of positions": (lambda: nn.Linear(5, 4), (6, 3, 5)),
    "no bias": (lambda: nn.Linear(5, 4, bias=False), (6, 5)),
    "stride": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (4, 3, 6, 5)),
    "dilation": (lambda: nn.Conv2d(2, 3, (2, 3), dilation=2, bias=False), (4, 2, 6, 7)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 4, 4, 4)),
}


def patches(layer, x):
    """(n, o, g, a) by torch's own unfold, ending with a 1 if there is a bias."""
    if isinstance(layer, nn.Linear):
        found = x.reshape(len(x), -1, 1, x.shape[-1])
    else:
        unfolded = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        found = unfolded.unflatten(1, (layer.groups, -1)).permute(0, 3, 1, 2)
    return found if layer.bias is None else F.pad(found, (0, 1), value=1.0)


def output_rows(layer, v):
    """(n, o, g, d)."""
    if isinstance(layer, nn.Linear):
        return v.reshape(len(v), -1, 1, v.shape[-1])
    return v.flatten(2).unflatten(1, (layer.groups, -1)).permute(0, 3, 1, 2)


@pytest.fixture
def first_programs():
    """As users see them: what runs once is not searched for."""
    with tiered_compilation(True):
        yield


class Replay:
    """The formulas of the docstring on dense matrices, for one layer."""

    def __init__(self, layer, families, **settings):
        self.layer, self.s = layer, settings
        groups = getattr(layer, "groups", 1)
        self.families = families
        self.k, self.c = (torch.eye(f.size).repeat(groups, 1, 1) for f in families)
        self.m = [torch.zeros_like(self.k), torch.zeros_like(self.c)]
        self.v = 0.0

    def projected(self, at, matrix):
        family = self.families[at]
        return family.dense(family.project((matrix + matrix.mT) / 2))

    def factors(self, x, v, flavour):
        u, rows = patches(self.layer, x), output_rows(self.layer, v)
        n = len(x)
        if flavour == "reduce":
            u, rows = u.mean(1, keepdim=True), rows.sum(1, keepdim=True)
        elif flavour == "hybrid":
            rows = rows.sum(1, keepdim=True)
        a = torch.einsum("noga,nogb->gab", u, u) / (n * u.shape[1])
        b = n * torch.einsum("noga,nogb->gab", rows, rows)
        return a, b

    def step(self, x, v, grads, flavour):
        s, (k, c) = self.s, (self.k, self.c)
        a, b = self.factors(x, v, flavour)
        h = [self.projected(0, k.mT @ a @ k), self.projected(1, c.mT @ b @ c)]
        inner = [self.projected(0, k.mT @ k), self.projected(1, c.mT @ c)]

        def mean(matrix):
            return matrix.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]

        alpha = 0.0 if s["kfac_like"] else 0.5
        share = (1 - alpha) / 2 if s["normalize"] else 0.5
        new = []
        for at, own in enumerate((k, c)):
            curve = (1.0, 1.0) if s["kfac_like"] else (mean(h[1 - at]), mean(inner[1 - at]))
            slope = (
                curve[0] * h[at] + s["damping"] * curve[1] * inner[at] - torch.eye(own.shape[-1])
            )
            self.m[at] = alpha * self.m[at] + share * slope
            largest = self.m[at].abs().amax((1, 2), keepdim=True).clamp(min=1)
            rate = s["rate"] / largest if s["normalize"] else s["rate"]
            new.append(own - rate * own @ self.m[at])
        self.k, self.c = new
        groups, d = self.c.shape[:2]
        rows = [grads[0].reshape(groups, d, -1)]
        weights = [self.layer.weight.detach().reshape(groups, d, -1)]
        if self.layer.bias is not None:
            rows.append(grads[1].reshape(groups, d, 1))
            weights.append(self.layer.bias.detach().reshape(groups, d, 1))
        g, w = torch.cat(rows, 2), torch.cat(weights, 2)
        natural = self.c @ self.c.mT @ g @ self.k @ self.k.mT
        self.v = 0.9 * self.v + natural + 0.01 * w
        return w - 0.1 * self.v


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("structures", "flavour", "kfac_like"),
    [
        ("dense", "expand", False),
        ("dense", "reduce", True),
        ("diagonal", "hybrid", False),
        (("hierarchical", "lower_triangular"), "expand", True),
        (("triangular_toeplitz", lambda d: BlockDiagonal(d, block=2)), "reduce", False),
        ((lambda d: BlockDiagonal(d, block=3), "upper_triangular_top_left"), "expand", False),
    ],
    ids=["dense", "dense, kfac-like", "diagonal", "families, kfac-like", "toeplitz", "blocks"],
)  # fmt: skip
def test_ten_steps_replay(structures, flavour, layer, kfac_like):
    made, shape = LAYERS[layer]
    model = made()
    pair = structures if isinstance(structures, tuple) else (structures, structures)
    normalize = flavour == "hybrid"
    optimizer = SINGD(
        model, lr=0.1, damping=0.1, weight_decay=0.01, factor_lr=0.2, structures=structures,
        update_factors_every=1, kfac_like=kfac_like, flavour=flavour, normalize_factor_lr=normalize,
    )  # fmt: skip
    outputs = len(model.weight) // getattr(model, "groups", 1)
    inputs = patches(model, torch.zeros(shape)).shape[-1]
    families = structure(pair[0], inputs), structure(pair[1], outputs)
    settings = {"damping": 0.1, "rate": 0.2, "kfac_like": kfac_like, "normalize": normalize}
    replay = Replay(model, families, **settings)
    for _ in range(10):
        x = torch.randn(shape)
        y = model(x)
        target = torch.randn_like(y)
        optimizer.zero_grad()
        loss = 0.1 * (y - target).square().sum() / len(x)
        loss.backward()
        v = 0.2 * (y - target).detach() / len(x)
        grads = [p.grad.clone() for p in model.parameters()]
        expected = replay.step(x, v, grads, flavour)
        optimizer.step()
        found = [model.weight.detach().reshape(*expected.shape[:2], -1)]
        if model.bias is not None:
            found.append(model.bias.detach().reshape(*expected.shape[:2], 1))
        assert_close(torch.cat(found, 2), expected, 1e-11)
        state = optimizer.state[model.weight]
        assert_close(families[0].dense(state["K"]), replay.k, 1e-11)
        assert_close(families[1].dense(state["C"]), replay.c, 1e-11)


def test_one_block_of_all_rows_is_dense_for_a_hundred_steps():
    ends = []
    for chosen in (
        "dense",
        lambda d: BlockDiagonal(d, block=d),
        lambda d: BlockDiagonal(d, block=999),
    ):
        torch.manual_seed(1)
        model = small_net()
        settings = {"lr": 1e-3, "damping": 0.1, "factor_lr": 0.05, "update_factors_every": 1}
        optimizer = SINGD(model, structures=chosen, **settings)
        train(model, optimizer, 100)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for other in ends[1:]:
        assert_close(other, ends[0], 1e-9)


def test_kfac_like_is_the_inverse_to_first_order():
    """From ``K Kᵀ = (S + λ I)⁻¹``, with ``S' = (1 - β) S + β A``: the error of a step is β²."""
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3, bias=False), torch.randn(50, 4)
    a, damping = x.mT @ x / 50, 0.3
    errors = []
    for rate in (0.1, 0.05, 0.025, 0.0125):
        optimizer = SINGD(layer, lr=0.0, damping=damping, factor_lr=rate, kfac_like=True)
        layer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()  # from the identity: S = (1 - λ) I
        k = optimizer.state[layer.weight]["K"].reshape(4, 4)
        s = (1 - rate) * (1 - damping) * torch.eye(4) + rate * a
        errors.append(float((k @ k.mT - torch.linalg.inv(s + damping * torch.eye(4))).norm()))
        optimizer.remove_hooks()
    ratios = [one / other for one, other in pairwise(errors)]
    assert all(3.5 < ratio < 4.5 for ratio in ratios[1:]), ratios


@pytest.mark.parametrize("kfac_like", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("structures", "flavour"),
    [("dense", "expand"), ("hierarchical", "expand"), ("triangular_toeplitz", "reduce")],
)
def test_micro_batches_are_one_batch(flavour, structures, reduction, kfac_like):
    ends = []
    for parts in (1, 3):
        torch.manual_seed(0)
        model = small_net().eval()
        model[0].train(), model[4].train()
        loss_fn = nn.CrossEntropyLoss(reduction=reduction)
        optimizer = SINGD(
            model, lr=0.01, structures=structures, reduction=reduction, kfac_like=kfac_like,
            update_factors_every=2, flavour=flavour, factor_lr=0.1,
        )  # fmt: skip
        for seed in range(3):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            for x, y in zip(*(torch.tensor_split(each, parts) for each in batch(9)), strict=True):
                share = len(x) / 9 if reduction == "mean" else 1
                (share * loss_fn(model(x), y)).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_close(ends[1], ends[0], 1e-10)


@pytest.mark.parametrize("scale", [1e4, None])
def test_scaled_losses_take_the_same_steps(scale):
    """A constant scale, and one that changes, as of a GradScaler; gradients are unscaled."""
    ends = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model, now = small_net(), [1.0]
        optimizer = SINGD(model, lr=0.02, update_factors_every=1, loss_scale=lambda now=now: now[0])
        for step in range(4):
            torch.manual_seed(step)
            now[0] = (scale or 10.0**step) if scaled else 1.0
            x, y = batch()
            optimizer.zero_grad()
            (now[0] * F.cross_entropy(model(x), y)).backward()
            for p in model.parameters():
                p.grad /= now[0]
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_close(ends[1], ends[0], 1e-10)


@pytest.mark.parametrize("structures", STRUCTURES)
def test_resuming_is_exact(structures):
    torch.manual_seed(0)
    model = small_net().float()
    settings = {
        "structures": structures,
        "update_factors_every": 2,
        "momentum_dtype": torch.float64,
    }
    settings |= {"factor_dtype": torch.bfloat16, "lr": 0.02}
    optimizer = SINGD(model, **settings)
    torch.set_default_dtype(torch.float32)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, saved = torch.load(file, weights_only=True)
    twin = small_net()
    twin.load_state_dict(weights)
    resumed = SINGD(twin, **settings)
    resumed.load_state_dict(state_dict=saved)
    assert resumed.state[twin[0].weight]["K"].dtype == torch.bfloat16
    deep = copy.deepcopy(optimizer)
    losses = [train(m, o, 5, 7) for m, o in
              ((model, optimizer), (twin, resumed), (deep.model, deep))]  # fmt: skip
    assert losses[0] == losses[1] == losses[2]
    for one, other, third in zip(*(m.parameters() for m in (model, twin, deep.model)), strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)


@pytest.mark.parametrize("structures", STRUCTURES)
def test_pure_half_precision_trains(structures):
    torch.manual_seed(0)
    model = small_net().to(torch.bfloat16)
    optimizer = SINGD(model, lr=0.02, structures=structures, update_factors_every=1)
    torch.manual_seed(0)
    x, y = batch(16)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.bfloat16()).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    state = optimizer.state[model[0].weight]
    assert {state[name].dtype for name in ("K", "C", "m_K", "momentum_buffer")} == {torch.bfloat16}


@pytest.mark.parametrize("fisher", ["type-2", "mc", "empirical", "forward-only"])
def test_every_fisher_trains(fisher):
    torch.manual_seed(0)
    model, loss_fn = small_net(), nn.CrossEntropyLoss()
    optimizer = SINGD(model, lr=0.05, fisher=fisher, loss_fn=loss_fn, update_factors_every=1)
    torch.manual_seed(1)
    x, y = batch(16)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_what_training_loops_do():
    """Frozen and unused layers, shared ones, evaluation, groups, clipping, non-finite passes."""
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "shared": shared, "unused": nn.Linear(4, 4)})
    model["first"].bias.requires_grad_(False)
    groups = [
        {"params": model["first"].parameters(), "damping": 0.1},
        {"params": [*shared.parameters(), *model["unused"].parameters()], "lr": 0.01},
    ]
    optimizer = SINGD(model, lr=0.1, params=groups, update_factors_every=1)

    def run(x):
        return shared(torch.tanh(shared(torch.tanh(model["first"](x)))))

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        run(torch.randn(5, 4)).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"first.weight", "shared.weight", "shared.bias"}
    k = optimizer.state[shared.weight]["K"].clone()
    optimizer.zero_grad()
    (run(torch.randn(5, 4)) * math.nan).square().mean().backward()
    with pytest.warns(UserWarning, match="SINGD left out the factors"):
        optimizer.step()
    assert torch.equal(optimizer.state[shared.weight]["K"], k)


def test_choices_by_layer_and_settings():
    model = small_net()
    choices = {"4": ("diagonal", "dense"), nn.Conv2d: "lower_triangular"}
    optimizer = SINGD(model, structures=choices, factor_lr=lambda step: 0.1 / (1 + step))
    train(model, optimizer, 1)
    shapes = {n: tuple(optimizer.state[model[i].weight][n].shape) for i in (0, 4) for n in ("K",)}
    assert shapes == {"K": (1, 101)}
    assert optimizer.state[model[0].weight]["K"].shape == (2, 55)
    with pytest.raises(ValueError, match="structures has no choice for layer '0'"):
        SINGD(model, structures={nn.Linear: "dense"})
    with pytest.raises(ValueError, match="structure is 'full'; expected one of dense"):
        SINGD(model, structures="full")
    with pytest.raises(ValueError, match=r"riemannian_momentum is 0.5; expected 0 with kfac_like"):
        SINGD(model, kfac_like=True, riemannian_momentum=0.5)
    with pytest.raises(ValueError, match="factor_lr is 0; expected a positive number or a call"):
        SINGD(model, factor_lr=0)
    with pytest.raises(ValueError, match="structures are 3 for layer '0'; expected one or two"):
        SINGD(model, structures=("dense", "dense", "dense"))
