"""Products with Hessian, Gauss-Newton and Fisher matrices against the dense ones of torch.func."""

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

import tnconv
from tests.models.test_capture import Residual, data, hooks
from tests.strategies import assert_close
from tnconv import FisherOperator, GGNOperator, HessianOperator
from tnconv.losses.roots import curvature

pytestmark = pytest.mark.usefixtures("float64")

Loss = Callable[[Any, Any], Tensor]


def flat(model: nn.Module, names: list[str]) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The parameters as one vector, and what makes named tensors of such a vector."""
    own = {name: model.get_parameter(name).detach() for name in names}
    sizes = [p.numel() for p in own.values()]

    def named(vector: Tensor) -> Mapping[str, Tensor]:
        parts = vector.split(sizes)
        return {n: v.reshape(p.shape) for (n, p), v in zip(own.items(), parts, strict=True)}

    return torch.cat([p.flatten() for p in own.values()]), named


def learned(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def dense_hessian(model: nn.Module, loss_fn: Loss, x: Tensor, y: Tensor, names=None) -> Tensor:
    theta, named = flat(model, names or learned(model))
    return hessian(lambda v: loss_fn(functional_call(model, named(v), (x,)), y))(theta)


def jacobian(model: nn.Module, x: Tensor, names=None) -> Tensor:
    """``J[n, y, θ]``."""
    theta, named = flat(model, names or learned(model))
    return jacrev(lambda v: functional_call(model, named(v), (x,)).flatten(1))(theta)


def dense_ggn(model: nn.Module, loss_fn: Loss, x: Tensor, y: Tensor) -> Tensor:
    output = model(x).detach()
    middle = hessian(lambda out: loss_fn(out, y))(output).reshape(output.numel(), -1)
    whole = jacobian(model, x).flatten(0, 1)
    return whole.T @ middle @ whole


def check(operator: tnconv.operators.CurvatureOperator, expected: Tensor) -> None:
    """All columns at once, and one vector in every form."""
    size = len(expected)
    assert operator.shape == (size, size)
    assert_close(operator @ torch.eye(size), expected, 1e-10)
    v = torch.randn(size)
    assert_close(operator @ v, expected @ v, 1e-10)
    parts = operator.space.split(v)
    as_tuple, as_mapping = (
        operator @ parts,
        operator @ dict(zip(operator.names, parts, strict=True)),
    )
    assert isinstance(as_tuple, tuple) and list(as_mapping) == list(operator.names)
    assert_close(torch.cat([p.flatten() for p in as_tuple]), expected @ v, 1e-10)
    for part, name in zip(as_tuple, operator.names, strict=True):
        assert torch.equal(as_mapping[name], part)
    array = operator.matvec(v.numpy())
    assert array.dtype == operator.dtype and array.shape == (size,)
    assert_close(torch.from_numpy(array), expected @ v, 1e-10)
    assert operator.rmatmat(v.numpy()[:, None]).shape == (size, 1)


def head(features: nn.Module, x: Tensor) -> nn.Sequential:
    entries = features(x).flatten(1).shape[1]
    return nn.Sequential(features, nn.Tanh(), nn.Flatten(), nn.Linear(entries, 3))


LAYERS = {
    "stride, groups": lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
    "dilation": lambda: nn.Conv2d(2, 2, (2, 3), dilation=(2, 1), padding=(0, 2)),
    "circular": lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(2, 2, 3, 2, padding=1, padding_mode="reflect"),
    "replicate": lambda: nn.Conv2d(2, 2, 2, padding="same", padding_mode="replicate"),
    "transposed": lambda: nn.ConvTranspose2d(2, 2, 2, 2, 1, groups=2, output_padding=1),
    "ours": lambda: tnconv.nn.Conv2d(2, 2, 3, 2, padding=1, groups=2),
    "norm": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.GELU()),
    "pooling": lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.MaxPool2d(2), nn.AvgPool2d(2, 1)),
}
LOSSES: dict[str, tuple[Loss, Callable[[int], Tensor]]] = {
    "cross entropy": (nn.CrossEntropyLoss(), lambda n: torch.randint(3, (n,))),
    "cross entropy, sum": (nn.CrossEntropyLoss(reduction="sum"), lambda n: torch.randint(3, (n,))),
    "mse": (nn.MSELoss(), lambda n: torch.randn(n, 3)),
    "bce, sum": (nn.BCEWithLogitsLoss(reduction="sum"), lambda n: torch.rand(n, 3).round()),
    "huber": (nn.HuberLoss(delta=0.5), lambda n: torch.randn(n, 3)),
    "any": (
        lambda y, t: (y.sin() * t).square().mean() + y.prod(1).sum(),
        lambda n: torch.randn(n, 3),
    ),
}


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
def test_layers(case: str, operator: type[tnconv.operators.CurvatureOperator]) -> None:
    x, y = torch.randn(3, 2, 4, 4), torch.randint(3, (3,))
    model, loss_fn = head(LAYERS[case](), x), nn.CrossEntropyLoss()
    dense = dense_hessian if operator is HessianOperator else dense_ggn
    check(operator(model, loss_fn, [(x, y)]), dense(model, loss_fn, x, y))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
def test_losses(loss: str, operator: type[tnconv.operators.CurvatureOperator]) -> None:
    (loss_fn, draw), x = LOSSES[loss], torch.randn(4, 2, 3, 3)
    model, y = head(nn.Conv2d(2, 2, 2), x), draw(4)
    dense = dense_hessian if operator is HessianOperator else dense_ggn
    check(operator(model, loss_fn, [(x, y)]), dense(model, loss_fn, x, y))


@given(st.data())
def test_geometries(draw: st.DataObject) -> None:
    """Strides, dilations, paddings and groups that do not divide anything."""
    groups = draw.draw(st.integers(1, 2))
    kernel, stride, dilation = (draw.draw(st.integers(1, 3)) for _ in range(3))
    padding = draw.draw(st.integers(0, 2))
    size = draw.draw(st.integers(max(1, dilation * (kernel - 1) + 1 - 2 * padding), 7))
    layer = nn.Conv1d(2, 2, kernel, stride, padding, dilation, groups)
    x, y, loss_fn = torch.randn(2, 2, size), torch.randint(3, (2,)), nn.CrossEntropyLoss()
    model = head(layer, x)
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    expected = dense_hessian(model, loss_fn, x, y) @ v
    assert_close(HessianOperator(model, loss_fn, [(x, y)]) @ v, expected, 1e-10)
    expected = dense_ggn(model, loss_fn, x, y) @ v
    assert_close(GGNOperator(model, loss_fn, [(x, y)]) @ v, expected, 1e-10)


def test_residual_network_with_shared_weights_and_an_unused_layer() -> None:
    model, (x, y), loss_fn = Residual().eval(), data(), nn.CrossEntropyLoss()
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    expected = dense_hessian(model, loss_fn, x, y) @ v
    assert_close(HessianOperator(model, loss_fn, [(x, y)]) @ v, expected, 1e-10)
    expected = dense_ggn(model, loss_fn, x, y) @ v
    assert_close(GGNOperator(model, loss_fn, [(x, y)]) @ v, expected, 1e-10)
    assert hooks(model) == 0


def test_tied_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    x, y, loss_fn = torch.randn(4, 3), torch.randint(3, (4,)), nn.CrossEntropyLoss()
    check(HessianOperator(model, loss_fn, [(x, y)]), dense_hessian(model, loss_fn, x, y))
    check(GGNOperator(model, loss_fn, [(x, y)]), dense_ggn(model, loss_fn, x, y))


class ByHand(nn.Module):
    """Batch normalisation of elementary steps: forward over reverse mode is wrong for torch's."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean((0, 2, 3), keepdim=True)
        spread = (centred.square().mean((0, 2, 3), keepdim=True) + self.eps).sqrt()
        return centred / spread * self.weight[:, None, None] + self.bias[:, None, None]


