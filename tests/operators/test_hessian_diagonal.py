"""The Hessian's diagonal against the dense one of torch.func, sample by sample, and BackPACK."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, hessian

import tnconv
from tests.models.test_capture import Residual, data, hooks
from tests.operators.test_operators import LAYERS, LOSSES, Loss, flat, head
from tests.strategies import assert_close
from tnconv.operators.hessian_diagonal import roots

pytestmark = pytest.mark.usefixtures("float64")


def check(
    model: nn.Module, loss_fn: Loss, x: Tensor, y: Tensor, parameters: list[str] | None = None
) -> dict[str, Tensor]:
    """Summed, and by sample: a sample's part is that of the loss without the others' terms."""
    found = tnconv.hessian_diagonal(model, loss_fn, x, y, parameters)
    learned = [n for n, p in model.named_parameters() if p.requires_grad]
    expected_names = [n for n in parameters or learned if not n.startswith("unused")]
    assert sorted(found) == sorted(expected_names)
    theta, named = flat(model, list(found))
    output = model(x).detach()

    def diagonal(counts: Tensor) -> Tensor:
        def loss(vector: Tensor) -> Tensor:
            own = functional_call(model, named(vector), (x,))
            shape = (-1, *[1] * (own.dim() - 1))
            return loss_fn(torch.where(counts.reshape(shape), own, output), y)

        return hessian(loss)(theta).diagonal()

    whole = diagonal(torch.ones(len(x), dtype=torch.bool))
    assert_close(torch.cat([d.flatten() for d in found.values()]), whole, 1e-10)
    each = tnconv.hessian_diagonal(model, loss_fn, x, y, parameters, per_sample=True)
    rows = torch.cat([each[name].flatten(1) for name in found], 1)
    assert_close(rows, torch.stack([diagonal(one) for one in torch.eye(len(x)).bool()]), 1e-10)
    assert hooks(model) == 0
    return found


ACTIVATIONS: list[nn.Module] = [
    *(nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2), nn.Hardtanh()),
    *(nn.Sigmoid(), nn.LogSigmoid(), nn.Tanh(), nn.Tanhshrink(), nn.GELU(), nn.GELU("tanh")),
    *(nn.SiLU(), nn.Mish(), nn.ELU(), nn.ELU(inplace=True), nn.SELU(), nn.CELU(0.5)),
    *(nn.Softplus(2.0), nn.Hardswish()),
]


@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
def test_activations(act: nn.Module) -> None:
    x, y = torch.randn(3, 2, 4, 4), torch.randint(3, (3,))
    features = nn.Sequential(nn.Conv2d(2, 3, 3), act, nn.AvgPool2d(2), nn.Flatten())
    model = nn.Sequential(features, nn.Linear(3, 4), act, nn.Linear(4, 3), act)
    found = check(model, nn.CrossEntropyLoss(), x, y)
    ggn = tnconv.quantities.GGNDiagonal()
    expected = tnconv.compute(model, nn.CrossEntropyLoss(), x, y, [ggn])[ggn]
    curved = any(not torch.allclose(found[n], expected[n], 1e-8) for n in found)
    linear = isinstance(act, nn.ReLU | nn.LeakyReLU | nn.Hardtanh)
    assert curved is not linear


class Custom(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


def test_an_operation_that_autograd_differentiates_once() -> None:
    def found(act: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), act, nn.Linear(4, 3))
        x, y = 3 * torch.randn(5, 3), torch.randint(3, (5,))
        return tnconv.hessian_diagonal(model, nn.CrossEntropyLoss(), x, y)

    class Pieces(torch.autograd.Function):
        """Torch's kernel has a sixth in single precision."""

        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return F.hardsigmoid(x)

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            sixth = torch.tensor(1 / 6, dtype=torch.float32).double()
            return grad * (ctx.saved_tensors[0].abs() < 3) * sixth

    expected = found(Custom(Pieces))
    for name, value in found(nn.Hardsigmoid()).items():
        assert_close(value, expected[name], 1e-12)


