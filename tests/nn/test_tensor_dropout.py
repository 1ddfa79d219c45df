"""Tensor dropout: exact but for the weight's gradient, which is right on average."""

import copy
import io
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torch.utils.checkpoint import checkpoint

from tnconv.nn import (
    TensorDropoutConv1d,
    TensorDropoutConv2d,
    TensorDropoutConv3d,
    TensorDropoutLinear,
    save_memory,
    tensor_dropout,
)

pytestmark = pytest.mark.usefixtures("float64")

Make = Callable[..., nn.Module]
CASES: dict[str, tuple[Make, tuple[int, ...], Mapping[str, float]]] = {
    "channels": (
        lambda **k: TensorDropoutConv2d(6, 4, 3, 2, 1, **k), (3, 6, 7, 6), {"in_channels": 0.5},
    ),
    "groups": (
        lambda **k: TensorDropoutConv2d(6, 4, (3, 2), groups=2, padding="same", **k),
        (3, 6, 7, 6), {"in_channels": 0.4},
    ),
    "depthwise": (
        lambda **k: TensorDropoutConv2d(6, 12, 3, groups=6, **k),
        (3, 6, 7, 6), {"in_channels": 0.5},
    ),
    "batch": (
        lambda **k: TensorDropoutConv2d(2, 4, 3, bias=False, **k), (6, 2, 5, 5), {"batch": 0.5},
    ),
    "space": (
        lambda **k: TensorDropoutConv2d(2, 4, 3, padding=1, **k),
        (3, 2, 8, 6), {"rows": 0.5, "columns": 0.6},
    ),
    "reflected": (
        lambda **k: TensorDropoutConv2d(4, 4, 3, padding=1, padding_mode="reflect", **k),
        (3, 4, 6, 6), {"rows": 0.5, "in_channels": 0.5},
    ),
    "circular": (
        lambda **k: TensorDropoutConv2d(2, 4, 3, padding=2, padding_mode="circular", **k),
        (2, 2, 6, 6), {"columns": 0.5, "batch": 0.7},
    ),
    "one dimension": (
        lambda **k: TensorDropoutConv1d(4, 6, 3, dilation=2, **k), (3, 4, 9), {"columns": 0.5},
    ),
    "three dimensions": (
        lambda **k: TensorDropoutConv3d(2, 3, 2, **k),
        (2, 2, 4, 3, 4), {"planes": 0.5, "batch": 0.5},
    ),
    "linear": (lambda **k: TensorDropoutLinear(8, 3, **k), (5, 8), {"in_channels": 0.5}),
    "linear positions": (
        lambda **k: TensorDropoutLinear(6, 3, **k),
        (4, 3, 2, 6), {"in_channels": 0.5, "batch": 0.5},
    ),
}  # fmt: skip
SAMPLINGS = ("bernoulli", "fixed")


@pytest.fixture(params=CASES)
def case(request: Any) -> tuple[Make, tuple[int, ...], Mapping[str, float]]:
    return CASES[request.param]


def torchs(layer: Any) -> nn.Module:
    """Torch's layer with the same parameters."""
    kind = next(k for k in type(layer).__mro__ if k.__module__.startswith("torch.nn.modules"))
    twin: nn.Module = object.__new__(kind)
    twin.__setstate__(copy.copy(vars(layer)))  # type: ignore[operator]
    return twin


