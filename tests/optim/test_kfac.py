"""Steps of KFAC against dense inverses, and everything else that an optimizer must do."""

from functools import partial
from math import inf

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnconv
from tests.models.test_kronecker import FACTORED, by_group, explicit, patches, weight_rows
from tests.models.test_layers import LAYERS
from tests.optim.nets import batch, small_net, train
from tests.strategies import assert_close
from tnconv.losses.roots import curvature
from tnconv.optim import KFAC
from tnconv.optim.factored_damping import exact, factored, spectrum
from tnconv.optim.inverses import eigenbasis, inverse

pytestmark = pytest.mark.usefixtures("float64")


def dense_factored(a: Tensor, b: Tensor, damping: float) -> Tensor:
    """``(B + √λ/π I) ⊗ (A + π√λ I)``, but the damped product itself where a factor is a number."""
    size = len(a) * len(b)
    if 1 in (len(a), len(b)):
        return torch.kron(b, a) + damping * torch.eye(size)
    pi = ((a.trace() / len(a)) / (b.trace() / len(b))).sqrt()
    a = a + pi * damping**0.5 * torch.eye(len(a))
    return torch.kron(b + damping**0.5 / pi * torch.eye(len(b)), a)


def dense_exact(a: Tensor, b: Tensor, damping: float) -> Tensor:
    return torch.kron(b, a) + damping * torch.eye(len(a) * len(b))


DENSE = {"cholesky": dense_factored, "eigen": dense_exact}


@pytest.mark.parametrize("inverse", DENSE)
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("flavour", ["expand", "reduce"])
@pytest.mark.parametrize("case", [name for name in FACTORED if "our transposed, 4" not in name])
def test_step_is_the_dense_damped_inverse(case, flavour, joint, inverse) -> None:
    make, shape = LAYERS[case]
    layer, x, damping = make(), torch.randn(shape), 0.03
    optimizer = KFAC(
        layer, 0.5, 0.0, damping, flavour=flavour, kl_clip=inf, weight_decay=0.1, joint=joint,
        inverse=inverse,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    y = layer(x)
    s = y.detach().cos() / y.numel()
    y.sin().mean().backward()
    optimizer.step()
    u, v = patches(layer, x), len(x) ** 0.5 * by_group(layer, s[None])
    together = joint and layer.bias is not None
    rows = weight_rows(layer, layer.weight.grad)
    if together:
        u = torch.cat([u, torch.ones_like(u[:, :, :1])], 2)
        rows = torch.cat([rows, layer.bias.grad.reshape(len(rows), -1, 1)], 2)
    expected = [
        torch.linalg.solve(DENSE[inverse](a, b, damping), row.flatten()).reshape(row.shape)
        for a, b, row in zip(*explicit(u, v, flavour), rows, strict=True)
    ]
    weight = torch.stack(expected)[:, :, : rows.shape[2] - together]
    step = weight_rows(layer, before["weight"] - layer.weight.detach()) / 0.5
    assert_close(step, weight + 0.1 * weight_rows(layer, before["weight"]), 1e-10)
    if layer.bias is not None:
        bias = torch.stack(expected)[:, :, -1].flatten()
        if not joint:
            v = v.flatten(2, 3)[:, :, None]
            b = explicit(torch.ones_like(u[:, :1, :1]), v, flavour).grad_output[0]
            bias = torch.linalg.solve(b + damping * torch.eye(len(b)), layer.bias.grad)
        step = (before["bias"] - layer.bias.detach()) / 0.5
        assert_close(step, bias + 0.1 * before["bias"], 1e-10)


def test_a_bias_beside_a_frozen_weight_is_preconditioned() -> None:
    layer, x = nn.Linear(3, 2), torch.rand(4, 3)
    layer.weight.requires_grad_(False)
    old = layer.bias.detach().clone()
    optimizer = KFAC(layer, 1.0, 0.0, kl_clip=inf)
    y = layer(x)
    s = y.detach().cos() / y.numel()
    y.sin().mean().backward()
    optimizer.step()
    damped = 4 * s.T @ s + 0.01 * torch.eye(2)
    assert_close(layer.bias.detach(), old - torch.linalg.solve(damped, layer.bias.grad), 1e-10)


def test_groups_can_share_factors() -> None:
    layer, x = nn.Conv1d(4, 4, 3, groups=2, bias=False), torch.randn(5, 4, 7)
    old = layer.weight.detach().clone()
    optimizer = KFAC(layer, 1.0, 0.0, kl_clip=inf, per_group=False, inverse="eigen")
    layer(x).sin().mean().backward()
    optimizer.step()
    a, b = (optimizer.state[layer.weight][name] for name in "AB")
    assert a.shape == (1, 6, 6) and b.shape == (1, 2, 2)
    rows = layer.weight.grad.reshape(2, -1)
    dense = dense_exact(a[0], b[0], 0.01)
    step = torch.linalg.solve(dense, rows.T).T.reshape(old.shape)
    assert_close(layer.weight.detach(), old - step, 1e-10)


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 1, 5), (3, 5, 1)])
def test_exact_damping_of_random_factors(shape: tuple[int, int, int]) -> None:
    groups, d, c = shape
    halves = torch.randn(groups, c, c), torch.randn(groups, d, d)
    a, b = (half @ half.mT for half in halves)
    rows = torch.randn(shape)
    found = exact(rows, *spectrum(a, b), 0.1)
    first, second = factored(a, b, 0.1)
    for g in range(groups):
        expected = torch.linalg.solve(dense_exact(a[g], b[g], 0.1), rows[g].flatten())
        assert_close(found[g].flatten(), expected, 1e-10)
        expected = torch.linalg.solve(dense_factored(a[g], b[g], 0.1), rows[g].flatten())
        assert_close((second[g] @ rows[g] @ first[g]).flatten(), expected, 1e-10)