def test_batch_normalisation_that_trains() -> None:
    """By the batch's statistics; running ones, modes and gradients stay as they are."""
    model, (x, y), loss_fn = Residual(), data(), nn.CrossEntropyLoss()
    twin = copy.deepcopy(model)
    twin.norm = ByHand(model.norm)
    before = copy.deepcopy(model.state_dict())
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    for operator, dense in ((HessianOperator, dense_hessian), (GGNOperator, dense_ggn)):
        for retain in (True, False):
            found = operator(model, loss_fn, [(x, y)], retain_graph=retain) @ v
            assert_close(found, dense(twin, loss_fn, x, y) @ v, 1e-10)
    assert model.training and all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(NotImplementedError, match="layer 'norm' normalises by the batch"):
        FisherOperator(model, loss_fn, [(x, y)])


def test_frozen_and_chosen_parameters() -> None:
    x, y, loss_fn = torch.randn(4, 2, 4, 4), torch.randint(3, (4,)), nn.CrossEntropyLoss()
    model = head(nn.Conv2d(2, 3, 3), x)
    model[0].bias.requires_grad_(False)
    operator = HessianOperator(model, loss_fn, [(x, y)])
    assert operator.names == ("0.weight", "3.weight", "3.bias")
    check(operator, dense_hessian(model, loss_fn, x, y))
    names = ["3.weight", "0.bias"]
    operator = HessianOperator(model, loss_fn, [(x, y)], names)
    check(operator, dense_hessian(model, loss_fn, x, y, names))


