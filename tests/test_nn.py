"""The modules are torch's: same arguments, parameters, values, gradients and behaviour."""

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tnconv
from tests.strategies import Case, assert_close, geometries
from tnconv import nn as ours

MODES = ("zeros", "reflect", "replicate", "circular")
TORCHS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVS = (ours.Conv1d, ours.Conv2d, ours.Conv3d)
TORCH_TRANSPOSES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TRANSPOSES = (ours.ConvTranspose1d, ours.ConvTranspose2d, ours.ConvTranspose3d)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def assert_same_module(new: nn.Module, old: nn.Module, x: Tensor, **kwargs: Any) -> None:
    """Equal values and equal gradients for the input and all parameters."""
    new.load_state_dict(old.state_dict())
    values = [x, *(parameter.detach() for parameter in old.parameters())]
    y, pull = torch.func.vjp(partial(call, old, **kwargs), *values)
    actual, pull_new = torch.func.vjp(partial(call, new, **kwargs), *values)
    assert_close(actual, y, 1e-10)
    v = random(*y.shape, seed=7)
    for grad, expected in zip(pull_new(v), pull(v), strict=True):
        assert_close(grad, expected, 1e-10)


def call(module: nn.Module, x: Tensor, *values: Tensor, **kwargs: Any) -> Tensor:
    """The module at these values of its parameters."""
    names = [name for name, _ in module.named_parameters()]
    given = dict(zip(names, values, strict=True))
    return torch.func.functional_call(module, given, (x,), kwargs)


def arguments(case: Case, bias: bool = True) -> dict[str, Any]:
    """A convolution of torch's; it knows no pairs of paddings."""
    given = case.kwargs
    if isinstance(case.padding, tuple) and isinstance(case.padding[0], tuple):
        given["padding"] = tuple(max(pair) for pair in case.padding)
    channels = case.input_shape[-case.dims - 1]
    sizes = {"in_channels": channels, "out_channels": case.weight_shape[0]}
    return given | sizes | {"kernel_size": case.kernel_size, "bias": bias, "dtype": torch.float64}


@given(case=geometries(unbatched=True), bias=st.booleans())
def test_convolutions(case: Case, bias: bool) -> None:
    given, x = arguments(case, bias), random(*case.input_shape)
    old = TORCHS[case.dims - 1](**given)
    assert_same_module(CONVS[case.dims - 1](**given), old, x)
    assert_same_module(ours.ConvNd(case.dims, **given), old, x)


@given(case=geometries(unbatched=True, empty=False), mode=st.sampled_from(MODES[1:]))
def test_padding_modes(case: Case, mode: str) -> None:
    """Asymmetric 'same' among them; torch reflects, and wraps around, less than the whole input."""
    given, x = arguments(case) | {"padding_mode": mode}, random(*case.input_shape)
    old = TORCHS[case.dims - 1](**given)
    try:
        old(x)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            CONVS[case.dims - 1](**given)(x)
        return
    assert_same_module(CONVS[case.dims - 1](**given), old, x)
    assert_same_module(ours.ConvNd(case.dims, **given), old, x)


@pytest.mark.parametrize("mode", MODES)
def test_asymmetric_same(mode: str) -> None:
    given = {"padding": "same", "dilation": (1, 3), "padding_mode": mode, "dtype": torch.float64}
    old, new = nn.Conv2d(2, 3, (4, 2), **given), ours.Conv2d(2, 3, (4, 2), **given)
    assert_same_module(new, old, random(2, 2, 7, 6))
    assert new(random(2, 2, 7, 6)).shape == (2, 3, 7, 6)


