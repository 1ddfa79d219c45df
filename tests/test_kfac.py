"""The optimizer KFAC: its factors, its step, its state, and what it leaves alone."""

import copy
import io
from math import inf, prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnconv
from tnconv.optim import KFAC
from tnconv.optim.factors import inverse, statistics

FLAVOURS = ("expand", "reduce")
LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "linear, 3-d": (lambda: nn.Linear(5, 3), (4, 6, 5)),
    "linear, 4-d": (lambda: nn.Linear(5, 3), (4, 2, 3, 5)),
    "linear, unbatched": (lambda: nn.Linear(5, 3), (5,)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (4, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (2, 3), stride=(1, 2), padding=(0, 2)), (4, 3, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2), (2, 2, 5, 4, 3)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv1d(3, 3, 2, groups=3), (4, 3, 6)),
    "same": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same"), (4, 2, 6, 5)),
    "circular": (
        lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"),
        (4, 2, 5, 6),
    ),
    "reflect, same": (
        lambda: nn.Conv1d(2, 3, 4, padding="same", padding_mode="reflect"),
        (4, 2, 6),
    ),
    "unbatched": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 4)),
}


pytestmark = pytest.mark.usefixtures("float64")


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """Explicit patches ``(n, g, c·K, O)``, by the layer itself with one-hot kernels."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1 if x.dim() == 1 else len(x), -1, 1, x.shape[-1]).permute(0, 2, 3, 1)
    x = x if x.dim() == layer.weight.dim() else x[None]
    size = prod(layer.weight.shape[1:])
    probe = copy.deepcopy(layer)
    one_hot = torch.eye(size).reshape(size, *layer.weight.shape[1:])
    probe.weight = nn.Parameter(one_hot.repeat(layer.groups, *[1] * (layer.weight.dim() - 1)))
    probe.bias = None
    return probe(x).detach().reshape(len(x), layer.groups, size, -1)


def output_rows(layer: nn.Module, grad: Tensor) -> Tensor:
    """Output gradients ``(n, g, d, O)``."""
    if isinstance(layer, nn.Linear):
        return patches(layer, grad)
    grad = grad if grad.dim() == layer.weight.dim() else grad[None]
    return grad.reshape(len(grad), layer.groups, len(layer.weight) // layer.groups, -1)


def dense_factors(a: Tensor, s: Tensor, flavour: str) -> tuple[Tensor, Tensor]:
    samples, positions = len(a), a.shape[-1]
    if flavour == "expand":
        inputs = torch.einsum("ngio,ngjo->gij", a, a) / (samples * positions)
        return inputs, samples * torch.einsum("ngio,ngjo->gij", s, s)
    a, s = a.mean(-1), s.sum(-1)
    inputs = torch.einsum("ngi,ngj->gij", a, a) / samples
    return inputs, samples * torch.einsum("ngi,ngj->gij", s, s)


def plain_steps(module: nn.Module) -> KFAC:
    """An optimizer without momentum or trust region, so that a step shows the preconditioner."""
    return KFAC(module, lr=1.0, momentum=0.0, kl_clip=inf)


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 25, 3),
    )


def batch(samples: int = 6) -> tuple[Tensor, Tensor]:
    return torch.rand(samples, 2, 5, 5), torch.randint(3, (samples,))


def train(model: nn.Module, optimizer: KFAC, steps: int, seed: int = 0) -> list[float]:
    torch.manual_seed(seed)
    losses = []
    for _ in range(steps):
        x, y = batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("case", LAYERS)
def test_factors_equal_unfolded_ones(case, flavour):
    make, shape = LAYERS[case]
    layer, x = make(), torch.rand(shape)
    grad = torch.randn_like(layer(x))
    expected = dense_factors(patches(layer, x), output_rows(layer, grad), flavour)
    torch.testing.assert_close(statistics(layer, x, grad, flavour).factors, expected)


def test_patches_of_the_tests_reproduce_the_layer():
    for make, shape in LAYERS.values():
        layer, x = make(), torch.rand(shape)
        a = patches(layer, x)
        weight = layer.weight.reshape(a.shape[1], -1, a.shape[2])
        y = torch.einsum("gdi,ngio->ngdo", weight, a)
        bias = layer.bias.reshape(a.shape[1], -1, 1)
        torch.testing.assert_close(y + bias, output_rows(layer, layer(x).detach()))


def fisher(layer: nn.Module, x: Tensor, loss_of: nn.Module) -> Tensor:
    """The empirical Fisher ``1/N Σ_n g_n g_nᵀ`` over the layer's weight, one sample at a time."""
    grads = []
    for sample in x:
        (grad,) = torch.autograd.grad(loss_of(layer(sample[None])), layer.weight)
        grads.append(grad.flatten())
    return torch.stack(grads).T @ torch.stack(grads) / len(x)


