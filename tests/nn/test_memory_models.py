"""Models whose layers were swapped: what they share, what they compute, what they store."""

import copy

import pytest
import torch
from torch import nn

from tests.nn.memory_cases import D, close, stored
from tnconv.nn import memory, save_memory


class Own(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, **D)
        self.norm, self.relu = nn.BatchNorm2d(4, **D), nn.ReLU(inplace=True)
        self.second, self.last = nn.Conv2d(4, 4, 3, padding=1, **D), Own(4, 2, 1, **D)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.relu(x + self.norm(self.second(self.relu(x)))))


@pytest.mark.parametrize("training", [False, True])
def test_save_memory(training):
    model = Residual().train(training)
    twin, calls = copy.deepcopy(model), []
    model.first.register_forward_hook(lambda *_: calls.append(1))
    kinds = [type(module) for module in model.modules()]
    with pytest.warns(UserWarning, match="left alone: .*last"):
        saving = save_memory(model)
    assert [type(module) for module in model.modules()] == kinds and not calls
    assert type(saving.first) is memory.Conv2d and type(saving.last) is Own
    x = torch.randn(2, 3, 6, 6, **D, requires_grad=True)
    (y, most), (z, size) = (stored(lambda m=m: m(x), m) for m in (twin, saving))
    assert calls == [1] and size <= most
    close(z, y, 1e-12)
    v = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, *twin.parameters()), v)
    close(torch.autograd.grad(z, (x, *saving.parameters()), v), expected, 1e-10)
    again = copy.deepcopy(saving)
    close(again.state_dict(), twin.state_dict(), 1e-12)
    close(again.eval()(x), twin.eval()(x), 1e-12)


def test_bits_where_nobody_stores_the_output():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64).requires_grad_(False))
    x = torch.randn(32, 64)
    saving = save_memory(model)
    assert stored(lambda: saving(x), saving, nn.ParameterList([nn.Parameter(x)]))[1] == 32 * 64 // 8
    assert save_memory(nn.Hardtanh()).plan == "torch"  # its caller may hold the input


@pytest.mark.parametrize("last", [nn.LeakyReLU(0.1, inplace=True), nn.Dropout(0.3, inplace=True)])
@pytest.mark.parametrize("first", [nn.ELU(), nn.Softplus()])
def test_no_output_is_stored_that_a_reader_overwrites(first, last):
    saving = save_memory(nn.Sequential(first, last, nn.Linear(4, 4)).double())
    x = torch.randn(3, 4, **D, requires_grad=True)
    assert saving[0].plan == "torch"
    torch.manual_seed(1)
    expected = torch.autograd.grad(saving[2](last(first(x))).sum(), x)
    torch.manual_seed(1)
    close(torch.autograd.grad(saving(x).sum(), x), expected, 1e-12)


def test_linear_output_can_be_changed_in_place():
    layer = nn.Linear(3, 5, **D)
    x = torch.randn(2, 4, 6, 3, **D, requires_grad=True)
    y, z = (module(x).relu_() for module in (layer, save_memory(layer)))
    close(torch.autograd.grad(z.sum(), x), torch.autograd.grad(y.sum(), x), 1e-12)
