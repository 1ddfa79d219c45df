"""Layers without diagrams and parameters without layers: where samples meet what they share."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import tnconv
from tests.loops import per_sample_gradients
from tests.models.test_capture import QUANTITIES, Residual, assert_first_order, hooks
from tests.models.test_second_order import diagonals
from tests.strategies import assert_close
from tnconv.quantities import GGNDiagonal, Gradient, SquaredNorms, Variance

pytestmark = pytest.mark.usefixtures("float64")


class Attention(nn.Module):
    """Layers that give tuples, with parameters that other modules use."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Functional(nn.Module):
    """A layer by itself and once more by a function; bare parameters; a layer never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.shift, self.gain = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x + self.shift).tanh()
        y = self.gain * F.linear(y, self.layer.weight) + self.norm(y)
        return F.linear(y.mean(1), self.head.weight, self.head.bias)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Data(nn.Module):
    """Control flow by values, which no map over samples can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.PReLU(3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x.mean(1), self.first.weight)
        return self.second(y) if float(y.detach().abs().sum()) >= 0 else y


def normalised() -> nn.Module:
    layer = parametrizations.weight_norm(nn.Linear(4, 3))
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), layer, nn.Flatten(), nn.Linear(15, 3))


def hooked(change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    layer = change(nn.Linear(4, 3)).eval()
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), layer, nn.Flatten(), nn.Linear(15, 3))


def pruned(layer: nn.Module) -> nn.Module:
    return prune.random_unstructured(layer, "weight", 0.5)


MODELS = {
    "prelu": lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU(5), nn.Flatten()),
    "bilinear": lambda: Twice(),
    "attention": Attention,
    "functional": Functional,
    "recurrent": Recurrent,
    "control flow": Data,
    "weight norm": normalised,
    "weight norm by hooks": lambda: hooked(nn.utils.weight_norm),
    "spectral norm by hooks": lambda: hooked(nn.utils.spectral_norm),
    "pruned": lambda: hooked(pruned),
}


class Unknown(nn.Bilinear):
    """A layer of two inputs without a diagram."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return super().forward(first, second)


class Twice(nn.Module):
    """A network with one."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.head = Unknown(4, 4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.both(x[:, 0].sin(), x[:, 1]))


def batch(samples: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 5, 4), torch.randint(3, (samples,))


def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.reshape(len(output), -1), targets, reduction="sum")


@pytest.mark.parametrize("samples", [1, 6])
@pytest.mark.parametrize("case", MODELS)
def test_first_order_quantities(case: str, samples: int) -> None:
    model, (x, y) = MODELS[case](), batch(samples)
    before = hooks(model)
    each = per_sample_gradients(model, loss_fn, x, y)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        assert_first_order(tnconv.compute(model, loss_fn, x, y, QUANTITIES), each)
        assert all(p.grad is None for p in model.parameters())
        with tnconv.observe(model, QUANTITIES) as observation:
            loss_fn(model(x), y).backward()
        assert_first_order(observation.result(), each)
    slow = ["'both.weight'"] if case == "bilinear" and samples > 1 else []
    assert [str(each.message).split(" are ")[0] for each in caught] == [
        f"the gradients of {name}" for name in slow
    ]
    assert hooks(model) == before


@pytest.mark.filterwarnings("ignore:.*one sample after another")
@pytest.mark.parametrize("case", MODELS)
def test_micro_batches(case: str) -> None:
    model, (x, y) = MODELS[case](), batch()
    each = per_sample_gradients(model, loss_fn, x, y)
    with tnconv.observe(model, QUANTITIES) as observation:
        for inputs, targets in zip(x.split([2, 1, 3]), y.split([2, 1, 3]), strict=True):
            loss_fn(model(inputs), targets).backward()
    assert_first_order(observation.result(), each)


