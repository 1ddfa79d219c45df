"""Layers that are described by users, with one input or several, or that decline a call."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tnconv
from tests.loops import first_order, per_sample_gradients
from tests.models.test_layers import QUANTITIES
from tests.strategies import assert_close
from tnconv import diagrams, quantities
from tnconv.diagrams import TensorNetwork, View
from tnconv.models import Operation, register_layer
from tnconv.models.layers import describes
from tnconv.nn import memory

pytestmark = pytest.mark.usefixtures("float64")


class Gated(nn.Module):
    """``y[n, o, d] = gate[n, o, d] Σ_c x[n, o, c] w[d, c]``: a product of two inputs."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, features))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gate * (x @ self.weight.T)


def gated(x_shape: tuple[int, ...], outputs: int) -> dict[str, TensorNetwork]:
    leading = ("n", *(f"o{at}" for at in range(1, len(x_shape) - 1)))
    sizes = dict(zip((*leading, "c", "d"), (*x_shape, outputs), strict=True))
    nodes = (
        diagrams.Tensor("x", View.of(sizes, *leading, "c")),
        diagrams.Tensor("gate", View.of(sizes, *leading, "d")),
        diagrams.Tensor("weight", View.of(sizes, "d", "c")),
    )
    return {"weight": TensorNetwork(nodes, View.of(sizes, *leading, "d"), sizes)}


@register_layer(Gated)
def _(layer: Gated, x: Tensor, gate: Tensor, output_shape: tuple[int, ...]):
    """Two or three dimensions: others are declined."""
    if x.dim() > 3:
        return None
    return Operation(gated, (tuple(x.shape), len(layer.weight))), {"x": x, "gate": gate}


class Pair(nn.Module):
    """A layer of two inputs between layers of one; ``calls`` of it, by keywords in either order."""

    def __init__(self, layer: nn.Module, calls: int) -> None:
        super().__init__()
        self.first, self.other, self.layer = nn.Linear(3, 4), nn.Linear(2, 5), layer
        self.calls = calls

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b, total = self.first(a), self.other(b).sigmoid(), 0
        for call in range(self.calls):
            names = ("input1", "input2") if isinstance(self.layer, nn.Bilinear) else ("x", "gate")
            given = {names[1]: b, names[0]: a} if call else {names[0]: a, names[1]: b}
            total = total + (self.layer(a, b) if call == 2 else self.layer(**given)).tanh()
            b = b * 0.5
        return total.flatten(1)


def check_first_order(model: nn.Module, inputs, targets: Tensor) -> None:
    loss_fn = nn.MSELoss(reduction="sum")
    result = tnconv.compute(model, loss_fn, inputs, targets, QUANTITIES)
    each = per_sample_gradients(model, loss_fn, inputs, targets, 1)
    for name, gradients in each.items():
        for kind, expected in first_order(gradients).items():
            assert_close(result[getattr(quantities, kind)][name], expected, 1e-10)


@pytest.mark.filterwarnings("error")
@given(
    positions=st.lists(st.integers(1, 3), max_size=1),
    samples=st.integers(1, 4),
    calls=st.integers(1, 3),
    bilinear=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_layers_of_two_inputs(positions, samples, calls, bilinear, bias, seed) -> None:
    torch.manual_seed(seed)
    layer = nn.Bilinear(4, 5, 3, bias=bias) if bilinear else Gated(4, 5)
    model = Pair(layer, calls)
    inputs = torch.randn(samples, *positions, 3), torch.randn(samples, *positions, 2)
    check_first_order(model, inputs, torch.randn_like(model(*inputs)))


def test_curvature_of_a_bilinear_layer() -> None:
    """One position: the exact block is the sum over samples of B kron A of each."""
    model, y = Pair(nn.Bilinear(4, 5, 3), 1), torch.randn(1, 3)
    inputs, loss_fn = (torch.randn(1, 3), torch.randn(1, 2)), nn.MSELoss()
    kfac, diagonal = quantities.KFAC("expand", "type-2"), quantities.GGNDiagonal()
    result = tnconv.compute(model, loss_fn, inputs, y, [kfac, diagonal])
    for name in ("layer.weight", "layer.bias", "first.weight"):
        expected = result[diagonal][name].flatten()
        assert_close(result[kfac][name].blocks[0].diagonal(), expected, 1e-10)


@pytest.mark.parametrize("kind", [lambda: nn.Bilinear(4, 5, 3), lambda: Gated(4, 5)])
def test_declined_and_undescribed_calls(kind) -> None:
    model = Pair(layer := kind(), 1)
    inputs = torch.randn(3, 2, 2, 3), torch.randn(3, 2, 2, 2)
    targets = torch.randn_like(model(*inputs))
    if isinstance(layer, Gated):
        assert describes(layer) and not describes(layer, [torch.zeros(1, 1, 1, 4)] * 2)
    check_first_order(model, inputs, targets)


def test_an_object_with_a_forward_of_its_own_is_not_described() -> None:
    layer = nn.Linear(3, 4)
    assert describes(layer)
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight, layer.bias)
    assert not describes(layer)