def test_inverse_retries_in_float64_and_refuses_what_has_none() -> None:
    matrix = torch.tensor([[[1e8, 1e8], [1e8, 1e8]]], dtype=torch.float32)
    found = inverse(matrix, 1e-2)
    assert found.dtype == torch.float32
    expected = torch.linalg.inv(matrix.double() + 1e-2 * torch.eye(2))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    with pytest.raises(torch.linalg.LinAlgError, match=r"\(1, 2, 2\) is not positive definite"):
        inverse(torch.full((1, 2, 2), torch.nan), 1.0)


def test_eigenbasis_retries_in_float64(monkeypatch) -> None:
    original = torch.linalg.eigh

    def fragile(matrix: Tensor):
        if matrix.dtype != torch.float64:
            raise torch.linalg.LinAlgError("did not converge")
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fragile)
    values, vectors = eigenbasis(torch.diag(torch.tensor([-1e-9, 2.0]))[None].float())
    assert values.dtype == vectors.dtype == torch.float32
    assert values.tolist() == [[0.0, 2.0]]


@pytest.mark.parametrize("fisher", ["type-2", "mc", "empirical"])
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("case", ["linear", "linear, 3-d", "groups", "transposed, 1-d", "conv3d"])
def test_ekfac_has_the_second_moments_in_the_eigenbasis(case, fisher, fresh) -> None:
    """In the basis that the step before found, and in one that is ``fresh`` in this step."""
    make, shape = LAYERS[case]
    layer, x, loss_fn = make(), torch.randn(shape), nn.MSELoss()
    y, generator = torch.randn_like(layer(x)), torch.Generator().manual_seed(1)
    optimizer = KFAC(
        layer, 0.5, 0.0, fisher=fisher, samples=2, generator=generator, loss_fn=loss_fn,
        inverse="ekfac", kl_clip=inf, decay=0.0,
        update_inverses_every=lambda step: step == 0 or fresh,
    )  # fmt: skip
    optimizer.zero_grad()
    loss_fn(layer(x), y).backward()
    optimizer.step()
    state = optimizer.state[layer.weight]
    assert state["moment_updates"] == 1
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer.zero_grad()
    loss_fn(layer(x), y).backward()
    s = {
        "empirical": lambda: 2 * (layer(x) - y).detach()[None] / y.numel() ** 0.5,
        "type-2": lambda: curvature(loss_fn, layer(x), y).vectors(),
        "mc": lambda: curvature(loss_fn, layer(x), y).samples(2, resumed(1, layer, x, y)),
    }[fisher]()
    optimizer.step()
    q, r = state["A_vectors"], state["B_vectors"]
    u = patches(layer, x)
    u = torch.cat([u, torch.ones_like(u[:, :, :1])], 2)
    j = torch.einsum("mngdo,ngao->mngda", by_group(layer, s), u)
    moments = torch.einsum("gde,mngda,gab->mngeb", r, j, q).square().sum((0, 1))
    assert_close(state["moments"], moments, 1e-10)
    assert state["moment_updates"] == 2 - fresh
    rows = torch.cat(
        [weight_rows(layer, layer.weight.grad), layer.bias.grad.reshape(len(q), -1, 1)], 2
    )
    for g, (basis, row) in enumerate(zip(map(torch.kron, r, q), rows, strict=True)):
        block = basis @ torch.diag(moments[g].flatten()) @ basis.T
        whole = torch.einsum("mnp,mnq->pq", *2 * (j[:, :, g].flatten(2),))
        kfac = torch.kron(state["B"][g], state["A"][g])
        if fresh or fisher != "mc":  # the basis is that of these factors
            assert (block - whole).norm() <= (kfac - whole).norm() + 1e-12
        damped = block + 0.01 * torch.eye(len(block))
        step = torch.linalg.solve(damped, row.flatten()).reshape(row.shape)
        taken = weight_rows(layer, before["weight"] - layer.weight.detach())[g] / 0.5
        assert_close(taken, step[:, :-1], 1e-10)