def masked(layer: Any, x: Tensor, positions: Mapping[int, Tensor]) -> Tensor:
    """The input with zeros where nothing was kept."""
    linear = isinstance(layer, nn.Linear)
    mask = torch.ones_like(x)
    for dim, kept in positions.items():
        at = x.ndim - 1 if linear and dim == 1 else dim
        entries = torch.zeros(x.shape[at])
        if not linear and dim == 1 and layer.weight.shape[1] > 1:
            rows = torch.zeros(layer.groups, x.shape[1] // layer.groups)
            rows[:, kept] = 1
            entries = rows.flatten()
        else:
            entries[kept] = 1
        mask = mask * entries.reshape([-1 if d == at else 1 for d in range(x.ndim)])
    return x * mask


def gradients(layer: nn.Module, x: Tensor, v: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    names = ["x", *(name for name, _ in layer.named_parameters())]
    found = torch.autograd.grad(layer(x), [x, *layer.parameters()], v)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_output_and_all_gradients_but_the_weights_are_exact(case: Any, sampling: str) -> None:
    make, shape, keep = case
    layer, x = make(keep=keep, sampling=sampling), torch.randn(shape)
    exact = torchs(layer)
    y = layer(x)
    assert torch.equal(y, exact(x))
    v = torch.randn_like(y)
    ours, expected = gradients(layer, x, v), gradients(exact, x, v)
    for name in ours.keys() - {"weight"}:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_weight_gradient_is_that_of_the_kept_slices(
    case: Any, sampling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape, keep = case
    layer, x = make(keep=keep, sampling=sampling), torch.randn(shape)
    drawn: list[tuple[Mapping[int, Tensor], float]] = []
    original = type(layer.draws).positions
    monkeypatch.setattr(
        type(layer.draws),
        "positions",
        lambda self, *args: drawn.append(original(self, *args)) or drawn[-1],  # type: ignore[func-returns-value]
    )
    v = torch.randn_like(torchs(layer)(x))
    for _ in range(4):
        weight = gradients(layer, x, v)["weight"]
        positions, scale = drawn[-1]
        part = masked(layer, x, positions)
        expected = scale * gradients(torchs(layer), part, v)["weight"]
        torch.testing.assert_close(weight, expected, rtol=1e-10, atol=1e-10)


UNBIASED = {
    "channels": (lambda **k: TensorDropoutConv1d(4, 2, 2, **k), (2, 4, 5), {"in_channels": 0.5}),
    "space and batch": (
        lambda **k: TensorDropoutConv2d(1, 2, 2, **k), (3, 1, 4, 3), {"rows": 0.5, "batch": 0.7},
    ),
    "depthwise": (
        lambda **k: TensorDropoutConv1d(3, 3, 2, groups=3, **k), (2, 3, 5), {"in_channels": 0.4},
    ),
    "linear": (lambda **k: TensorDropoutLinear(5, 2, **k), (3, 5), {"in_channels": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", UNBIASED)
def test_everything_is_kept_once_on_average(
    name: str, sampling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times the scale. So is the mean of the gradients, which are linear in what is kept."""
    make, shape, keep = UNBIASED[name]
    torch.manual_seed(3)
    layer: Any = make(keep=keep, sampling=sampling)
    asked: list[Any] = []
    original = type(layer.draws).positions
    monkeypatch.setattr(
        type(layer.draws),
        "positions",
        lambda self, *args: asked.append(args) or original(self, *args),  # type: ignore[func-returns-value]
    )
    layer(torch.randn(shape))
    ((shares, sizes, x),) = asked
    values = []
    for _ in range(5_000):
        positions, scale = original(layer.draws, shares, sizes, x)
        kept = torch.tensor(scale)
        for dim, at in positions.items():
            kept = kept.unsqueeze(-1) * torch.zeros(sizes[dim]).index_fill(0, at, 1.0)
        values.append(kept)
    found = torch.stack(values)
    assert ((found.mean(0) - 1).abs() <= 5 * found.std(0) / len(found) ** 0.5).all()
    assert (found.std(0) > 0).all()


def stored_bytes(layer: nn.Module, x: Tensor) -> int:
    """What autograd stores, each storage once, without parameters."""
    held = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in held:
            found[storage.data_ptr()] = storage.nbytes()
        alive.append(t)
        return t

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    del y
    return sum(found.values())


BIG: dict[str, tuple[Make, tuple[int, ...], Mapping[str, float], float]] = {
    "channels": (
        lambda **k: TensorDropoutConv2d(32, 8, 3, **k), (4, 32, 12, 12), {"in_channels": 0.3}, 0.3,
    ),
    "space": (
        lambda **k: TensorDropoutConv2d(4, 8, 3, padding=1, padding_mode="replicate", **k),
        (4, 4, 24, 20), {"rows": 0.5, "columns": 0.5}, 0.25,
    ),
    "batch": (lambda **k: TensorDropoutConv2d(4, 8, 3, **k), (20, 4, 12, 12), {"batch": 0.4}, 0.4),
    "linear": (lambda **k: TensorDropoutLinear(64, 8, **k), (32, 64), {"in_channels": 0.5}, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", BIG)
@pytest.mark.parametrize("differentiable", [False, True])
def test_stored_bytes_fall_with_what_is_kept(name: str, differentiable: bool) -> None:
    make, shape, keep, part = BIG[name]
    x = torch.randn(shape, requires_grad=differentiable)
    fixed = make(keep=keep, sampling="fixed")
    for _ in range(20):
        assert stored_bytes(fixed, x) <= (part + 0.05) * x.nbytes
    random = make(keep=keep, sampling="bernoulli")
    draws = [stored_bytes(random, x) for _ in range(100)]
    assert sum(draws) / 100 <= (part + 0.05) * x.nbytes
    assert len(set(draws)) > 1


def test_a_fixed_sample_keeps_at_least_one_slice() -> None:
    layer = TensorDropoutConv1d(2, 3, 3, keep=0.1, sampling="fixed")
    layer(torch.randn(2, 2, 5)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.any()


def test_a_sample_can_be_empty() -> None:
    layer = TensorDropoutConv1d(2, 3, 3, keep=1e-9)
    layer(torch.randn(2, 2, 5)).sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()


def test_nothing_is_drawn_where_nothing_is_sampled() -> None:
    layer, x = TensorDropoutConv2d(2, 3, 3), torch.randn(2, 2, 5, 5)
    exact = torchs(layer)
    before = torch.get_rng_state()
    with torch.no_grad():
        layer(x)
    layer.eval()
    v = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gradients(layer, x, v), gradients(exact, x, v))
    layer.train().weight.requires_grad_(False)
    layer(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_follow_the_seed_or_a_generator() -> None:
    x = torch.randn(4, 8, 6)

    def grads(layer: Any, calls: int = 3) -> Tensor:
        return torch.stack(
            [torch.autograd.grad(layer(x).sum(), layer.weight)[0] for _ in range(calls)]
        )

    layer = TensorDropoutConv1d(8, 3, 3)
    torch.manual_seed(1)
    first = grads(layer)
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(1)
    assert torch.equal(grads(layer), first)
    layer.draws.generator = torch.Generator().manual_seed(5)
    before, own = torch.get_rng_state(), grads(layer)
    layer.draws.generator.manual_seed(5)
    assert torch.equal(grads(layer), own)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_recomputations_repeat_the_draw(sampling: Any, reentrant: bool, own: bool) -> None:
    """Two checkpoints, recomputed last first, and an unchecked call of the same layer between."""
    generator = torch.Generator() if own else None
    layer = TensorDropoutConv1d(6, 6, 3, padding=1, sampling=sampling, generator=generator)
    other = TensorDropoutConv1d(6, 6, 3, padding=1, sampling=sampling, generator=generator)
    other.draws = layer.draws if own else other.draws
    x = torch.randn(4, 6, 9)

    def run(wrap: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
        (generator or torch.default_generator).manual_seed(2)
        y = wrap(nn.Sequential(layer, nn.Tanh()), x.clone().requires_grad_())
        y = wrap(nn.Sequential(other, nn.Tanh()), layer(y))
        return (
            list(torch.autograd.grad(y.square().sum(), [layer.weight, other.weight]))
            if not reentrant
            else backward(y)
        )

    def backward(y: Tensor) -> list[Tensor]:
        layer.zero_grad()
        other.zero_grad()
        y.square().sum().backward()
        return [layer.weight.grad, other.weight.grad]  # type: ignore[list-item]

    plain = run(lambda net, x: net(x))
    checked = run(lambda net, x: checkpoint(net, x, use_reentrant=reentrant))
    again = run(lambda net, x: checkpoint(net, x, use_reentrant=reentrant))
    if not reentrant:  # whose first pass draws nothing, so that others come first
        torch.testing.assert_close(checked, plain)
    torch.testing.assert_close(again, checked)


def test_differentiable_twice(case: Any) -> None:
    make, shape, keep = case
    layer = make(keep=keep, sampling="fixed")
    x = torch.randn(shape, requires_grad=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        torch.manual_seed(0)
        names = [name for name, _ in layer.named_parameters()]
        y: Tensor = torch.func.functional_call(
            layer, dict(zip(names, parameters, strict=True)), (x,)
        )
        return y

    assert gradgradcheck(function, (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_fixed_samples_compile_in_one_graph(case: Any, backend: str) -> None:
    make, shape, keep = case
    torch.compiler.reset()
    layer, x = make(keep=keep, sampling="fixed"), torch.randn(shape)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    y = compiled(x)
    torch.testing.assert_close(y, torchs(layer)(x))
    y.sum().backward()
    weight = layer.weight.grad
    assert weight is not None and weight.any()


def test_random_numbers_of_slices_compile_with_graph_breaks() -> None:
    torch.compiler.reset()
    layer, x = TensorDropoutConv1d(6, 3, 3), torch.randn(2, 6, 9)
    y = torch.compile(layer, backend="aot_eager")(x)
    y.sum().backward()
    torch.testing.assert_close(y, torchs(layer)(x))
    assert layer.weight.grad is not None


def test_under_autocast_slices_are_kept_in_its_dtype() -> None:
    layer = TensorDropoutConv2d(8, 4, 3, keep=0.5, sampling="fixed").float()
    x, stored = torch.randn(2, 8, 6, 6, dtype=torch.float32), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
    assert y.dtype == torch.bfloat16
    kept = [t for t in stored if t.shape == (2, 4, 6, 6)]
    assert [t.dtype for t in kept] == [torch.bfloat16]
    y.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


def test_unbatched_input() -> None:
    layer, x = TensorDropoutConv2d(4, 4, 3, keep={"rows": 0.5}), torch.randn(4, 6, 6)
    torch.testing.assert_close(layer(x), torchs(layer)(x))
    dense, x = TensorDropoutLinear(4, 4), torch.randn(4)
    torch.testing.assert_close(dense(x), torchs(dense)(x))


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)),
        nn.Flatten(), nn.Linear(8 * 16, 5),
    )  # fmt: skip


def test_a_model_with_sampled_gradients() -> None:
    net, x = model(), torch.randn(2, 3, 8, 8)
    kinds = [type(module) for module in net.modules()]
    new: Any = tensor_dropout(net, {"rows": 0.5, "in_channels": 0.5}, "fixed")
    assert [type(module) for module in net.modules()] == kinds
    assert torch.equal(new(x), net(x))
    assert list(map(id, new.parameters())) == list(map(id, net.parameters()))
    assert [list(new[at].keep) for at in (0, 4)] == [["rows", "in_channels"], ["in_channels"]]
    new.load_state_dict(net.state_dict())
    saving: Any = tensor_dropout(save_memory(net), 0.25)
    assert isinstance(saving[2][0], TensorDropoutConv2d) and saving[2][0].keep == {
        "in_channels": 0.25
    }


def test_copies_and_files() -> None:
    new = tensor_dropout(model(), 0.5, "fixed", torch.Generator().manual_seed(0))
    twin = copy.deepcopy(new)
    x = torch.randn(2, 3, 8, 8)
    for each in (new, twin):
        each(x).sum().backward()
    for p, q in zip(new.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    file = io.BytesIO()
    torch.save(new.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))


def test_a_part_of_the_layers_stays_exact() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1))
    new: Any = tensor_dropout(net, {"columns": 0.5})
    layer, x = new[0], torch.randn(3, 4)
    assert layer.keep == {}
    v = torch.randn(3, 4)
    torch.testing.assert_close(gradients(layer, x, v), gradients(net[0], x, v))


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: TensorDropoutConv2d(3, 4, 3, keep=0.0), r"keep is 0.0 for 'in_channels'.*\(0, 1\]"),
    (lambda: TensorDropoutConv2d(3, 4, 3, keep=1.5), r"keep is 1.5 for 'in_channels'"),
    (lambda: TensorDropoutConv1d(3, 4, 3, keep={"rows": 0.5}), r"keep names 'rows'; expected some"),
    (lambda: TensorDropoutLinear(3, 4, keep={"columns": 0.5}), r"keep names 'columns'"),
    (
        lambda: tensor_dropout(model(), {"height": 0.5}),
        r"keep names 'height'; expected some of batch",
    ),
    (lambda: TensorDropoutConv2d(3, 4, 3, sampling="uniform"), r"sampling is 'uniform'; expected"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_words() -> None:
    layer = TensorDropoutConv1d(3, 4, 3, keep={"columns": 0.5}, sampling="fixed")
    expected = "kernel_size=(3,), stride=(1,), keep=(columns=0.5), sampling='fixed')"
    assert repr(layer) == f"TensorDropoutConv1d(3, 4, {expected}"


def test_activations_do_not_store_for_layers_that_keep_slices() -> None:
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 3))
    new: Any = tensor_dropout(save_memory(net), 0.5)
    assert new[1].plan == "bits"
    assert new.eval()[1].plan == "torch"
