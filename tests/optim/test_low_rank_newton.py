"""Newton steps along leading eigenvectors: replayed from the dense matrix, and as an optimizer."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from tests.operators.test_low_rank import dense
from tnconv.operators.low_rank import noise_aware, relative
from tnconv.optim import LowRankNewton

pytestmark = pytest.mark.usefixtures("float64")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4))


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(6, 2, 5, generator=generator), torch.arange(6) % 4


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: nn.Module, steps: range):
    for seed in steps:
        x, targets = batch(seed)
        optimizer.zero_grad()
        loss_fn(model(x), targets).backward()
        optimizer.step()


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("damping", [0.5, relative(0.2)])
def test_ten_steps_are_those_of_the_dense_matrix(reduction: str, damping) -> None:
    model, loss_fn = network(), nn.CrossEntropyLoss(reduction=reduction)
    settings = {"lr": 0.7, "complement_lr": 0.05, "momentum": 0.6, "weight_decay": 0.1}
    optimizer = LowRankNewton(model, loss_fn, directions=3, damping=damping, **settings)
    twin, buffer = deepcopy(model), torch.zeros(len(flat(model)))
    for seed in range(10):
        x, targets = batch(seed)
        v, g = dense(twin, loss_fn, x, targets)
        values, vectors = torch.linalg.eigh(v.flatten(1) @ v.flatten(1).T)
        values, e = values.flip(0)[:3], vectors.flip(1)[:, :3]
        slopes = e.T @ g.sum(1)
        delta = 0.5 if damping == 0.5 else 0.2 * values[0]
        buffer = 0.6 * buffer + g.sum(1) - e @ slopes
        new = flat(twin) - 0.7 * e @ (slopes / (values + delta))
        new = new * (1 - 0.05 * 0.1) - 0.05 * buffer
        nn.utils.vector_to_parameters(new, twin.parameters())
        train(model, optimizer, loss_fn, range(seed, seed + 1))
        torch.testing.assert_close(flat(model), flat(twin), rtol=1e-8, atol=1e-9)


def test_groups_have_matrices_and_settings_of_their_own() -> None:
    model, loss_fn = network(), nn.CrossEntropyLoss()
    groups = [{"params": model[0].parameters(), "damping": 2.0}, {"params": model[3].parameters()}]
    optimizer = LowRankNewton(model, loss_fn, damping=0.5, directions=50, params=groups)
    optimizer.param_groups[1]["lr"] = 0.0
    optimizer.param_groups[1]["complement_lr"] = 0.0
    before = deepcopy(model)
    train(model, optimizer, loss_fn, range(1))
    v, g = dense(before, loss_fn, *batch(0))
    size = sum(p.numel() for p in model[0].parameters())
    v, g = v[:size].flatten(1), g[:size].sum(1)
    step = torch.linalg.solve(v @ v.T + 2.0 * torch.eye(size), g)
    values, vectors = torch.linalg.eigh(v @ v.T)
    null = vectors[:, values < 1e-12 * values[-1]]  # no direction: plain gradient descent
    step = step + null @ (null.T @ g) * (0.01 - 0.5)
    torch.testing.assert_close(flat(model[0]), flat(before[0]) - step, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(flat(model[3]), flat(before[3]))


@pytest.mark.parametrize("how", ["type-2", "mc"])
def test_a_run_resumes_bit_exactly(how: str) -> None:
    def run(steps: range, state=None):
        model, loss_fn = network(), nn.CrossEntropyLoss()
        generator = torch.Generator().manual_seed(3)
        damping = noise_aware(8, generator=generator) if how == "type-2" else 1.0
        subset = None if how == "type-2" else 3
        settings = {"fisher": how, "curvature_samples": subset, "generator": generator}
        optimizer = LowRankNewton(model, loss_fn, momentum=0.9, damping=damping, **settings)
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        train(model, optimizer, loss_fn, steps)
        return deepcopy(model.state_dict()), deepcopy(optimizer.state_dict())

    whole, halfway = run(range(6)), run(range(3))
    resumed = run(range(3, 6), halfway)
    for name, value in whole[0].items():
        assert torch.equal(value, resumed[0][name])


def test_the_loss_falls() -> None:
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = LowRankNewton(model, loss_fn, damping=0.1)
    x, targets = batch(0)
    before = float(loss_fn(model.eval()(x), targets).detach())
    model.train()
    for _ in range(10):
        optimizer.zero_grad()
        loss_fn(model(x), targets).backward()
        optimizer.step()
    assert float(loss_fn(model.eval()(x), targets).detach()) < 0.5 * before


def test_evaluation_is_not_seen_and_several_passes_are_refused() -> None:
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = LowRankNewton(model, loss_fn)
    x, targets = batch(0)
    with torch.no_grad():
        loss_fn(model(x), targets)
    with pytest.raises(RuntimeError, match="the loss was called 0 times"):
        optimizer.step()
    for _ in range(2):
        loss_fn(model(x), targets).backward()
    with pytest.raises(RuntimeError, match="the loss was called 2 times"):
        optimizer.step()


class TwoInputs(nn.Module):
    """A network of a positional argument and one by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        h = self.first(x)
        return self.last(torch.tanh(h if shift is None else h + shift))


def test_arguments_by_position_and_by_name_give_one_step() -> None:
    x, shift, targets = torch.rand(6, 3), torch.rand(6, 4), torch.arange(6) % 4
    found = []
    for args, kwargs in (
        ((x, shift), {}),
        ((x,), {"shift": shift}),
        ((), {"x": x, "shift": shift}),
    ):
        torch.manual_seed(0)
        model, loss_fn = TwoInputs(), nn.CrossEntropyLoss()
        optimizer = LowRankNewton(model, loss_fn)
        loss_fn(model(*args, **kwargs), targets).backward()
        optimizer.step()
        found.append(flat(model))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_pass_without_its_loss_is_refused() -> None:
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = LowRankNewton(model, loss_fn)
    x, targets = batch(0)
    loss_fn(model(x), targets).backward()
    model(x)
    with pytest.raises(RuntimeError, match="the model 2 times"):
        optimizer.step()


def test_closures_and_frozen_layers() -> None:
    model, loss_fn = network(), nn.CrossEntropyLoss()
    model[0].requires_grad_(False)
    optimizer = LowRankNewton(model, loss_fn)
    x, targets = batch(0)
    frozen = flat(model[0])

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_fn(model(x), targets)
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) > 0
    assert torch.equal(frozen, flat(model[0]))


def test_hooks_go() -> None:
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = LowRankNewton(model, loss_fn)
    optimizer.remove_hooks()
    assert not model._forward_pre_hooks and not loss_fn._forward_hooks


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0; expected"),
        ({"directions": 0}, "directions is 0; expected"),
        ({"damping": 0.0}, "damping is 0.0; expected"),
        ({"momentum": 1.0}, "momentum is 1.0; expected"),
        ({"curvature_samples": 0}, "curvature_samples is 0; expected"),
        ({"fisher": "empirical"}, "fisher is 'empirical'; expected"),
        ({"params": [nn.Parameter(torch.ones(3))]}, r"shape \(3,\) is not the model's"),
    ],
)
def test_errors(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankNewton(network(), nn.CrossEntropyLoss(), **wrong)


def test_the_loss_is_a_module() -> None:
    with pytest.raises(TypeError, match="loss_fn is a function"):
        LowRankNewton(network(), nn.functional.cross_entropy)