class Flat(nn.Module):
    """A linear layer as GPT-2 writes it: a product of rows, then a view."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(features, outputs)),
            nn.Parameter(torch.randn(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


VIEWS = {
    "none": lambda y: y,
    "in place": lambda y: y.add_(1),
    "activation in place": lambda y: torch.relu_(y),
    "part": lambda y: y[..., :2],
    "flat": lambda y: y.flatten(1),
    "transposed": lambda y: y.transpose(-1, 1),
}


class Viewed(nn.Module):
    def __init__(self, then: str) -> None:
        super().__init__()
        self.first, self.flat, self.then = nn.Linear(5, 4), Flat(4, 3), VIEWS[then]

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.flat(self.first(x))).flatten(1)


@pytest.mark.filterwarnings("error")
@given(
    positions=st.lists(st.integers(1, 3), max_size=2),
    samples=st.integers(1, 4),
    then=st.sampled_from(sorted(VIEWS)),
)
def test_layers_whose_output_is_a_view(positions, samples, then) -> None:
    model, x = Viewed(then), torch.randn(samples, *positions, 5)
    check_first_order(model, (x,), torch.randn_like(model(x)))


def test_linear_layers_of_transformers() -> None:
    """Recognised by their name, without a warning, in quantities and in KFAC's blocks."""
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(nn.Linear(5, 4), Conv1D(3, 4), nn.Flatten())
    x, y = torch.randn(6, 2, 5), torch.randn(6, 6)
    assert describes(model[1])
    check_first_order(model, (x,), y)
    plain = nn.Sequential(copy.deepcopy(model[0]), nn.Linear(4, 3), nn.Flatten())
    plain[1].weight = nn.Parameter(model[1].weight.detach().T.clone())
    plain[1].bias = nn.Parameter(model[1].bias.detach().clone())
    steps = []
    for each in (model, plain):
        optimizer = tnconv.optim.KFAC(each, lr=0.1, fisher="empirical")
        nn.MSELoss()(each(x), y).backward()
        optimizer.step()
        steps.append([*each[1].parameters()])
    (weight, bias), (expected, other) = steps
    assert_close(weight.T, expected, 1e-6)
    assert_close(bias, other, 1e-6)


def owned():
    """Every module of this library's that holds parameters."""
    for room in (tnconv.nn, memory):
        for name in room.__all__:
            kind = getattr(room, name)
            if isinstance(kind, type) and issubclass(kind, nn.Module):
                yield kind


def made(kind: type[nn.Module]) -> nn.Module:
    """A small one, whatever its arguments are called."""
    for arguments in ((2, 4), (2, 4, 2), (1, 2, 4, 2), (2,), ()):
        try:
            return kind(*arguments)
        except (TypeError, ValueError):
            continue
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", [*owned()], ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_layer_of_this_library_is_described(kind) -> None:
    layer = made(kind)
    if next(layer.parameters(), None) is not None or "InstanceNorm" in kind.__name__:
        assert describes(layer)
