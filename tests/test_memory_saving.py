"""Memory-saving layers: torch's values and gradients, and never more stored than torch stores."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from tnconv.nn import memory, save_memory
from tnconv.nn.memory_activations import Pointwise

torch.manual_seed(0)
D = {"dtype": torch.float64}
LAYERS = [
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, **D), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), padding="same", groups=2, **D), (2, 4, 7, 6)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", **D), (2, 4, 7, 6)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", **D), (4, 7, 6)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate", **D), (2, 4, 7, 6)),
    (nn.Conv2d(4, 6, 3, dilation=2, bias=False, **D), (2, 4, 7, 6)),
    (nn.Conv3d(2, 3, 2, **D), (2, 2, 4, 3, 4)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, **D), (2, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=2, **D), (2, 4, 5, 4)),
    (nn.ConvTranspose3d(2, 3, 2, **D), (2, 2, 3, 2, 3)),
    (nn.Linear(5, 3, **D), (2, 4, 5)),
    (nn.BatchNorm1d(4, affine=False, momentum=None, **D), (3, 4)),
    (nn.BatchNorm2d(4, **D), (3, 4, 5, 5)),
    (nn.BatchNorm2d(4, **D).eval(), (3, 4, 5, 5)),
    (nn.BatchNorm2d(4, track_running_stats=False, **D).eval(), (3, 4, 5, 5)),
    (nn.BatchNorm3d(4, **D).eval(), (3, 4, 2, 3, 2)),
    (nn.LayerNorm(5, **D), (3, 4, 5)),
    (nn.GroupNorm(2, 4, **D), (3, 4, 5)),
    (nn.InstanceNorm1d(4, **D), (3, 4, 5)),
    (nn.InstanceNorm2d(4, affine=True, track_running_stats=True, **D).eval(), (3, 4, 5, 5)),
    (nn.InstanceNorm3d(4, affine=True, **D), (3, 4, 2, 3, 2)),
    *((kind(), (3, 7)) for kind in (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardsigmoid)),
    *((kind(), (3, 7)) for kind in (nn.Hardshrink, nn.Softshrink, nn.LeakyReLU, nn.ELU)),
    *((kind(), (3, 7)) for kind in (nn.CELU, nn.SELU, nn.Softplus)),
    (nn.Threshold(0.1, 0.3), (3, 7)),
    (nn.MaxPool1d(2), (2, 3, 8)),
    (nn.MaxPool2d(3, 2, 1), (2, 3, 8, 8)),
    (nn.MaxPool3d(2), (2, 3, 4, 4, 4)),
    (nn.AvgPool1d(2), (2, 3, 8)),
    (nn.AvgPool2d(3, 2, 1), (2, 3, 8, 8)),
    (nn.AvgPool3d(2), (2, 3, 4, 4, 4)),
    (nn.AdaptiveAvgPool1d(3), (2, 3, 8)),
    (nn.AdaptiveAvgPool2d((2, None)), (2, 3, 8, 8)),
    (nn.AdaptiveAvgPool3d(2), (2, 3, 4, 4, 4)),
    (nn.AdaptiveMaxPool1d(3), (2, 3, 8)),
    (nn.AdaptiveMaxPool2d(3), (2, 3, 8, 8)),
    (nn.AdaptiveMaxPool3d(2), (2, 3, 4, 4, 4)),
    (nn.Dropout(0.3), (3, 7)),
]
# with whether the reader of an activation stores its input; None if it is not known who reads
CASES = [
    (layer, shape, reader)
    for layer, shape in LAYERS
    for reader in (None, False, True)
    if reader is None or issubclass(getattr(memory, type(layer).__name__), Pointwise)
]
each_case = pytest.mark.parametrize(("layer", "shape", "reader"), CASES, ids=str)


def stored(call, *owners):
    """What a call gives, and the bytes it stores beyond the parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for m in owners for t in (*m.parameters(), *m.buffers())}
    kept = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        torch.manual_seed(1)
        y = call()
    return y, sum(size for size, _ in kept.values())


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def pair(layer, reader=None):
    """A copy of the layer, and the one that saves memory, on parameters of its own."""
    theirs = copy.deepcopy(layer)
    saving = save_memory(copy.deepcopy(layer))
    assert type(saving) is getattr(memory, type(layer).__name__)
    if reader is not None:
        saving.readers = [memory.Linear(2, 2).requires_grad_(reader)]
        saving.input_held = False
    return theirs, saving


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


@pytest.mark.parametrize(("layer", "shape", "reader"), CASES[::5], ids=str)
def test_compiles(layer, shape, reader):
    _, saving = pair(copy.deepcopy(layer).eval(), reader)
    x = torch.randn(shape, **D, requires_grad=True)
    torch._dynamo.reset()
    y = torch.compile(saving, fullgraph=True, backend="aot_eager")(x)
    close(y, saving(x), 1e-12)
    v = torch.randn_like(y)
    (dx,), (ex,) = (torch.autograd.grad(result, x, v) for result in (saving(x), y))
    close(ex, dx, 1e-10)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3), nn.Linear(6, 4)]
)
def test_autocast(layer):
    theirs, saving = pair(layer)
    x = torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y, z = theirs(x), saving(x)
    assert z.dtype == y.dtype == torch.bfloat16
    close(z, y, 0)
    z.float().square().sum().backward()
    y.float().square().sum().backward()
    for p, q in zip(theirs.parameters(), saving.parameters(), strict=True):
        assert q.grad.dtype == torch.float32
        torch.testing.assert_close(q.grad, p.grad, rtol=2e-2, atol=2e-2 * float(p.grad.abs().max()))


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


def test_bits_where_nobody_stores_the_output():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64).requires_grad_(False))
    x = torch.randn(32, 64)
    saving = save_memory(model)
    assert stored(lambda: saving(x), saving, nn.ParameterList([nn.Parameter(x)]))[1] == 32 * 64 // 8
    assert save_memory(nn.Hardtanh()).plan == "torch"  # its caller may hold the input