def collected(layer: nn.Module, x: Tensor, loss_of: nn.Module, flavour: str) -> Tensor:
    """``B ⊗ A``, the order of a row-major weight, after one pass of the whole batch."""
    optimizer = KFAC(layer, lr=0.0, flavour=flavour)
    loss_of(layer(x)).backward()
    optimizer.step()
    state = optimizer.state[layer.weight]
    blocks = [
        torch.kron(b.contiguous(), a.contiguous())
        for a, b in zip(state["A"], state["B"], strict=True)
    ]
    return torch.block_diag(*blocks)


def mean_loss(y: Tensor) -> Tensor:
    return y.flatten(1).sin().sum(1).mean()


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_exact_for_a_linear_layer_whose_samples_share_their_input(flavour, samples, bias):
    layer = nn.Linear(4, 3, bias=bias)
    x = torch.rand(1, 4).expand(samples, 4)

    def noisy(y: Tensor) -> Tensor:
        """A mean over samples that each have a loss of their own."""
        return (torch.arange(1.0, samples + 1)[:, None] * y).sin().sum(1).mean()

    y = layer(x).detach().requires_grad_()
    (s,) = torch.autograd.grad(noisy(y), y)
    per_sample = samples * torch.einsum("nd,nc->ndc", s, x).flatten(1)
    expected = per_sample.T @ per_sample / samples
    torch.testing.assert_close(collected(layer, x, noisy, flavour), expected)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_exact_for_one_sample_with_one_position(flavour):
    layer, x = nn.Conv2d(2, 3, 4), torch.rand(1, 2, 4, 4)
    expected = fisher(layer, x, mean_loss)
    torch.testing.assert_close(collected(layer, x, mean_loss, flavour), expected)


def test_reduce_is_exact_for_one_sample_with_shared_output_gradients():
    """Where s does not depend on o, ``g = Σ_o s a_oᵀ = (Σ_o s)(1/O Σ_o a_o)ᵀ``."""
    layer, x = nn.Conv1d(2, 3, 3), torch.rand(1, 2, 9)

    def pooled(y: Tensor) -> Tensor:
        return y.mean(2).sin().sum(1).mean()

    torch.testing.assert_close(collected(layer, x, pooled, "reduce"), fisher(layer, x, pooled))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_curvature_of_a_bias_is_the_output_factor(flavour):
    layer, x = nn.Linear(4, 3), torch.rand(6, 4)
    optimizer = KFAC(layer, flavour=flavour)
    mean_loss(layer(x)).backward()
    optimizer.step()
    layer.weight.data.copy_(layer.weight)
    assert torch.equal(
        optimizer.state[layer.bias]["B_inverse"], inverse(optimizer.state[layer.weight]["B"], 0.01)
    )


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("case", LAYERS)
def test_step_is_the_dense_damped_inverse(case, flavour):
    make, shape = LAYERS[case]
    layer, x = make(), torch.rand(shape)
    before = [p.detach().clone() for p in layer.parameters()]
    damping = 0.03
    optimizer = KFAC(
        layer, lr=0.5, momentum=0.0, damping=damping, flavour=flavour, kl_clip=inf, weight_decay=0.1
    )
    layer(x).sin().mean().backward()
    optimizer.step()
    weight, bias = optimizer.state[layer.weight], layer.bias
    grads = layer.weight.grad.reshape(len(weight["A"]), -1)
    expected = []
    for a, b, grad in zip(weight["A"], weight["B"], grads, strict=True):
        pi = ((a.trace() / len(a)) / (b.trace() / len(b))).sqrt()
        a = a.contiguous() + pi * damping**0.5 * torch.eye(len(a))
        b = b.contiguous() + damping**0.5 / pi * torch.eye(len(b))
        expected.append(torch.linalg.solve(torch.kron(b, a), grad))
    direction = torch.cat(expected).reshape(before[0].shape) + 0.1 * before[0]
    torch.testing.assert_close(layer.weight.detach(), before[0] - 0.5 * direction)
    blocks = torch.block_diag(*weight["B"]) + damping * torch.eye(len(before[1]))
    direction = torch.linalg.solve(blocks, bias.grad) + 0.1 * before[1]
    torch.testing.assert_close(bias.detach(), before[1] - 0.5 * direction)