def resumed(seed: int, layer: nn.Module, x: Tensor, y: Tensor) -> torch.Generator:
    """A generator after the draws of one step."""
    generator = torch.Generator().manual_seed(seed)
    curvature(nn.MSELoss(), layer(x), y).samples(2, generator)
    return generator


def test_trust_region_bounds_the_step() -> None:
    def step(kl_clip: float) -> list[Tensor]:
        torch.manual_seed(1)
        layer = nn.Linear(4, 3)
        before = [p.detach().clone() for p in layer.parameters()]
        optimizer = KFAC(layer, lr=0.1, momentum=0.0, kl_clip=kl_clip)
        layer(torch.rand(5, 4)).square().mean().backward()
        optimizer.step()
        taken = zip(before, layer.parameters(), strict=True)
        return [(p.detach() - old).flatten() for old, p in taken] + [
            p.grad.flatten() for p in layer.parameters()
        ]

    free = step(inf)
    change = -0.1 * float(torch.cat(free[:2]) @ torch.cat(free[2:]))
    for kl_clip in (1e3, change / 4):
        ratio = min(1.0, (kl_clip / change) ** 0.5)
        for found, part in zip(step(kl_clip)[:2], free[:2], strict=True):
            assert_close(found, ratio * part, 1e-10)


@pytest.mark.parametrize(
    ("factors_every", "inverses_every", "updates", "refreshed"),
    [
        (2, 3, [1, 1, 2, 2, 3, 3, 4, 4, 5, 5], [0, 2, 3, 6, 9]),
        (
            lambda step: step in (0, 5),
            lambda step: step >= 7,
            [1, 1, 1, 1, 1, 2, 2, 2, 2, 2],
            [0, 7, 8, 9],
        ),
    ],
)
def test_schedule_of_factors_and_inverses(factors_every, inverses_every, updates, refreshed):
    layer = nn.Linear(3, 2)
    optimizer = KFAC(
        layer, update_factors_every=factors_every, update_inverses_every=inverses_every
    )
    found, at, last = [], [], None
    for step in range(10):
        optimizer.zero_grad()
        layer(torch.rand(4, 3)).square().mean().backward()
        optimizer.step()
        state = optimizer.state[layer.weight]
        found.append(state["updates"])
        if state["A_inverse"] is not last:
            at.append(step)
        last = state["A_inverse"]
    assert (found, at) == (updates, refreshed)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def others() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.BatchNorm1d(3), Doubled(3, 3), nn.LayerNorm(3), nn.PReLU())