@pytest.mark.parametrize("case", MODELS)
def test_gradients_alone_need_no_fallback(case: str) -> None:
    model, (x, y) = MODELS[case](), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = tnconv.compute(model, loss_fn, x, y, [Gradient()])
    loss_fn(model(x), y).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(result[Gradient][name], parameter.grad, 1e-10)
        assert (name in result[Gradient]) == (parameter.grad is not None)


@pytest.mark.filterwarnings("ignore:.*one sample after another")
@pytest.mark.parametrize("case", MODELS)
def test_quantities_beyond_the_losss_gradient(case: str) -> None:
    model, (x, y), loss = MODELS[case](), batch(), nn.CrossEntropyLoss()
    before = hooks(model)
    y = model(x).detach().flatten(1).argmax(1)
    head = model if model(x).dim() == 2 else nn.Sequential(model, nn.Flatten())
    result = tnconv.compute(head, loss, x, y, [GGNDiagonal()])[GGNDiagonal]
    for name, expected in diagonals(head, loss, x, y).items():
        if name in result:
            assert_close(result[name], expected.sum(0), 1e-9)
        else:
            assert not expected.any()
    assert hooks(model) == before


def test_random_layers_run_once() -> None:
    """What is computed belongs to the pass that the loss was computed with."""
    model, (x, y) = nn.Sequential(nn.Linear(4, 3), Noisy(), nn.Flatten()), batch()
    torch.manual_seed(1)
    output = model(x)
    each = torch.stack(
        [
            torch.autograd.grad(
                loss_fn(output[n : n + 1], y[n : n + 1]), model[1].weight, retain_graph=True
            )[0]
            for n in range(len(x))
        ]
    )
    torch.manual_seed(1)
    result = tnconv.compute(model, loss_fn, x, y, [SquaredNorms()])
    assert_close(result[SquaredNorms]["1.weight"], each.square().sum(1), 1e-10)
    assert hooks(model) == 0


def test_embeddings_scaled_by_counts_mix_samples() -> None:
    model = nn.Sequential(nn.Embedding(4, 3, scale_grad_by_freq=True), nn.Flatten())
    x, y = torch.tensor([[0, 0], [1, 0]]), torch.tensor([0, 1])
    with pytest.raises(NotImplementedError, match="layer '0' divides gradients by counts"):
        tnconv.compute(model, loss_fn, x, y, [SquaredNorms()])
    gradient = tnconv.compute(model, loss_fn, x, y, [Gradient()])[Gradient]["0.weight"]
    loss_fn(model(x), y).backward()
    assert_close(gradient, model[0].weight.grad, 1e-12)


class Noisy(nn.PReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


def test_samples_keep_their_order_and_places() -> None:
    """One backward pass for all, and a layer that not every pass uses."""

    class Sometimes(Residual):
        def forward(self, x: Tensor) -> Tensor:
            skipped = super().forward(x)
            return skipped if len(x) == 2 else skipped + self.unused(skipped.tanh())

    model, x, y = Sometimes().eval(), torch.randn(6, 2, 6, 6), torch.randint(3, (6,))
    parts = list(zip(x.split([2, 1, 3]), y.split([2, 1, 3]), strict=True))
    each: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for inputs, targets in parts:
        found = [model(inputs)[n] for n in range(len(inputs))]
        for output, target in zip(found, targets, strict=True):
            grads = torch.autograd.grad(
                F.cross_entropy(output, target), list(model.parameters()),
                retain_graph=True, materialize_grads=True,
            )  # fmt: skip
            for rows, grad in zip(each.values(), grads, strict=True):
                rows.append(grad)
    with tnconv.observe(model, QUANTITIES) as observation:
        losses = [loss_fn(model(inputs), targets) for inputs, targets in parts]
        torch.stack(losses).sum().backward()
    expected = {name: torch.stack(rows) for name, rows in each.items()}
    result = observation.result()
    assert_first_order(result, expected)
    total = sum(g.flatten(1).square().sum(1) for g in expected.values())
    assert_close(result.total(SquaredNorms), total, 1e-10)
    assert result[Variance].keys() == expected.keys()