def several(samples: int = 7) -> tuple[nn.Module, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """A model, and one batch that is also given as batches of different sizes."""
    x, y = torch.randn(samples, 2, 3, 3), torch.randint(3, (samples,))
    parts = list(zip(x.split([1, 4, 2]), y.split([1, 4, 2]), strict=True))
    return head(nn.Conv2d(2, 2, 2), x), x, y, parts


@pytest.mark.parametrize("retain", [True, False, None])
@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0]).double(), ignore_index=1),
        nn.CrossEntropyLoss(label_smoothing=0.2),
    ],
)
def test_several_batches_are_one(loss_fn: nn.CrossEntropyLoss, retain: bool | None) -> None:
    model, x, y, parts = several()
    y[1:5] = torch.tensor([1, 0, 2, 2])
    expected = dense_hessian(model, loss_fn, x, y)
    check(HessianOperator(model, loss_fn, parts, retain_graph=retain), expected)
    expected = dense_ggn(model, loss_fn, x, y)
    check(GGNOperator(model, loss_fn, iter(parts), retain_graph=retain), expected)


def test_a_batch_all_of_whose_labels_are_ignored() -> None:
    model, x, y, parts = several()
    loss_fn = nn.CrossEntropyLoss(ignore_index=1)
    y[0] = 1
    check(HessianOperator(model, loss_fn, parts), dense_hessian(model, loss_fn, x, y))


@pytest.mark.parametrize("loss", ["probabilities", "mse", "mse, function", "bce", "huber"])
def test_several_batches_of_other_losses(loss: str) -> None:
    model, x, _, parts = several()
    targets = torch.rand(7, 3)
    loss_fn: Loss = {
        "probabilities": nn.CrossEntropyLoss(),
        "mse": nn.MSELoss(),
        "mse, function": F.mse_loss,
        "bce": F.binary_cross_entropy_with_logits,
        "huber": nn.HuberLoss(),
    }[loss]
    batches = [(x, t) for (x, _), t in zip(parts, targets.split([1, 4, 2]), strict=True)]
    expected = dense_hessian(model, loss_fn, x, targets)
    check(HessianOperator(model, loss_fn, batches), expected)