@given(case=geometries(unbatched=True), bias=st.booleans(), data=st.data())
def test_transposed_convolutions(case: Case, bias: bool, data: Any) -> None:
    given = arguments(case, bias)
    pads = [max(pair) for pair in case.pads]
    spans = [d * (k - 1) for d, k in zip(case.dilations, case.kernel_size, strict=True)]
    given["padding"] = tuple(min(p, s // 2) for p, s in zip(pads, spans, strict=True))
    extras = [max(s, d) for s, d in zip(case.strides, case.dilations, strict=True)]
    given["output_padding"] = tuple(data.draw(st.integers(0, most - 1)) for most in extras)
    x, old = random(*case.input_shape), TORCH_TRANSPOSES[case.dims - 1](**given)
    assert_same_module(TRANSPOSES[case.dims - 1](**given), old, x)
    assert_same_module(ours.ConvTransposeNd(case.dims, **given), old, x)
    sizes = [
        data.draw(st.integers(size - extra, size - extra + stride - 1))
        for size, extra, stride in zip(
            old(x).shape[-case.dims :], given["output_padding"], case.strides, strict=True
        )
    ]
    assert_same_module(TRANSPOSES[case.dims - 1](**given), old, x, output_size=sizes)


def test_output_size_out_of_reach() -> None:
    layer = ours.ConvTranspose2d(2, 3, 3, stride=2)
    assert layer(torch.rand(1, 2, 4, 4), [1, 3, 9, 10]).shape == (1, 3, 9, 10)
    with pytest.raises(ValueError, match=r"valid sizes range from \[9, 9\] to \[10, 10\]"):
        layer(torch.rand(1, 2, 4, 4), output_size=(9, 11))
    with pytest.raises(ValueError, match="output_size must have 2 or 4 elements"):
        layer(torch.rand(1, 2, 4, 4), output_size=(9,))


@given(case=geometries(max_dims=2, min_dims=2, groups=False, unbatched=True, empty=False))
def test_unfold_and_fold(case: Case) -> None:
    given = arguments(case)
    settings = {name: given[name] for name in ("kernel_size", "dilation", "padding", "stride")}
    settings["padding"] = 0 if isinstance(case.padding, str) else settings["padding"]
    if isinstance(case.padding, str):  # torch folds and unfolds with numbers only
        spans = zip(case.kernel_size, case.input_shape[-2:], case.dilations, strict=True)
        settings["kernel_size"] = tuple(min(k, (i - 1) // d + 1) for k, i, d in spans)
    x, old = random(*case.input_shape), nn.Unfold(**settings)
    assert_same_module(ours.UnfoldNd(**settings), old, x)
    size = case.input_shape[-2:]
    assert_same_module(ours.FoldNd(size, **settings), nn.Fold(size, **settings), old(x))


def test_unfold_and_fold_in_three_dimensions() -> None:
    case = Case((2, 3, 5, 4, 6), (1, 3, 2, 3, 2), (2, 1, 1), (1, 0, 1), (1, 1, 2))
    settings = {"kernel_size": case.kernel_size, **case.unfold_kwargs}
    x = random(*case.input_shape)
    unfold, fold = ours.UnfoldNd(**settings), ours.FoldNd(case.input_shape[2:], **settings)
    patches = case.patches(x).flatten(1, 5).flatten(2)
    assert_close(unfold(x), patches, 1e-12)
    assert_close(unfold(x[0]), patches[0], 1e-12)
    v = random(*patches.shape, seed=1)
    assert_close((fold(v) * x).sum(), (v * patches).sum(), 1e-12)
    assert_close(fold(v[0]), fold(v)[0], 1e-12)


def test_ints_and_tuples_to_unfold_and_fold() -> None:
    x = random(2, 3, 6, 6)
    expected = F.unfold(x, 3, padding=1)
    assert_close(ours.UnfoldNd(3, padding=1)(x), expected, 1e-12)
    assert_close(ours.UnfoldNd(3, padding=(1, 1))(x[0]), expected[0], 1e-12)
    assert_close(ours.FoldNd(6, 3, padding=1)(expected), F.fold(expected, 6, 3, padding=1), 1e-12)
    line = ours.FoldNd((6,), 3)(ours.UnfoldNd(3)(x[:, :, 0]))
    assert_close(line, x[:, :, 0] * torch.tensor([1, 2, 3, 3, 2, 1]), 1e-12)


def test_four_dimensions_are_the_diagram() -> None:
    shape = (2, 4, 3, 4, 3, 4)
    layer = ours.ConvNd(
        4, 4, 6, (2, 1, 2, 3), (1, 2, 1, 1), (1, 0, 0, 1), groups=2, dtype=torch.float64
    )
    settings = ((1, 2, 1, 1), (1, 0, 0, 1), 1, 2)
    network = tnconv.diagrams.conv(shape, tuple(layer.weight.shape), *settings)
    x, weight, bias = random(*shape), layer.weight.detach(), layer.bias.detach()
    expected = network.reference(x=x, weight=weight) + bias[:, None, None, None, None]
    assert_close(layer(x).detach(), expected, 1e-12)
    assert_close(layer(x[0]).detach(), expected[0], 1e-12)


def test_four_transposed_dimensions_are_the_adjoint() -> None:
    settings = (2, 3, (2, 1, 2, 2), (1, 2, 1, 1))
    up = ours.ConvTransposeNd(4, *settings, bias=False, dtype=torch.float64)
    down = ours.ConvNd(4, 3, 2, *settings[2:], bias=False, dtype=torch.float64)
    down.load_state_dict(up.state_dict())
    x = random(1, 2, 2, 3, 2, 3)
    v = random(*up(x).shape, seed=1)
    assert_close((up(x) * v).sum(), (x * down(v)).sum(), 1e-12)


def test_no_spatial_dimensions_are_a_linear_layer() -> None:
    layer = ours.ConvNd(0, 3, 4, ())
    x = torch.rand(5, 3)
    assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-6)


MAKE: dict[str, tuple[Callable[[Any], nn.Module], Callable[[], nn.Module], Tensor]] = {
    "Conv1d": (
        lambda at: at.Conv1d(4, 6, 3, stride=2, padding=1, groups=2, dtype=torch.float64),
        lambda: ours.ConvNd(1, 4, 6, 3, stride=2, padding=1, groups=2, dtype=torch.float64),
        random(2, 4, 7),
    ),
    "Conv2d": (
        lambda at: at.Conv2d(2, 3, (3, 2), padding="same", dtype=torch.float64),
        lambda: ours.ConvNd(2, 2, 3, (3, 2), padding="same", dtype=torch.float64),
        random(2, 2, 4, 5),
    ),
    "Conv2d_circular": (
        lambda at: at.Conv2d(2, 2, 3, padding=1, padding_mode="circular", dtype=torch.float64),
        lambda: ours.ConvNd(2, 2, 2, 3, 1, 1, padding_mode="circular", dtype=torch.float64),
        random(2, 2, 4, 3),
    ),
    "Conv3d": (
        lambda at: at.Conv3d(2, 2, 2, dilation=2, bias=False, dtype=torch.float64),
        lambda: ours.ConvNd(3, 2, 2, 2, dilation=2, bias=False, dtype=torch.float64),
        random(2, 2, 3, 4, 3),
    ),
    "ConvTranspose2d": (
        lambda at: at.ConvTranspose2d(2, 4, 3, 2, 1, 1, groups=2, dtype=torch.float64),
        lambda: ours.ConvTransposeNd(2, 2, 4, 3, 2, 1, 1, groups=2, dtype=torch.float64),
        random(2, 2, 3, 3),
    ),
}
"""A module of torch's or of ours, the same for any number of dimensions, and an input."""


@pytest.fixture(params=sorted(MAKE))
def trio(request: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """Ours and torch's with the same parameters, and an input."""
    make, _, x = MAKE[request.param]
    torch.manual_seed(0)
    old, new = make(nn), make(ours)
    new.load_state_dict(old.state_dict())
    return new, old, x


@pytest.mark.parametrize("name", sorted(MAKE))
def test_initialisation_and_words_are_torchs(name: str) -> None:
    make, make_nd, _ = MAKE[name]
    modules = []
    for build in (lambda: make(nn), lambda: make(ours), make_nd):
        torch.manual_seed(3)
        modules.append(build())
    old, new, nd = modules
    assert repr(new) == repr(old)
    assert isinstance(new, type(old))
    assert nd.extra_repr() == old.extra_repr()
    for module in (new, nd):
        for key, value in old.state_dict().items():
            assert torch.equal(module.state_dict()[key], value)


@pytest.mark.parametrize("settings", [(3,), ((2, 3), 2, (1, 0), (1, 2))])
def test_words_of_unfold_and_fold(settings: tuple[Any, ...]) -> None:
    assert ours.UnfoldNd(*settings).extra_repr() == nn.Unfold(*settings).extra_repr()
    assert ours.FoldNd(8, *settings).extra_repr() == nn.Fold(8, *settings).extra_repr()


def test_differentiable_twice(trio: Any) -> None:
    module, _, x = trio
    given = [t.detach().clone().requires_grad_() for t in (x, *module.parameters())]
    assert torch.autograd.gradcheck(partial(call, module), given, fast_mode=True)
    assert torch.autograd.gradgradcheck(partial(call, module), given, fast_mode=True)


def test_function_transforms(trio: Any) -> None:
    new, old, x = trio
    given = (x, *(p.detach() for p in old.parameters()))
    jacobians = [torch.func.jacrev(partial(call, m), tuple(range(len(given)))) for m in (new, old)]
    for actual, expected in zip(*(jacobian(*given) for jacobian in jacobians), strict=True):
        assert_close(actual, expected, 1e-10)

    def grads(module: nn.Module, one: Tensor) -> tuple[Tensor, ...]:
        loss = lambda *values: call(module, one, *values).square().sum()  # noqa: E731
        return torch.func.grad(loss, tuple(range(len(given) - 1)))(*given[1:])

    per_sample = [torch.func.vmap(partial(grads, m))(x) for m in (new, old)]
    for actual, expected in zip(*per_sample, strict=True):
        assert_close(actual, expected, 1e-10)
    ensemble = tuple(torch.stack([value, -value, 2 * value]) for value in given[1:])
    values = [torch.func.vmap(partial(call, m, x))(*ensemble) for m in (new, old)]
    assert_close(*values, 1e-10)


def test_torch_compile_in_one_graph(trio: Any) -> None:
    new, old, x = trio
    torch._dynamo.reset()
    compiled = torch.compile(new, fullgraph=True, backend="aot_eager")
    expected = old(x)
    assert_close(compiled(x).detach(), expected.detach(), 1e-10)
    actual = torch.autograd.grad(compiled(x).square().sum(), new.parameters())
    wanted = torch.autograd.grad(expected.square().sum(), old.parameters())
    for a, b in zip(actual, wanted, strict=True):
        assert_close(a, b, 1e-10)


def test_autocast_dtypes(trio: Any) -> None:
    new, old, x = (part.float() for part in trio)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for given in (x, x.bfloat16()):
            y, expected = new(given), old(given)
            assert y.dtype == expected.dtype == torch.bfloat16
            assert torch.allclose(y.float(), expected.float(), atol=5e-2)


def test_meta_device(trio: Any) -> None:
    new, old, x = (part.to("meta") for part in trio)
    assert new(x).device.type == "meta"
    assert new(x).shape == old(x).shape


def test_empty_and_unbatched_input(trio: Any) -> None:
    new, old, x = trio
    assert new(x[:0]).shape == old(x[:0]).shape
    assert_close(new(x[0]).detach(), old(x[0]).detach(), 1e-10)


def test_channels_last(trio: Any) -> None:
    new, old, x = trio
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)
    x = x.contiguous(memory_format=form)
    new, old = (copy.deepcopy(m).to(memory_format=form) for m in (new, old))
    assert_same_module(new, old, x)


def test_copies_and_files(trio: Any) -> None:
    new, old, x = trio
    expected = old(x)
    for again in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert type(again) is type(new)
        assert_close(again(x), expected, 1e-10)
    for source, target in ((new, old), (old, new)):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        with torch.no_grad():
            for parameter in target.parameters():
                parameter.zero_()
        target.load_state_dict(torch.load(file, weights_only=True))
        assert_close(target(x), expected, 1e-10)


def test_lists_as_settings() -> None:
    layer = ours.ConvNd(2, 2, 3, [3, 2], [1, 2], [1, 0], [2, 1])
    old = nn.Conv2d(2, 3, [3, 2], [1, 2], [1, 0], [2, 1])
    assert layer.extra_repr() == old.extra_repr()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ours.ConvNd(3, 8, 3), TypeError, "missing .*'kernel_size'"),
        (lambda: ours.ConvNd(in_channels=3, out_channels=8, kernel_size=3), TypeError, "'dims'"),
        (lambda: ours.ConvNd(2, 3, 8, (3, 3, 3)), ValueError, "kernel_size is .*or 2 ints"),
        (lambda: ours.ConvNd(2, 3, 8, 3, padding=-1), ValueError, "padding is -1.*at least 0"),
        (lambda: ours.ConvTransposeNd(2, 3, 8, 3, (1, 1, 1)), ValueError, "stride is .*or 2 ints"),
        (lambda: ours.Conv2d(2, 2, 1, padding_mode="wrap"), ValueError, "padding_mode must be"),
        (lambda: ours.ConvNd(5, 2, 2, 1, padding_mode="wrap"), ValueError, "padding_mode must"),
        (lambda: ours.Conv2d(2, 2, 1, padding="full"), ValueError, "Invalid padding string 'full'"),
        (
            lambda: ours.ConvNd(4, 2, 2, 1, padding_mode="reflect"),
            NotImplementedError,
            "padding_mode='reflect' has dims=4",
        ),
        (
            lambda: ours.ConvTranspose2d(2, 2, 1, padding_mode="circular"),
            ValueError,
            'Only "zeros" padding mode is supported for ConvTranspose2d',
        ),
        (lambda: ours.Conv2d(2, 2, 1)(torch.rand(4, 3, 5, 5)), ValueError, "2 channels|3 channels"),
        (lambda: ours.Conv2d(2, 2, 1)(torch.rand(2, 5)), ValueError, "input has shape"),
        (lambda: ours.from_torch(nn.Linear(2, 2)), TypeError, "Linear; expected exactly one of"),
        (lambda: ours.from_torch(ours.Conv2d(2, 2, 1)), TypeError, "module is a Conv2d"),
        (lambda: ours.from_torch(nn.LazyConv2d(2, 1)), TypeError, "module is a LazyConv2d"),
        (lambda: ours.to_torch(nn.Conv2d(2, 2, 1)), TypeError, "one of tnconv.nn's"),
        (lambda: ours.to_torch(ours.ConvNd(4, 2, 2, 1)), NotImplementedError, "with dims=4"),
        (lambda: ours.to_torch(ours.UnfoldNd(3)), NotImplementedError, "with dims=None"),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert "tensor(" not in str(caught.value)


class Block(nn.Module):
    """A residual block that keeps references to its layers in every way that one can."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect")
        self.path = [self.first, self.norm, self.second]
        self.named = {"last": (self.second,)}
        self.activation = partial(self.relu, 0.0)
        self.seen = 0
        self.handle = self.first.register_forward_hook(self.count)

    def relu(self, least: float, x: Tensor) -> Tensor:
        return x.clamp(min=least)

    def count(self, *_: object) -> None:
        self.seen += 1

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.path[:2]:
            y = self.activation(layer(y))
        return x + self.named["last"][0](y)


class Net(nn.Sequential):
    """One block twice, a convolution of every kind, and what is left alone."""

    def __init__(self) -> None:
        block = Block(4)
        self_made = nn.ModuleDict({"up": nn.ConvTranspose2d(4, 4, 2, stride=2)})
        super().__init__(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            block,
            nn.ModuleList([self_made])[0]["up"],
            block,
            nn.Unfold(2, stride=2),
            nn.Fold(8, 2, stride=2),
            nn.Flatten(2),
            nn.Conv1d(4, 2, 3),
            nn.Linear(62, 3),
        )


def trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))]


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double().eval()


def test_converted_model(net: nn.Module) -> None:
    x = random(2, 2, 8, 8)
    types = [type(m) for m in net.modules()]
    expected = trained(net, x)
    new = ours.convert(net)
    for actual, wanted in zip(trained(new, x), expected, strict=True):
        assert_close(actual, wanted, 1e-10)
    assert [type(m) for m in net.modules()] == types
    assert type(new) is Net and type(new[1]) is Block and new[1] is new[3]
    swapped = [type(m) for m in new.modules()]
    assert swapped[1:4] == [ours.Conv2d, Block, ours.Conv2d]
    assert {ours.ConvTranspose2d, ours.UnfoldNd, ours.FoldNd, ours.Conv1d} <= set(swapped)
    assert {id(m) for m in new.modules()}.isdisjoint(id(m) for m in net.modules())
    for parts in ("named_parameters", "named_buffers"):
        for (name, a), (other, b) in zip(getattr(new, parts)(), getattr(net, parts)(), strict=True):
            assert name == other and a is b
    assert [type(m) for m in ours.revert(new).modules()] == types
    for actual, wanted in zip(trained(ours.revert(new), x), expected, strict=True):
        assert_close(actual, wanted, 1e-10)


def test_references_between_modules_are_the_new_ones(net: nn.Module) -> None:
    new = ours.convert(net)
    block, old = new[1], net[1]
    assert block.path == [block.first, block.norm, block.second]
    assert block.named == {"last": (block.second,)}
    assert block.activation.func.__self__ is block
    net(random(1, 2, 8, 8))
    assert (block.seen, old.seen) == (0, 2)
    new(random(1, 2, 8, 8))
    assert (block.seen, old.seen) == (2, 2)
    block.handle.remove()
    assert not block.first._forward_hooks and old.first._forward_hooks
    new.train()
    assert block.training and not old.training


def doubled(calls: list[str], module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> Tensor:
    calls.append(type(module).__module__)
    return 2 * y


def test_hooks_are_kept() -> None:
    layer = nn.Conv2d(2, 3, 3, dtype=torch.float64)
    calls: list[str] = []
    layer.register_forward_pre_hook(lambda m, args: calls.append("pre"))
    layer.register_forward_hook(partial(doubled, calls), with_kwargs=True)
    layer.register_full_backward_hook(lambda m, *grads: calls.append("backward"))
    layer.register_load_state_dict_pre_hook(lambda m, *_: calls.append(type(m).__module__))
    layer.register_state_dict_post_hook(lambda *_: calls.append("state"))
    layer.eval()
    new = ours.from_torch(layer)
    assert not new.training and new.weight is layer.weight
    x = random(1, 2, 5, 5).requires_grad_()
    new(x).sum().backward()
    new.load_state_dict(new.state_dict())
    here = ours.Conv2d.__module__
    assert calls == ["pre", here, "backward", "state", here]
    new.register_forward_hook(lambda *_: calls.append("own"))
    assert len(layer._forward_hooks) == 1
    assert_close(ours.to_torch(new)(x).detach(), layer(x).detach(), 1e-10)


def test_single_modules_and_any_number_of_dimensions(trio: Any) -> None:
    new, old, x = trio
    for module in (ours.from_torch(old), ours.convert(old)):
        assert type(module) is type(new) and vars(module).keys() == vars(old).keys()
        assert repr(module) == repr(old)
        assert_close(module(x), old(x), 1e-10)
    for module in (ours.to_torch(new), ours.revert(new)):
        assert type(module) is type(old)
        assert all(a is b for a, b in zip(module.parameters(), new.parameters(), strict=True))


@pytest.mark.parametrize("name", sorted(MAKE))
def test_modules_of_any_dimension_become_torchs(name: str) -> None:
    make, make_nd, x = MAKE[name]
    nd = make_nd()
    assert type(ours.to_torch(nd)) is type(make(nn))
    assert_close(ours.to_torch(nd)(x), nd(x), 1e-10)


def test_unfold_keeps_its_two_dimensions() -> None:
    x = random(3, 6, 6)  # without a batch
    for old in (nn.Unfold(3, stride=2), nn.Unfold((2, 2), 2)):
        new = ours.from_torch(old)
        assert_close(new(x), old(x), 1e-12)
        assert_close(ours.to_torch(new)(x), old(x), 1e-12)


class Standardised(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


def test_subclasses_are_left_alone_with_one_warning() -> None:
    patched = nn.Conv2d(3, 3, 1)
    patched.forward = lambda input: input  # type: ignore[method-assign]
    model = nn.Sequential(Standardised(2, 3, 3), nn.Sequential(patched), nn.Conv2d(3, 2, 1))
    message = r"left alone: 0 \(Standardised\), 1\.0 \(Conv2d with a forward of its own\)$"
    with pytest.warns(UserWarning, match=message) as caught:
        new = ours.convert(model)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert [type(m) for m in new] == [Standardised, nn.Sequential, ours.Conv2d]
    x = torch.rand(1, 2, 5, 5)
    assert torch.allclose(new(x), model(x), atol=1e-6)
    with pytest.warns(UserWarning, match=r"the model \(ConvNd\)"):
        ours.revert(ours.ConvNd(4, 1, 1, 1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 3, 3)).eval(),
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.ReLU()),
        lambda: torch.compile(nn.Sequential(nn.Conv2d(2, 3, 3)), backend="eager"),
        lambda: torch.jit.script(nn.Sequential(nn.Conv2d(2, 3, 3))),
        lambda: nn.Sequential(torch.jit.script(nn.Conv2d(2, 3, 3)), nn.Conv2d(3, 2, 1)),
        lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(2, 3, 3))),
    ],
    ids=["spectral_norm", "weight_norm", "compile", "script", "scripted_child", "fx"],
)
@pytest.mark.filterwarnings("ignore")
def test_models_that_are_no_plain_modules(make: Callable[[], nn.Module]) -> None:
    model = make()
    x = torch.rand(2, 2, 6, 4)
    assert torch.allclose(ours.convert(model)(x), model(x), atol=1e-6)


def test_no_warnings_for_plain_models(net: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.revert(ours.convert(ours.convert(net)))


def test_training_statistics_are_shared(net: nn.Module) -> None:
    new = ours.convert(net).train()
    before = net[1].norm.running_mean.clone()
    new(random(3, 2, 8, 8))
    assert not torch.equal(net[1].norm.running_mean, before)
