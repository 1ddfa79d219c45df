"""Memory-saving layers: torch's values and gradients, and never more stored than torch stores."""

import itertools

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from tests.nn.memory_cases import D, close, each_case, pair, stored
from tnconv.nn import save_memory


@each_case
def test_values_gradients_and_bytes(layer, shape, reader):
    theirs, saving = pair(layer, reader)
    for needs in itertools.product((False, True), repeat=1 + len([*layer.parameters()])):
        x = torch.randn(shape, **D, requires_grad=needs[0])
        found = []
        for module in (theirs, saving):
            for p, need in zip(module.parameters(), needs[1:], strict=True):
                p.requires_grad_(need)
            y, size = stored(lambda module=module, x=x: module(x), module)
            wanted = [t for t in (x, *module.parameters()) if t.requires_grad]
            assert y.requires_grad == bool(wanted)
            v = torch.linspace(-1, 2, y.numel(), **D).view(y.shape)
            found.append((y, torch.autograd.grad(y, wanted, v) if wanted else (), size))
        (y, ds, most), (z, es, size) = found
        close(z, y, 1e-12)
        close(es, ds, 1e-10)
        assert size <= most
        close(saving.state_dict(), theirs.state_dict(), 1e-12)


@each_case
def test_differentiable_twice(layer, shape, reader):
    _, saving = pair(layer, reader)
    names = [name for name, _ in saving.named_parameters()]

    def call(x, *parameters):
        torch.manual_seed(1)
        return torch.func.functional_call(saving, dict(zip(names, parameters, strict=True)), (x,))

    arguments = (torch.randn(shape, **D, requires_grad=True), *saving.parameters())
    assert gradcheck(call, arguments, fast_mode=True)
    if isinstance(layer, nn.Hardsigmoid) and saving.plan == "torch":
        return  # torch's own has no second derivative
    assert gradgradcheck(call, arguments, fast_mode=True)


def test_frozen_layers_store_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval().requires_grad_(False)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    saving = save_memory(model)
    assert stored(lambda: saving(x), saving)[1] == 0 < stored(lambda: model(x), model)[1]


@pytest.mark.parametrize("tracks", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("momentum", [None, 0.1])
@pytest.mark.parametrize("frozen", [False, True])
def test_running_statistics(momentum, affine, tracks, frozen):
    theirs, saving = pair(nn.BatchNorm2d(3, 1e-5, momentum, affine, tracks, **D))
    for mode in (True, True, False, True, False):
        x = torch.randn(4, 3, 5, 2, **D, requires_grad=not frozen)
        for module in (theirs, saving):
            module.train(mode)
            if affine:
                module.weight.requires_grad_(not frozen)
        close(saving(x), theirs(x), 1e-12)
        close(saving.state_dict(), theirs.state_dict(), 1e-12)


@pytest.mark.parametrize("kind", [nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.Dropout])
@pytest.mark.parametrize("reader", [None, False, True])
def test_in_place(kind, reader):
    theirs, saving = pair(kind(inplace=True), reader)
    x, results = torch.randn(4, 5, **D, requires_grad=True), []
    for module in (theirs, saving):
        torch.manual_seed(1)
        held = x * 2
        y = module(held)
        assert y.data_ptr() == held.data_ptr()
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    close(results[1], results[0], 1e-12)