def test_a_loss_without_reduction() -> None:
    model, x, y, parts = several()

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets, reduction="sum") / len(output)

    expected = dense_hessian(model, loss_fn, x, y)
    check(HessianOperator(model, loss_fn, parts, reduction="mean"), expected)
    with pytest.raises(ValueError, match="several batches make one; expected reduction='mean'"):
        HessianOperator(model, loss_fn, parts)


def test_data_loader() -> None:
    model, x, y, _ = several()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3)
    operator = GGNOperator(model, nn.CrossEntropyLoss(), loader)
    operator.check_deterministic()
    check(operator, dense_ggn(model, nn.CrossEntropyLoss(), x, y))


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("loss", ["cross entropy", "cross entropy, sum", "mse", "bce, sum"])
def test_fisher(loss: str, parts: bool) -> None:
    model, x, _, _ = several()
    loss_fn, draw = LOSSES[loss]
    y = draw(7)
    pairs = list(zip(x.split([1, 4, 2]), y.split([1, 4, 2]), strict=True)) if parts else [(x, y)]
    check(FisherOperator(model, loss_fn, pairs), dense_ggn(model, loss_fn, x, y))
    mean = getattr(loss_fn, "reduction", "mean") == "mean"

    generator = torch.Generator().manual_seed(3)
    sampled = FisherOperator(model, loss_fn, pairs, fisher="mc", samples=3, generator=generator)
    whole, expected = jacobian(model, x), 0
    for at, ((inputs, targets), share) in enumerate(zip(pairs, sampled.shares, strict=True)):
        own = torch.Generator().manual_seed(sampled.seed + at)
        drawn = curvature(loss_fn, model(inputs), targets).samples(3, own)
        pulled = torch.einsum("mny,nyp->mnp", drawn, jacobian(model, inputs)).flatten(0, 1)
        assert_close(torch.tensor(share), torch.tensor(len(inputs) / 7 if mean else 1.0), 1e-15)
        expected = expected + share * pulled.T @ pulled
    check(sampled, expected)

    empirical = FisherOperator(model, loss_fn, pairs, fisher="empirical")
    outputs = model(x).detach()
    own = torch.stack(
        [
            jacrev(lambda out, at=at: loss_fn(out[None], y[at : at + 1]))(outputs[at])
            for at in range(7)
        ]
    )
    gradients = torch.einsum("ny,nyp->np", own, whole)
    entries = outputs.shape[1] if loss == "mse" else 1  # which a sample's mean divides by
    check(empirical, entries * gradients.T @ gradients / (7 if mean else 1))


def test_sampled_fisher_has_gauss_newton_as_its_mean() -> None:
    model, x, y, _ = several()
    loss_fn, generator = nn.CrossEntropyLoss(), torch.Generator().manual_seed(0)
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    draws = torch.stack(
        [
            FisherOperator(model, loss_fn, [(x, y)], fisher="mc", generator=generator) @ v
            for _ in range(300)
        ]
    )
    error = draws.mean(0) - GGNOperator(model, loss_fn, [(x, y)]) @ v
    assert (error.abs() <= 5 * draws.std(0) / 300**0.5 + 1e-12).all()


def test_draws_are_the_same_in_every_product_and_reproducible() -> None:
    model, _, _, parts = several()
    v = torch.randn(sum(p.numel() for p in model.parameters()))

    def make(seed: int) -> FisherOperator:
        generator = torch.Generator().manual_seed(seed)
        return FisherOperator(model, nn.CrossEntropyLoss(), parts, fisher="mc", generator=generator)

    operator, state = make(0), torch.get_rng_state()
    operator.check_deterministic()
    assert torch.equal(operator @ v, operator @ v)
    assert torch.equal(operator @ v, make(0) @ v)
    assert not torch.equal(operator @ v, make(1) @ v)
    assert torch.equal(torch.get_rng_state(), state)


