"""What KFAC collects in a training loop: the factors of the quantity, whatever the loop does."""

import copy
import gc
import io
from math import inf

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnconv
from tests.models.test_capture import Residual, data
from tests.models.test_kronecker import Linear, gauss_newton, weight_rows
from tests.optim.nets import batch, factors, small_net, train
from tests.strategies import assert_close
from tnconv import quantities
from tnconv.optim import KFAC

pytestmark = pytest.mark.usefixtures("float64")

FISHERS = ("type-2", "mc", "empirical", "forward-only")


def optimizer_for(model: nn.Module, loss_fn: nn.Module, **settings) -> KFAC:
    return KFAC(model, lr=0.0, loss_fn=loss_fn, **settings)


def one_step(model: nn.Module, optimizer: KFAC, loss_fn, *parts: tuple[Tensor, Tensor]) -> None:
    """A step on micro-batches, whose losses are weighted by their sizes."""
    total = sum(len(x) for x, _ in parts)
    for x, y in parts:
        (loss_fn(model(x), y) * (len(x) / total)).backward()
    optimizer.step()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("flavour", ["expand", "reduce", "hybrid"])
@pytest.mark.parametrize("joint", [True, False])
def test_factors_are_those_of_the_quantity(
    flavour: str, fisher: str, joint: bool, reduction: str
) -> None:
    model, (x, labels) = Residual().eval(), data()
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    settings = {"flavour": flavour, "fisher": fisher, "samples": 2, "joint": joint}
    settings |= {"reduction": reduction}
    kfac = quantities.KFAC(**settings, generator=theirs)
    expected = tnconv.compute(model, loss_fn, x, labels, [kfac])[kfac]
    model.train()
    model.norm.eval()
    optimizer = optimizer_for(model, loss_fn, **settings, generator=ours)
    one_step(model, optimizer, loss_fn, (x, labels))
    named = dict(model.named_parameters())
    held = {name for name in expected if "A" in optimizer.state[named[name]]}
    layers = {"stem", "shared", "side", "head"}
    assert held == {f"{name}.{key}" for name in layers for key in ("weight", "bias")[: 2 - joint]}
    for name in held:
        a, b = factors(optimizer, named[name])
        assert_close(a, expected[name].input, 1e-10)
        assert_close(b, expected[name].grad_output, 1e-10)


@pytest.mark.parametrize("flavour", ["expand", "reduce"])
def test_exact_for_deep_linear_networks(flavour: str) -> None:
    x, loss_fn = torch.randn(3, 4, 6, 5), nn.MSELoss()
    layer = nn.Conv2d(4, 6, 3, 2, padding=1, groups=2, bias=False)
    model = Linear(layer, x, pooled=flavour == "reduce")
    y = torch.randn_like(model(x))
    optimizer = optimizer_for(model, loss_fn, flavour=flavour, fisher="type-2")
    one_step(model, optimizer, loss_fn, (x, y))
    whole = gauss_newton(model, loss_fn, x, y, "layer.weight")
    rows = weight_rows(layer, torch.arange(layer.weight.numel()).reshape(layer.weight.shape))
    for at, a, b in zip(rows.flatten(1), *factors(optimizer, layer.weight), strict=True):
        assert_close(torch.kron(b, a), whole[at][:, at], 1e-10)