class Cube(torch.autograd.Function):
    """Curved, and unknown."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Double(torch.autograd.Function):
    """Linear, and unknown."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 2 * grad


def test_custom_functions_and_hooks_of_the_user() -> None:
    def found(act: nn.Module, hook: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), act, nn.Linear(4, 3))
        if hook:
            model[1].register_full_backward_hook(lambda module, grads, outputs: None)
        x, y = torch.randn(5, 3), torch.randint(3, (5,))
        return tnconv.hessian_diagonal(model, nn.CrossEntropyLoss(), x, y)

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    expected = found(Twice(), False)
    for name, value in found(Custom(Double), True).items():
        assert_close(value, expected[name], 1e-12)
    with pytest.raises(NotImplementedError, match="Cube after layer '2' couples entries"):
        found(Custom(Cube), False)


FUNCTIONS = {
    "functions": lambda y: torch.sin(y).exp() + torch.log1p(y**2) + y**3,
    "roots": lambda y: (y.square() + 1).sqrt().reciprocal() + torch.rsqrt(y**2 + 1) + y.erf(),
    "branches": lambda y: torch.cat([y.sigmoid(), y.tanh()], 1)[:, 1:] - y.cos().sum(1, True),
    "scaled": lambda y: (2 * y.flip(1) - 1).atan().abs().clamp(max=1),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_functions(case: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.LazyLinear(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(FUNCTIONS[case](self.first(x)))

    model, x = Net(), torch.randn(4, 3)
    model(x)
    check(model, nn.CrossEntropyLoss(), x, torch.randint(3, (4,)))


@pytest.mark.parametrize("case", [case for case in LAYERS if case != "norm"])
def test_layers(case: str) -> None:
    """Before a curved activation, and between two of them."""
    x, y = torch.randn(3, 2, 4, 4), torch.randint(3, (3,))
    layer = LAYERS[case]()
    inner = nn.Sequential(nn.Conv2d(2, 2, 1), nn.SiLU(), layer)
    check(head(inner, x), nn.CrossEntropyLoss(), x, y)


@pytest.mark.parametrize("loss", ["cross entropy", "cross entropy, sum", "mse", "bce, sum"])
@pytest.mark.parametrize("samples", [1, 4])
def test_losses(loss: str, samples: int) -> None:
    (loss_fn, draw), x = LOSSES[loss], torch.randn(samples, 2, 3, 3)
    check(head(nn.Conv2d(2, 2, 2), x), loss_fn, x, draw(samples))


def test_absolute_errors_have_the_networks_curvature_alone() -> None:
    x = torch.randn(4, 2, 3, 3)
    found = check(head(nn.Conv2d(2, 2, 2), x), nn.L1Loss(), x, torch.randn(4, 3))
    assert found["0.weight"].any() and not found["3.weight"].any()


def test_positions_in_the_output() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, 4, 2))
    loss_fn = nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1)
    check(model, loss_fn, torch.randn(3, 2, 6), torch.randint(4, (3, 4)))


@given(st.data())
def test_geometries(draw: st.DataObject) -> None:
    groups = draw.draw(st.integers(1, 2))
    kernel, stride, dilation = (draw.draw(st.integers(1, 3)) for _ in range(3))
    padding = draw.draw(st.integers(0, 2))
    least = max(1, dilation * (kernel - 1) + 1 - 2 * padding)
    size = draw.draw(st.integers(least, max(least, 5)))
    layer = nn.Conv1d(2, 2, kernel, stride, padding, dilation, groups)
    x = torch.randn(2, 2, size)
    check(head(layer, x), nn.CrossEntropyLoss(), x, torch.randint(3, (2,)))