def test_graphs_follow_the_parameters() -> None:
    model, x, y, _ = several()
    operator = HessianOperator(model, nn.CrossEntropyLoss(), [(x, y)])
    v = torch.randn(operator.shape[0])
    before = operator @ v
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert not torch.equal(operator @ v, before)
    assert_close(operator @ v, dense_hessian(model, nn.CrossEntropyLoss(), x, y) @ v, 1e-10)


def test_scipy() -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    model, x, y, _ = several()
    operator = GGNOperator(model, nn.CrossEntropyLoss(), [(x, y)])
    dense = dense_ggn(model, nn.CrossEntropyLoss(), x, y)
    values = linalg.eigsh(operator, k=3, return_eigenvectors=False)
    assert_close(torch.from_numpy(values).sort().values, torch.linalg.eigvalsh(dense)[-3:], 1e-8)
    wrapped = linalg.aslinearoperator(operator)
    damped = wrapped + 0.1 * linalg.aslinearoperator(torch.eye(len(dense)).numpy())
    target = torch.randn(len(dense))
    found, _ = linalg.cg(damped, target.numpy(), rtol=1e-12)
    expected = torch.linalg.solve(dense + 0.1 * torch.eye(len(dense)), target)
    assert_close(torch.from_numpy(found), expected, 1e-8)
    assert_close(torch.from_numpy(wrapped.T @ target.numpy()), dense @ target, 1e-10)


def test_models_with_several_inputs_and_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"one": self.one(a).sin(), "same": a, "other": self.other(b).cos()}

    def loss_fn(output: dict[str, Tensor], t: Tensor) -> Tensor:
        return (output["one"] * output["other"] * t).square().sum() + output["same"].sum()

    model, a, b, t = Two(), torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 2)
    theta, named = flat(model, learned(model))
    expected = hessian(lambda v: loss_fn(functional_call(model, named(v), (a, b)), t))(theta)
    check(HessianOperator(model, loss_fn, [({"a": a, "b": b}, t)]), expected)

    def outputs(v: Tensor) -> Tensor:
        found = functional_call(model, named(v), (a, b))
        return torch.cat([found["one"], found["other"]], 1)

    def on_both(y: Tensor) -> Tensor:
        return loss_fn({"one": y[:, :2], "other": y[:, 2:], "same": a}, t)

    whole = jacrev(outputs)(theta).flatten(0, 1)
    middle = hessian(on_both)(outputs(theta)).reshape(16, 16)
    check(GGNOperator(model, loss_fn, [((a, b), t)]), whole.T @ middle @ whole)
    with pytest.raises(TypeError, match="the model gives a dict; expected a tensor"):
        operator = FisherOperator(
            model, loss_fn, [((a, b), t)], fisher="empirical", reduction="sum"
        )
        operator @ theta


def test_wrapped_models() -> None:
    model, x, y, _ = several()
    compiled = torch.compile(model, backend="aot_eager")
    expected = dense_hessian(model, nn.CrossEntropyLoss(), x, y)
    check(HessianOperator(compiled, nn.CrossEntropyLoss(), [(x, y)]), expected)


def test_copies_and_pickles() -> None:
    x, y = torch.randn(4, 3), torch.randint(3, (4,))
    operator = FisherOperator(nn.Linear(3, 3), nn.CrossEntropyLoss(), [(x, y)], fisher="mc")
    v = torch.randn(12)
    expected = operator @ v
    for twin in (copy.deepcopy(operator), pickle.loads(pickle.dumps(operator))):
        assert torch.equal(twin @ v, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    model, x, y, _ = several()
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    expected = GGNOperator(model, nn.CrossEntropyLoss(), [(x, y)]) @ v
    operator = GGNOperator(model.to(dtype), nn.CrossEntropyLoss(), [(x.to(dtype), y)])
    found = operator @ v.numpy()
    assert found.dtype == operator.dtype and operator.dtype.itemsize == 4
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert_close(torch.from_numpy(found), expected.float(), tolerance)


def test_no_curvature() -> None:
    """A model that is linear under a loss that is linear, and parameters that nothing reads."""
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    for operator in (HessianOperator, GGNOperator):
        found = operator(model, lambda y, t: (y * t).sum(), [(x, torch.randn(4, 2))])
        assert not (found @ torch.randn(8)).any()


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x))