def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(6)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.rand(4, 3)).square().mean().backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:KFAC has no Kronecker factors for 1 param:UserWarning")
@pytest.mark.parametrize("decoupled", [True, False])
def test_other_parameters_have_natural_gradients_of_their_own(decoupled: bool) -> None:
    """``V <- μ V + ν g / (s + λ) + γ W`` with s the running mean of N g², for a batch of N."""
    model, x = others(), torch.rand(4, 3)
    optimizer = KFAC(model, 0.05, weight_decay=0.01, decoupled=decoupled, decay=0.8, kl_clip=1e-3)
    named, squares, velocity = dict(model.named_parameters()), {}, {}
    expected = {name: p.detach().clone() for name, p in named.items()}
    for step in range(1, 4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        grads = {name: p.grad.clone() for name, p in named.items()}
        optimizer.step()
        share = 0.2 / (1 - 0.8**step)
        natural = {}
        for name, g in grads.items():
            s = squares[name] = (1 - share) * squares.get(name, 0) + share * 4 * g * g
            natural[name] = g / (s + 0.01)
        change = 0.1**2 * sum((natural[name] * g).sum() for name, g in grads.items())
        trust = (1e-3 / change).sqrt().clamp(max=1)
        for name, w in expected.items():
            direction = trust * natural[name] + (0.0 if decoupled else 0.01) * w
            velocity[name] = 0.9 * velocity.get(name, 0) + direction
            expected[name] = (1 - 0.05 * 0.01 * decoupled) * w - 0.05 * velocity[name]
            assert_close(named[name].detach(), expected[name], 1e-10)


def test_a_fallback_trains_the_other_parameters() -> None:
    ours, theirs = others(), others()
    optimizer = KFAC(ours, fallback=partial(torch.optim.AdamW, lr=0.02))
    loop(ours, optimizer)
    loop(theirs, torch.optim.AdamW(theirs.parameters(), lr=0.02))
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(one.detach(), two.detach())
    model = small_net()
    optimizer = KFAC(model, fallback=partial(torch.optim.AdamW, lr=0.02))
    held = {p for group in optimizer.fallback.param_groups for p in group["params"]}
    assert held == set(model[1].parameters())
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 2)
    assert all(not torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True))
    assert KFAC(nn.Linear(2, 2), fallback=torch.optim.AdamW).fallback is None


def test_groups_of_parameters_have_settings_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.PReLU())
    optimizer = KFAC(
        model,
        momentum=0.0,
        kl_clip=inf,
        params=[
            {"params": model[0].parameters(), "damping": 0.5, "lr": 0.01},
            {"params": model[2].parameters(), "weight_decay": 0.1},
        ],
    )
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.rand(5, 3)).square().mean().backward()
    optimizer.step()
    for at, (lr, damping, decay) in {0: (0.01, 0.5, 0.0), 2: (0.1, 0.01, 0.1)}.items():
        state = optimizer.state[model[at].weight]
        dense = dense_factored(state["A"][0], state["B"][0], damping)
        grad = torch.cat([model[at].weight.grad, model[at].bias.grad[:, None]], 1)
        old = torch.cat([before[at], before[at + 1][:, None]], 1)
        step = torch.linalg.solve(dense, grad.flatten()).reshape(grad.shape)
        new = torch.cat([model[at].weight, model[at].bias[:, None]], 1).detach()
        assert_close(new, old - lr * (step + decay * old), 1e-10)
    assert torch.equal(model[3].weight, before[4])  # in no group
    optimizer.add_param_group({"params": model[3].parameters()})
    optimizer.step()
    assert not torch.equal(model[3].weight, before[4])
    with pytest.raises(ValueError, match="weight and bias of layer '0' are in different groups"):
        KFAC(model, params=[{"params": [model[0].weight]}, {"params": [model[0].bias]}])
    KFAC(model, params=[{"params": [model[0].weight]}, {"params": [model[0].bias]}], joint=False)
    with pytest.raises(ValueError, match="damping is -1; expected a positive number"):
        KFAC(model, params=[{"params": model.parameters(), "damping": -1}])


def test_damping_follows_the_model_of_the_loss() -> None:
    """For a quadratic loss whose matrix the factors are, the prediction is exact but for λ."""
    layer, x, y = nn.Linear(4, 3), torch.randn(1, 4), torch.randn(1, 3)
    loss_fn = nn.MSELoss()
    settings = {"momentum": 0.0, "kl_clip": inf, "damping": 1e-9, "inverse": "eigen"}
    optimizer = KFAC(layer, lr=0.3, fisher="type-2", loss_fn=loss_fn, adapt_damping=0.5, **settings)
    with pytest.raises(RuntimeError, match="a step before each call"):
        optimizer.adapt(1.0, 0.5)
    before = loss_fn(layer(x), y)
    before.backward()
    optimizer.step()
    after = loss_fn(layer(x), y).detach()
    torch.testing.assert_close(after - before.detach(), optimizer.predicted, rtol=1e-6, atol=0)
    optimizer.adapt(before.detach(), after)
    assert optimizer.param_groups[0]["damping"] == 0.5e-9
    optimizer.step()
    optimizer.adapt(0.0, 1.0)
    assert optimizer.param_groups[0]["damping"] == 1e-9