def fixed_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Monte Carlo columns that depend on their own sample alone."""

    def columns(source, loss_fn, output: Tensor, targets: Tensor) -> Tensor:
        own = torch.sin(7 * output + targets[:, None])
        return torch.stack([own, own.cos()]) / len(output) ** 0.5

    monkeypatch.setattr(quantities.SampledColumns, "columns", columns)


@pytest.mark.parametrize("fisher", FISHERS)
def test_micro_batches_equal_the_joint_batch(fisher: str, monkeypatch) -> None:
    fixed_draws(monkeypatch)
    x, y = torch.rand(8, 2, 5, 5), torch.randint(3, (8,))
    found = []
    for sizes in ([8], [3, 1, 4]):
        torch.manual_seed(0)
        model, loss_fn = small_net(), nn.CrossEntropyLoss()
        model[1].eval()
        optimizer = optimizer_for(model, loss_fn, fisher=fisher)
        one_step(model, optimizer, loss_fn, *zip(x.split(sizes), y.split(sizes), strict=True))
        found.append(factors(optimizer, model[0].weight, model[4].weight))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, 1e-10)


@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_several_losses_of_one_pass(fisher: str) -> None:
    """Columns and Fishers of losses add up, whether they are sent back together or in turn."""
    x, (y, z) = torch.randn(5, 4), torch.randint(3, (2, 5))
    layer, loss_fn = nn.Linear(4, 3), nn.CrossEntropyLoss()

    def found(*targets: Tensor) -> list[Tensor]:
        optimizer = optimizer_for(layer, loss_fn, fisher=fisher)
        output = layer(x)
        for each in targets:
            loss_fn(output, each).backward(retain_graph=True)
        optimizer.step()
        return factors(optimizer, layer.weight)

    first, second, both = found(y), found(z), found(y, z)
    assert_close(both[0], first[0], 1e-10)
    assert_close(both[1], first[1] + second[1], 1e-10)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_gradient_scaling(fisher: str, monkeypatch) -> None:
    fixed_draws(monkeypatch)
    x, y = batch()
    found = []
    for scale in (1.0, 2.0**16):
        torch.manual_seed(0)
        model, loss_fn = small_net(), nn.CrossEntropyLoss()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = optimizer_for(model, loss_fn, fisher=fisher, loss_scale=scaler.get_scale)
        scaler.scale(loss_fn(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(factors(optimizer, model[0].weight, model[4].weight))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, 1e-10)


@pytest.mark.parametrize("fisher", FISHERS)
def test_steps_that_a_scaler_skips(fisher: str) -> None:
    """A gradient that overflows changes nothing, and the next step has finite factors."""
    model, (x, y), loss_fn = small_net(), batch(), nn.CrossEntropyLoss()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = KFAC(model, fisher=fisher, loss_fn=loss_fn, loss_scale=scaler.get_scale)
    before = [p.detach().clone() for p in model.parameters()]
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(loss_fn(model(x), y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True)]
        assert all(same) == (factor > 1)
    assert optimizer.steps == 1
    for factor in factors(optimizer, model[0].weight, model[4].weight):
        assert factor.isfinite().all()


def test_factors_that_are_not_finite_are_left_out() -> None:
    layer = nn.Linear(3, 2)
    optimizer = KFAC(layer)
    (layer(torch.rand(4, 3)).sum() * float("inf")).backward()
    optimizer.step()
    assert "A" not in optimizer.state[layer.weight]


def test_running_averages_are_normalised() -> None:
    layer = nn.Linear(3, 2, bias=False)
    optimizer = KFAC(layer, decay=0.8, lr=0.0)
    seen = []
    for _ in range(3):
        x = torch.rand(5, 3)
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        seen.append(x.T @ x / 5)
    weights = torch.tensor([0.64, 0.8, 1.0]) / 2.44
    expected = sum(w * a for w, a in zip(weights, seen, strict=True))
    assert_close(optimizer.state[layer.weight]["A"][0], expected, 1e-10)


def test_zero_grad_drops_what_came_from_gradients() -> None:
    layer, (first, second) = nn.Linear(3, 2, bias=False), torch.rand(2, 5, 3)
    optimizer = KFAC(layer)
    layer(first).square().mean().backward()
    optimizer.zero_grad()
    layer(second).square().mean().backward()
    optimizer.step()
    assert_close(optimizer.state[layer.weight]["A"][0], second.T @ second / 5, 1e-10)


@pytest.mark.parametrize("fisher", FISHERS)
def test_zero_grad_between_loss_and_backward(fisher: str) -> None:
    layer, loss_fn, x = nn.Linear(3, 2, bias=False), nn.CrossEntropyLoss(), torch.rand(5, 3)
    optimizer = optimizer_for(layer, loss_fn, fisher=fisher)
    loss = loss_fn(layer(x), torch.tensor([0, 1, 0, 1, 1]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert_close(optimizer.state[layer.weight]["A"][0], x.T @ x / 5, 1e-10)


def test_losses_that_are_functions_are_propagated_by_hand() -> None:
    layer, x, y = nn.Linear(3, 2), torch.rand(5, 3), torch.tensor([0, 1, 0, 1, 1])
    found = []
    for loss_fn in (F.cross_entropy, nn.CrossEntropyLoss()):
        optimizer = optimizer_for(layer, loss_fn, fisher="type-2")
        output = layer(x)
        if loss_fn is F.cross_entropy:
            optimizer.propagate(output, y)
        loss_fn(output, y).backward()
        optimizer.step()
        found.append(factors(optimizer, layer.weight))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_loss_that_is_not_seen_is_an_error() -> None:
    layer = nn.Linear(3, 2)
    optimizer = optimizer_for(layer, nn.MSELoss(), fisher="mc")
    F.mse_loss(layer(torch.rand(5, 3)), torch.rand(5, 2)).backward()
    with pytest.raises(RuntimeError, match=r"no loss of the model's output was seen; call the"):
        optimizer.step()
    with pytest.raises(ValueError, match="fisher is 'mc'; expected a loss_fn"):
        KFAC(layer, fisher="mc")


@pytest.mark.parametrize("fisher", FISHERS)
def test_evaluation_and_no_grad_never_touch_factors(fisher: str) -> None:
    """Without factors there are squares alone, and that is said."""
    model, loss_fn = small_net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn=loss_fn, fisher=fisher, kl_clip=inf)
    x, y = batch()
    model.eval()
    loss_fn(model(x), y).backward()
    model.train()
    with torch.no_grad():
        loss_fn(model(x), y)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match=r"4 parameters with gradients: '0\.weight' \(layer '0'"):
        optimizer.step()
    assert not any("A" in state for state in optimizer.state.values())
    for old, p in zip(before, model.parameters(), strict=True):
        assert_close(p.detach(), old - 0.1 * p.grad / (len(x) * p.grad**2 + 0.01))


@pytest.mark.parametrize("fisher", FISHERS)
def test_frozen_and_unused_layers_and_a_model_that_is_never_called(fisher: str) -> None:
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("used", "frozen", "unused")})
    model["frozen"].requires_grad_(False)
    before, loss_fn = copy.deepcopy(model.state_dict()), nn.MSELoss()
    optimizer = KFAC(model, fisher=fisher, loss_fn=loss_fn, joint=False, decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        parts = torch.rand(4, 3), torch.rand(2, 3)
        for x in parts:
            y = model["frozen"](model["used"](x))
            loss_fn(y, torch.zeros_like(y)).backward()
        optimizer.step()
        read = torch.cat(parts)
        assert_close(optimizer.state[model["used"].weight]["A"][0], read.T @ read / 6, 1e-10)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"used.weight", "used.bias"}
    assert not optimizer.state.get(model["frozen"].weight)
    assert not optimizer.state.get(model["unused"].weight)


def test_tied_weights_have_one_pair_of_factors() -> None:
    """Each call is one more position; biases of their own have blocks of their own."""
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model, x = nn.Sequential(first, second), torch.rand(5, 3)
    optimizer = KFAC(model, lr=0.0, flavour="expand", fisher="forward-only")
    model(x).sum().backward()
    optimizer.step()
    read = torch.cat([x, first(x).detach()])
    assert_close(optimizer.state[first.weight]["A"][0], read.T @ read / 10, 1e-10)
    for layer in (first, second):
        assert_close(optimizer.state[layer.bias]["A"], torch.ones(1, 1, 1), 1e-10)


def test_a_weight_that_another_kind_of_layer_holds_has_no_factors() -> None:
    words, scores = nn.Embedding(7, 3), nn.Linear(3, 7)
    scores.weight = words.weight
    model = nn.Sequential(words, scores)
    optimizer = KFAC(model)
    model(torch.randint(7, (4, 5))).square().mean().backward()
    optimizer.step()
    assert "A" not in optimizer.state[words.weight]
    assert "A" in optimizer.state[scores.bias]


def test_copies_and_pickles_of_the_model_record_nothing() -> None:
    model = small_net()
    optimizer = KFAC(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        x, y = batch()
        F.cross_entropy(twin(x), y).backward()
        assert not optimizer._watch.watch.passes
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("removed", [True, False])
def test_removed_hooks_collect_nothing(removed: bool) -> None:
    model, loss_fn = small_net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, fisher="mc", loss_fn=loss_fn)
    train(model, optimizer, 2, loss_fn=loss_fn)
    if removed:
        optimizer.remove_hooks()
        a = optimizer.state[model[0].weight]["A"].clone()
        train(model, optimizer, 2, loss_fn=loss_fn)
        assert torch.equal(optimizer.state[model[0].weight]["A"], a)
    del optimizer
    gc.collect()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*model.modules(), loss_fn))


def test_function_transforms_and_substituted_weights_are_not_watched() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 2))
    optimizer = KFAC(model)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    x, _ = batch()
    torch.func.grad(loss)(parameters, x)
    loss({name: 2 * p for name, p in parameters.items()}, x).backward()
    torch.func.jacrev(model)(x)
    assert not optimizer._watch.found()


def test_compiled_models() -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, (x, y) = small_net(), batch()
        optimizer = KFAC(model)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        F.cross_entropy(run(x), y).backward()
        optimizer.step()
        found.append(factors(optimizer, model[0].weight, model[4].weight))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, 1e-10)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_checkpointed_models(fisher: str) -> None:
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model, (x, y) = small_net(), batch()
        loss_fn = nn.CrossEntropyLoss()
        model[1].eval()
        optimizer = KFAC(
            model, fisher=fisher, loss_fn=loss_fn, generator=torch.Generator().manual_seed(0)
        )
        if checkpointed:
            body = model.forward
            model.forward = lambda x, body=body: torch.utils.checkpoint.checkpoint(
                body, x, use_reentrant=False
            )
        loss_fn(model(x), y).backward()
        optimizer.step()
        found.append(factors(optimizer, model[0].weight, model[4].weight))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, 1e-10)


def test_autocast_and_half_precision() -> None:
    torch.set_default_dtype(torch.float32)
    model, (x, y) = small_net(), batch()
    for fisher in FISHERS:
        loss_fn = nn.CrossEntropyLoss()
        optimizer = optimizer_for(model, loss_fn, fisher=fisher, factor_dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        state = optimizer.state[model[0].weight]
        assert state["A"].dtype == state["B"].dtype == torch.bfloat16
        assert state["A_inverse"].dtype == torch.float32
    layer = nn.Linear(3, 2).bfloat16()
    optimizer = KFAC(layer)
    layer(torch.rand(4, 3, dtype=torch.bfloat16)).square().mean().backward()
    optimizer.step()
    assert optimizer.state[layer.weight]["A"].dtype == torch.float32
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.isfinite().all()


def test_converted_layers_have_factors() -> None:
    model = tnconv.nn.convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 3)))
    optimizer = KFAC(model)
    model(torch.rand(4, 1, 5, 5)).square().mean().backward()
    optimizer.step()
    assert all("A" in optimizer.state[model[at].weight] for at in (0, 2))