def test_trust_region_bounds_the_step():
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
        torch.testing.assert_close(step(kl_clip)[:2], [ratio * part for part in free[:2]])


def test_running_averages_are_normalised():
    layer = nn.Linear(3, 2)
    optimizer = KFAC(layer, decay=0.8, lr=0.0)
    factors = []
    for _ in range(3):
        x = torch.rand(5, 3)
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        factors.append(x.T @ x / 5)
    weights = torch.tensor([0.64, 0.8, 1.0]) / 2.44
    expected = sum(w * a for w, a in zip(weights, factors, strict=True))
    torch.testing.assert_close(optimizer.state[layer.weight]["A"][0], expected)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_micro_batches_equal_the_joint_batch(flavour):
    def factors(sizes: list[int]) -> list[Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
        optimizer = KFAC(model, flavour=flavour)
        for x in torch.rand(8, 2, 8).split(sizes):
            (mean_loss(model(x)) * len(x) / 8).backward()
        optimizer.step()
        return [optimizer.state[model[at].weight][name] for at in (0, 3) for name in "AB"]

    torch.testing.assert_close(factors([3, 1, 4]), factors([8]))


def test_zero_grad_drops_collected_statistics():
    layer, (first, second) = nn.Linear(3, 2), torch.rand(2, 5, 3)
    optimizer = KFAC(layer)
    layer(first).square().mean().backward()
    optimizer.zero_grad()
    layer(second).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[layer.weight]["A"][0], second.T @ second / 5)


def test_state_dict_resumes_exactly():
    def make(seed: int) -> tuple[nn.Module, KFAC]:
        torch.manual_seed(seed)
        model = small_net()
        return model, KFAC(
            model, update_factors_every=2, update_inverses_every=3, weight_decay=0.01
        )

    model, optimizer = make(0)
    train(model, optimizer, 5)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, other = make(1)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert train(model, optimizer, 3, seed=7) == train(resumed, other, 3, seed=7)
    for one, two in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


def test_schedule_of_factors_and_inverses(monkeypatch):
    layer = nn.Linear(3, 2)
    optimizer = KFAC(layer, update_factors_every=2, update_inverses_every=3)
    updates, refreshed, last = [], [], None
    for step in range(10):
        optimizer.zero_grad()
        layer(torch.rand(4, 3)).square().mean().backward()
        optimizer.step()
        state = optimizer.state[layer.weight]
        updates.append(state["updates"])
        if state["A_inverse"] is not last:
            refreshed.append(step)
        last = state["A_inverse"]
    assert updates == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert refreshed == [0, 1, 2, 3, 6, 9]


def test_evaluation_and_no_grad_never_touch_factors():
    model = small_net()
    optimizer = KFAC(model)
    x, y = batch()
    model.eval()
    F.cross_entropy(model(x), y).backward()
    model.train()
    with torch.no_grad():
        model(x)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert not any("A" in state for state in optimizer.state.values())
    for old, p in zip(before, model.parameters(), strict=True):  # plain SGD without factors
        torch.testing.assert_close(p.detach(), old - 0.1 * p.grad)


def test_frozen_and_unused_layers_are_left_alone():
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("used", "frozen", "unused")})
    model["frozen"].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    optimizer = KFAC(model)
    for _ in range(3):
        optimizer.zero_grad()
        model["frozen"](model["used"](torch.rand(4, 3))).square().mean().backward()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"used.weight", "used.bias"}
    assert not optimizer.state.get(model["frozen"].weight)
    assert not optimizer.state.get(model["unused"].weight)


def test_a_bias_beside_a_frozen_weight_is_preconditioned():
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    old = layer.bias.detach().clone()
    optimizer = plain_steps(layer)
    mean_loss(layer(torch.rand(4, 3))).backward()
    optimizer.step()
    damped = optimizer.state[layer.weight]["B"][0] + 0.01 * torch.eye(2)
    torch.testing.assert_close(
        layer.bias.detach(), old - torch.linalg.solve(damped, layer.bias.grad)
    )


