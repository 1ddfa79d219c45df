"""Watching models: topologies, tied weights, what is used twice, not at all, or without a layer."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tnconv
from tests.loops import per_sample_gradients
from tests.strategies import assert_close
from tnconv.quantities import DotProducts, Gradient, PerSampleGradients, SquaredNorms, Variance

QUANTITIES = [Gradient(), DotProducts(), PerSampleGradients(), SquaredNorms(), Variance()]


pytestmark = pytest.mark.usefixtures("float64")


class Residual(nn.Module):
    """Skips, branches, one convolution called on two sizes, activations in place."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.shared = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.side = nn.Conv2d(2, 4, 1)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(8, 3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.act(self.stem(x))
        y = y + self.act(self.norm(self.shared(y)))
        y = y + self.act(self.shared(y)) * self.side(x).sigmoid()
        small = self.shared(F.max_pool2d(y, 2))
        return self.head(torch.cat([y.mean((2, 3)), small.amax((2, 3))], 1))


def data(samples=5):
    return torch.randn(samples, 2, 6, 6), torch.randint(3, (samples,))


def hooks(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    ) + sum(len(p._backward_hooks or ()) for p in model.parameters())


def assert_first_order(result, each):
    for quantity in result:
        assert result[quantity].keys() == each.keys()
    for name, gradients in each.items():
        assert_close(result[Gradient][name], gradients.sum(0), 1e-10)
        assert_close(result[PerSampleGradients][name], gradients, 1e-10)
        flat = gradients.reshape(len(gradients), -1)
        assert_close(result[DotProducts][name], flat @ flat.T, 1e-10)
        assert_close(result[SquaredNorms][name], flat.square().sum(1), 1e-10)
        assert_close(result[Variance][name], gradients.var(0, unbiased=False), 1e-10)


def check(model, inputs, targets, loss_fn=F.cross_entropy):
    """In both forms, and nothing is left behind."""
    each = per_sample_gradients(model, loss_fn, inputs, targets, 1 / len(inputs))
    before = hooks(model)
    assert_first_order(tnconv.compute(model, loss_fn, inputs, targets, QUANTITIES), each)
    assert all(p.grad is None for p in model.parameters())
    with tnconv.observe(model, QUANTITIES) as observation:
        loss_fn(model(inputs), targets).backward()
    assert_first_order(observation.result(), each)
    assert hooks(model) == before
    model.zero_grad()


def test_residual_network_with_shared_weights():
    check(Residual().eval(), *data())


def test_frozen_parameters():
    model = Residual().eval()
    model.stem.weight.requires_grad_(False)
    model.norm.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    check(model, *data())


def test_weights_tied_between_modules():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 6))
    model[3].weight = model[0].weight
    words = torch.randint(6, (5, 3))
    check(model, words, words, lambda y, t: F.cross_entropy(y.flatten(0, 1), t.flatten()))


def test_module_called_in_a_loop():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.step, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            y = x.flatten(1)[:, :6]
            for _ in range(4):
                y = torch.tanh(self.step(y))
            return self.head(y)

    check(Loop(), *data())


def test_in_place_activation_after_a_linear_layer_with_positions():
    """Its output is a view, whose graph moves when it is changed."""
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 3))
    check(model, *data())


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_gradient_accumulation(chunks):
    model, (x, y) = Residual().eval(), data()
    with tnconv.observe(model, QUANTITIES) as observation:
        for inputs, targets in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
            F.cross_entropy(model(inputs), targets, reduction="sum").backward()
    result = observation.result()
    assert result.samples == 5
    assert_first_order(result, per_sample_gradients(model, F.cross_entropy, x, y))


def test_results_of_a_training_loop_are_those_of_each_step():
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tnconv.observe(model, QUANTITIES) as observation:
        for _ in range(3):
            x, y = data()
            optimizer.zero_grad()
            each = per_sample_gradients(model[1], F.cross_entropy, x.flatten(1), y, 1 / 5)
            F.cross_entropy(model(x), y).backward()
            result = observation.result()
            expected = {f"1.{name}": grads for name, grads in each.items()}
            assert_first_order(result, expected)
            assert_close(result[Gradient]["1.weight"], model[1].weight.grad)
            optimizer.step()


def test_batch_statistics_are_refused_by_name():
    model, (x, y) = Residual(), data()
    before = hooks(model)
    with pytest.raises(NotImplementedError, match="layer 'norm' normalises by the batch"):
        tnconv.compute(model, F.cross_entropy, x, y, [SquaredNorms()])
    assert hooks(model) == before
    result = tnconv.compute(model, F.cross_entropy, x, y, [Gradient()])
    F.cross_entropy(model(x), y).backward()
    for name, value in result[Gradient].items():
        assert_close(value, model.get_parameter(name).grad, 1e-10)


def test_exceptions_leave_no_hooks():
    model, (x, y) = Residual().eval(), data()

    def broken(output, targets):
        raise ArithmeticError("no loss")

    with pytest.raises(ArithmeticError):
        tnconv.compute(model, broken, x, y, QUANTITIES)
    assert hooks(model) == 0
    with pytest.raises(KeyError), tnconv.observe(model, QUANTITIES):
        model(x)
        raise KeyError
    assert hooks(model) == 0


def test_two_threads_on_two_models():
    models = [Residual().eval() for _ in range(2)]
    batches = [data(), data()]
    found = [[], []]

    def work(at):
        for _ in range(5):
            inputs, targets = batches[at]
            found[at].append(
                tnconv.compute(models[at], F.cross_entropy, inputs, targets, QUANTITIES)
            )

    threads = [threading.Thread(target=work, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model, batch, results in zip(models, batches, found, strict=True):
        each = per_sample_gradients(model, F.cross_entropy, *batch, 1 / 5)
        for result in results:
            assert_first_order(result, each)
        assert len(results) == 5