def test_errors() -> None:
    x, y, loss_fn = torch.randn(4, 3), torch.randint(3, (4,)), nn.CrossEntropyLoss()
    model = nn.Linear(3, 3)
    operator = HessianOperator(model, loss_fn, [(x, y)])
    with pytest.raises(ValueError, match=r"operand has shape \(11, 2\); expected \(12,\) or"):
        operator @ torch.randn(11, 2)
    with pytest.raises(ValueError, match=r"operand has shape \(11,\); expected \(12,\)"):
        operator @ torch.randn(11)
    with pytest.raises(ValueError, match="missing or unknown: bias"):
        operator @ {"weight": model.weight}
    with pytest.raises(ValueError, match=r"tensors have shapes \[\(3,\), \(3, 3\)\]"):
        operator @ (model.bias, model.weight)
    with pytest.raises(TypeError, match="dtype complex128; expected real"):
        operator @ torch.randn(12, dtype=torch.complex128).numpy()
    with pytest.raises(ValueError, match="no parameters 'wait'"):
        HessianOperator(model, loss_fn, [(x, y)], ["wait"])
    with pytest.raises(ValueError, match="parameters are "):
        HessianOperator(model.requires_grad_(False), loss_fn, [(x, y)])
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="there are no batches"):
        HessianOperator(model, loss_fn, [])
    with pytest.raises(NotImplementedError, match="layer '1' is in training mode: dropout"):
        GGNOperator(nn.Sequential(model, nn.Dropout(0.5)), loss_fn, [(x, y)])
    with pytest.raises(RuntimeError, match="two products with one vector differ"):
        GGNOperator(Noisy(3, 3), loss_fn, [(x, y)]).check_deterministic()
    with pytest.raises(ValueError, match="fisher is 'type-3'; expected one of"):
        FisherOperator(model, loss_fn, [(x, y)], fisher="type-3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples is 0; expected at least 1"):
        FisherOperator(model, loss_fn, [(x, y)], fisher="mc", samples=0)
    with pytest.raises(NotImplementedError, match="no second derivative is known"):
        FisherOperator(model, nn.HuberLoss(), [(x, y)])
    with pytest.raises(ValueError, match="the loss has no reduction"):
        FisherOperator(model, lambda y, t: y.sum(), [(x, y)], fisher="empirical")
    with pytest.raises(ValueError, match=r"the loss has shape \(4,\); expected a scalar"):
        HessianOperator(model, lambda y, t: y.sum(1), [(x, y)]) @ torch.randn(12)


@pytest.mark.parametrize("loss", ["cross entropy", "cross entropy, sum", "mse", "bce, sum"])
def test_equal_to_curvlinops(loss: str) -> None:
    peer = pytest.importorskip("curvlinops")
    model, x, _, _ = several()
    loss_fn, draw = LOSSES[loss]
    batches = list(zip(x.split([1, 4, 2]), draw(7).split([1, 4, 2]), strict=True))
    if isinstance(loss_fn, nn.BCEWithLogitsLoss):
        batches = [(x, t.round()) for x, t in batches]
    params, v = list(model.parameters()), torch.randn(sum(p.numel() for p in model.parameters()))
    for ours, theirs in (
        (HessianOperator, peer.HessianLinearOperator),
        (GGNOperator, peer.GGNLinearOperator),
    ):
        expected = theirs(model, loss_fn, params, batches) @ v
        assert_close(ours(model, loss_fn, batches) @ v, expected, 1e-10)
    if loss != "mse":  # there a sample's loss is a mean over entries for us, a sum for them
        expected = peer.EFLinearOperator(model, loss_fn, params, batches) @ v
        found = FisherOperator(model, loss_fn, batches, fisher="empirical") @ v
        assert_close(found, expected, 1e-10)