def test_learning_rate_schedulers_and_closures_work() -> None:
    model = small_net()
    optimizer = KFAC(model, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    x, y = batch()

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.item()

    losses = []
    for _ in range(8):
        losses.append(optimizer.step(closure))
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 16)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("fisher", ["type-2", "mc", "empirical", "forward-only"])
@pytest.mark.parametrize("inverse", [*DENSE, "ekfac"])
def test_training_reduces_the_loss(fisher: str, inverse: str) -> None:
    if fisher == "forward-only" and inverse == "ekfac":
        pytest.skip("refused")
    model, (x, y), loss_fn = small_net(), batch(24), nn.CrossEntropyLoss()
    optimizer = KFAC(
        model, flavour="expand", kl_clip=1e-3, fisher=fisher, inverse=inverse, loss_fn=loss_fn
    )
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lr", -0.1, "lr is -0.1; expected a number, at least 0"),
        ("lr", float("nan"), "lr is nan"),
        ("momentum", 1.0, r"momentum is 1.0; expected a number in \[0, 1\)"),
        ("damping", 0.0, "damping is 0.0; expected a positive number"),
        ("decay", 1.5, r"decay is 1.5; expected a number in \[0, 1\)"),
        ("weight_decay", -1, "weight_decay is -1; expected a number, at least 0"),
        ("flavour", "both", "flavour is 'both'; expected one of 'expand', 'reduce'"),
        ("fisher", "both", "fisher is 'both'; expected one of 'type-2', 'mc'"),
        ("inverse", "lu", "inverse is 'lu'; expected 'cholesky', 'eigen' or 'ekfac'"),
        ("kl_clip", 0, "kl_clip is 0; expected a positive number"),
        ("adapt_damping", 2.0, r"adapt_damping is 2.0; expected None or a number in \(0, 1\)"),
        ("update_factors_every", 0, "update_factors_every is 0; expected an int, at least 1"),
        ("update_inverses_every", 2.5, "update_inverses_every is 2.5; expected an int"),
    ],
)
def test_hyper_parameters_are_checked(name, value, words) -> None:
    with pytest.raises(ValueError, match=words):
        KFAC(nn.Linear(2, 2), **{name: value})


@pytest.mark.parametrize("setting", [{"per_group": False}, {"fisher": "forward-only"}])
def test_ekfac_needs_gradients_of_each_group(setting) -> None:
    with pytest.raises(ValueError, match="inverse is 'ekfac'; expected factors per group"):
        KFAC(nn.Linear(2, 2), inverse="ekfac", **setting)


def test_parameters_instead_of_a_model_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model is a generator; expected a torch\.nn\.Module"):
        KFAC(nn.Linear(2, 2).parameters())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("inverse", ["cholesky", "ekfac"])
def test_memory_saving_layers_take_the_same_steps(inverse: str) -> None:
    """Also where rounding, which is the same in both, chooses an eigenbasis."""
    loss_fn, found = nn.CrossEntropyLoss(), []
    for save in (False, True):
        torch.manual_seed(0)
        model = small_net()
        model = tnconv.nn.save_memory(model) if save else model
        optimizer = KFAC(model, fisher="type-2", loss_fn=loss_fn, inverse=inverse)
        for seed in range(3):
            torch.manual_seed(seed)
            x, y = batch(12)
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert_close(other, one, 1e-10)


def test_squares_are_updated_where_factors_are() -> None:
    """Other steps leave them; parameters without squares start at once."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    optimizer = KFAC(model, update_factors_every=2)
    seen: list[Tensor] = []
    for step in range(4):
        optimizer.zero_grad()
        model(torch.rand(5, 3)).square().sum().backward()
        if step == 0:
            model[1].bias.grad = None
        optimizer.step()
        seen.append(optimizer.state[model[1].weight]["squares"].clone())
        assert ("squares" in optimizer.state[model[1].bias]) == (step > 0)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[1], seen[2])