def test_other_parameters_are_trained_by_sgd():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    def run(make: type) -> nn.Module:
        torch.manual_seed(5)
        model = nn.Sequential(nn.BatchNorm1d(3), Doubled(3, 3), nn.LayerNorm(3), nn.PReLU())
        optimizer = make(model)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.rand(4, 3)).square().mean().backward()
            optimizer.step()
        return model

    ours = run(lambda model: KFAC(model, lr=0.05, momentum=0.9, weight_decay=0.01))
    sgd = run(
        lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    )
    for one, two in zip(ours.parameters(), sgd.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_copies_and_pickles_of_the_model_record_nothing():
    model = small_net()
    optimizer = KFAC(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        x, y = batch()
        F.cross_entropy(twin(x), y).backward()
        assert not optimizer._statistics
        assert all(p.grad is None for p in model.parameters())


def test_removed_hooks_collect_nothing():
    model = small_net()
    optimizer = KFAC(model)
    train(model, optimizer, 2)
    optimizer.remove_hooks()
    a = optimizer.state[model[0].weight]["A"].clone()
    train(model, optimizer, 2)
    assert torch.equal(optimizer.state[model[0].weight]["A"], a)
    assert not model[0]._forward_hooks


def test_learning_rate_schedulers_and_closures_work():
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


def test_training_reduces_the_loss():
    for flavour in FLAVOURS:
        torch.manual_seed(0)
        model = small_net()
        x, y = batch(24)
        optimizer = KFAC(model, flavour=flavour, kl_clip=1e-3)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.1 * losses[0]


def test_half_precision_parameters_have_float32_factors():
    layer = nn.Linear(3, 2).bfloat16()
    optimizer = KFAC(layer)
    layer(torch.rand(4, 3, dtype=torch.bfloat16)).square().mean().backward()
    optimizer.step()
    assert optimizer.state[layer.weight]["A"].dtype == torch.float32
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.isfinite().all()


def test_inverse_retries_in_float64_and_refuses_what_has_none():
    matrix = torch.tensor([[[1e8, 1e8], [1e8, 1e8]]], dtype=torch.float32)
    found = inverse(matrix, 1e-2)
    assert found.dtype == torch.float32
    expected = torch.linalg.inv(matrix.double() + 1e-2 * torch.eye(2))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    with pytest.raises(torch.linalg.LinAlgError, match=r"\(1, 2, 2\) is not positive definite"):
        inverse(torch.full((1, 2, 2), torch.nan), 1.0)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lr", -0.1, "lr is -0.1; expected a number, at least 0"),
        ("lr", float("nan"), "lr is nan"),
        ("momentum", 1.0, r"momentum is 1.0; expected a number in \[0, 1\)"),
        ("damping", 0.0, "damping is 0.0; expected a positive number"),
        ("decay", 1.5, r"decay is 1.5; expected a number in \[0, 1\)"),
        ("weight_decay", -1, "weight_decay is -1; expected a number, at least 0"),
        ("flavour", "both", "flavour is 'both'; expected 'expand' or 'reduce'"),
        ("kl_clip", 0, "kl_clip is 0; expected a positive number"),
        ("update_factors_every", 0, "update_factors_every is 0; expected an int, at least 1"),
        ("update_inverses_every", 2.5, "update_inverses_every is 2.5; expected an int"),
    ],
)
def test_hyper_parameters_are_checked(name, value, words):
    with pytest.raises(ValueError, match=words):
        KFAC(nn.Linear(2, 2), **{name: value})


def test_parameters_instead_of_a_model_are_refused():
    with pytest.raises(TypeError, match=r"model is a generator; expected a torch\.nn\.Module"):
        KFAC(nn.Linear(2, 2).parameters())


def test_function_transforms_and_substituted_weights_are_not_watched():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 2))
    optimizer = KFAC(model)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    x, _ = batch()
    torch.func.grad(loss)(parameters, x)
    loss({name: 2 * p for name, p in parameters.items()}, x).backward()
    torch.func.jacrev(model)(x)
    assert not optimizer._statistics


def test_converted_layers_have_factors():
    model = tnconv.nn.convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 3)))
    optimizer = KFAC(model)
    model(torch.rand(4, 1, 5, 5)).square().mean().backward()
    optimizer.step()
    assert all("A" in optimizer.state[model[at].weight] for at in (0, 2))