class Branches(Residual):
    """Skips, an activation of a sum, a gate of another branch, and one branch read twice."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.stem(x))
        y = y + F.softplus(self.norm(self.shared(y)))
        y = y * self.side(x).sigmoid()
        return self.head(torch.cat([y.mean((2, 3)), y.amax((2, 3))], 1))


def test_branches() -> None:
    check(Branches().eval(), nn.CrossEntropyLoss(), *data(3))


class Twins(nn.Module):
    """One layer on two inputs: its tangents add up, and never meet in a product."""

    def __init__(self) -> None:
        super().__init__()
        self.twin, self.head = nn.Conv2d(1, 3, 3), nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, other = (self.twin(each) for each in x.split(1, 1))
        return self.head((one.tanh() + other).sin().flatten(1))


def test_weights_shared_side_by_side() -> None:
    check(Twins(), nn.CrossEntropyLoss(), *data(3))


def test_frozen_and_chosen_parameters() -> None:
    x, y = torch.randn(3, 2, 4, 4), torch.randint(3, (3,))
    model = head(nn.Conv2d(2, 3, 3), x)
    model[0].bias.requires_grad_(False)
    check(model, nn.CrossEntropyLoss(), x, y)
    check(model, nn.CrossEntropyLoss(), x, y, ["0.weight", "3.bias"])


def test_only_what_is_behind() -> None:
    """Layers that are no problem to parameters after them are not looked at."""
    model, (x, y) = Residual().eval(), data(3)
    check(model, nn.CrossEntropyLoss(), x, y, ["head.weight", "head.bias"])
    small = head(nn.Conv2d(2, 3, 3), x)
    found = tnconv.hessian_diagonal(
        small, nn.CrossEntropyLoss(), x, y, ["3.weight"], most_features=0
    )
    assert list(found) == ["3.weight"]


def test_nothing_is_left_behind() -> None:
    model, (x, y) = Branches().eval(), data(3)
    before, state = torch.get_rng_state(), {n: v.clone() for n, v in model.state_dict().items()}
    found = tnconv.hessian_diagonal(model, nn.CrossEntropyLoss(), x, y)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(value.requires_grad for value in found.values())
    F.cross_entropy(model(x), y).backward()


def test_compiled_model() -> None:
    x, y = torch.randn(3, 2, 4, 4), torch.randint(3, (3,))
    model = head(nn.Conv2d(2, 3, 3), x)
    expected = tnconv.hessian_diagonal(model, nn.CrossEntropyLoss(), x, y)
    compiled = torch.compile(model, backend="aot_eager")
    found = tnconv.hessian_diagonal(compiled, nn.CrossEntropyLoss(), x, y)
    for name, value in expected.items():
        assert_close(found[name], value, 1e-12)


@given(st.integers(0, 10), st.integers(1, 4), st.integers(1, 50))
def test_roots(seed: int, samples: int, features: int) -> None:
    values = torch.randn(samples, features, generator=torch.Generator().manual_seed(seed))
    columns = [*roots(values), torch.zeros(0, samples, features)]
    gram = torch.einsum("mna,mnb->nab", torch.cat(columns), torch.cat(columns))
    assert_close(gram, torch.diag_embed(values.clamp(min=0)), 1e-12)
    positive = int((values > 0).sum(1).max())
    assert sum(len(each) for each in columns) == positive <= features


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Sigmoid(), nn.Tanh(), nn.ELU(), nn.LogSigmoid()])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equal_to_backpack(act: nn.Module, reduction: str) -> None:
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    x, y = torch.randn(4, 2, 6, 6), torch.randint(3, (4,))
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, 2, 1, groups=2), act, nn.MaxPool2d(2, 1), nn.Flatten()),
        *(nn.Linear(16, 5), type(act)(), nn.Linear(5, 3)),
    )
    found = tnconv.hessian_diagonal(model, loss_fn, x, y)
    each = tnconv.hessian_diagonal(model, loss_fn, x, y, per_sample=True)
    loss = backpack.extend(loss_fn)(backpack.extend(model)(x), y)
    with backpack.backpack(extensions.DiagHessian(), extensions.BatchDiagHessian()):
        loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(found[name], parameter.diag_h, 1e-10)
        assert_close(each[name], parameter.diag_h_batch, 1e-10)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.gain.abs()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.Softmax(1)), "Softmax after layer '0' couples entries"),
        (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), "NativeLayerNorm of layer '1'"),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "layer '1' normalises by the batch's"),
        (Bare(), "no diagram describes what parameter 'gain' does"),
    ],
)
def test_networks_that_are_refused(model: nn.Module, message: str) -> None:
    x, y = torch.randn(4, 3), torch.randint(3, (4,))
    with pytest.raises(NotImplementedError, match=message):
        tnconv.hessian_diagonal(model.double(), nn.CrossEntropyLoss(), x, y)
    assert hooks(model) == 0


def test_products_of_a_branch_with_itself_are_refused() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y * y.flip(1)

    x, y = torch.randn(4, 3), torch.randint(3, (4,))
    with pytest.raises(NotImplementedError, match="Mul after layer 'layer' couples entries"):
        tnconv.hessian_diagonal(Square(), nn.CrossEntropyLoss(), x, y)


def test_weights_shared_one_after_the_other_are_refused() -> None:
    """There a tangent meets itself in a layer."""
    with pytest.raises(NotImplementedError, match="Convolution of layer 'shared' couples"):
        tnconv.hessian_diagonal(Residual().eval(), nn.CrossEntropyLoss(), *data())


def test_errors() -> None:
    x, y, loss_fn = torch.randn(4, 3), torch.randint(3, (4,)), nn.CrossEntropyLoss()
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    with pytest.raises(NotImplementedError, match="Tanh after layer '0' has 5 features, each of"):
        tnconv.hessian_diagonal(model, loss_fn, x, y, most_features=4)
    with pytest.raises(ValueError, match=r"no parameters that learn are called 3\.weight"):
        tnconv.hessian_diagonal(model, loss_fn, x, y, ["3.weight", "0.bias"])
    with pytest.raises(NotImplementedError, match="no second derivative is known of the loss"):
        tnconv.hessian_diagonal(model, nn.HuberLoss(), x, torch.randn(4, 3))
    assert hooks(model) == 0


LAYOUTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "time in the batch": lambda m, x: m(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1),
    "time first": lambda m, x: m(x.transpose(0, 1)).mean(0),
    "time first, in the batch": lambda m, x: (
        m(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], x.shape[0])).mean(0)
    ),
    "logits in rows": lambda m, x: m(x).flatten(0, 1),
    "logits after time": lambda m, x: m(x.transpose(0, 1)).flatten(0, 1),
}


class Laid(nn.Module):
    """Layers that see the batch where a function puts it."""

    def __init__(self, layers: nn.Module, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers, self.how = layers, forward

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.layers, x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("steps", [3, 4])
def test_samples_are_where_they_are_said_to_be(layout: str, act: Any, steps: int) -> None:
    """Also where another dimension has the batch's size."""
    layers = nn.Sequential(nn.Linear(2, 3), act(), nn.Linear(3, 2))
    model, x = Laid(layers, LAYOUTS[layout]), torch.randn(4, steps, 2)
    y, loss_fn = torch.randint(2, (len(model(x)),)), nn.CrossEntropyLoss(reduction="sum")
    found = tnconv.hessian_diagonal(model, loss_fn, x, y)
    theta, named = flat(model, list(found))
    dense = hessian(lambda v: loss_fn(functional_call(model, named(v), (x,)), y))(theta)
    assert_close(torch.cat([d.flatten() for d in found.values()]), dense.diagonal(), 1e-10)
    each = tnconv.hessian_diagonal(model, loss_fn, x, y, per_sample=True)
    turned = Laid(layers, lambda m, x: LAYOUTS[layout](m, x.transpose(0, 1)))
    again = tnconv.hessian_diagonal(
        turned, loss_fn, x.transpose(0, 1), y, per_sample=True, batch_dim=1
    )
    own = "rows" in layout
    for n in range(4):
        at = slice(n * steps, (n + 1) * steps) if own else slice(n, None, 4)
        alone = tnconv.hessian_diagonal(model, loss_fn, x[n : n + 1], y[at])
        for name, value in alone.items():
            assert_close(each[name][n], value, 1e-10)
            assert_close(again[name][n], value, 1e-10)
