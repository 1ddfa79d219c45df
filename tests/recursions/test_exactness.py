"""Where the recursion is exact (reference: full Hessians of torch.func), and known mistakes."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, hessian

import tnconv
from tests.recursions.oracle import Network, explicit
from tests.strategies import assert_close

pytestmark = pytest.mark.usefixtures("float64")


def exact(model: nn.Module, loss_fn, x: Tensor, targets, name: str) -> Tensor:
    """The diagonal of the full Hessian in one parameter."""
    p = model.get_parameter(name).detach()
    whole = hessian(lambda p: loss_fn(functional_call(model, {name: p}, (x,)), targets))(p)
    return whole.reshape(p.numel(), p.numel()).diagonal().reshape(p.shape)


def distance(model, loss_fn, x: Tensor, targets, name: str, method: str = "hesscale") -> float:
    """Relative to the exact diagonal."""
    found = tnconv.hesscale(model, loss_fn, x, targets, method)[name]
    expected = exact(model, loss_fn, x, targets, name)
    return float((found - expected).abs().max() / expected.abs().max())


def mlp(*widths: int, act: type[nn.Module] = nn.Tanh, last: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for one, two in pairwise(widths):
        layers += [nn.Linear(one, two), act()]
    return nn.Sequential(*layers[: None if last else -1])


def classes(samples: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    return nn.CrossEntropyLoss(), torch.randn(samples, 5), torch.randint(4, (samples,))


def squares(outputs: int = 4, samples: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    return nn.MSELoss(), torch.randn(samples, 5), torch.randn(samples, outputs)


@pytest.mark.parametrize("act", [nn.Tanh, nn.Sigmoid, nn.SiLU, nn.ReLU])
@pytest.mark.parametrize("task", [classes, squares])
def test_e1_the_last_linear_layer_is_exact(task, act: type[nn.Module]) -> None:
    model, (loss_fn, x, y) = mlp(5, 6, 6, 4, act=act), task()
    for name in ("4.weight", "4.bias"):
        assert distance(model, loss_fn, x, y, name) < 1e-12
        assert distance(model, loss_fn, x, y, name, "gn") < 1e-12


@pytest.mark.parametrize("act", [nn.Tanh, nn.Sigmoid, nn.SiLU])
def test_e2_the_last_two_are_exact_for_a_diagonal_output_hessian(act: type[nn.Module]) -> None:
    model, (loss_fn, x, y) = mlp(5, 6, 6, 4, act=act), squares()
    for name in ("2.weight", "2.bias", "4.weight"):
        assert distance(model, loss_fn, x, y, name) < 1e-12
    assert distance(model, loss_fn, x, y, "0.weight") > 1e-3
    loss_fn, x, y = classes()
    assert distance(model, loss_fn, x, y, "2.weight") > 1e-3


@pytest.mark.parametrize("act", [nn.Tanh, nn.Sigmoid, nn.GELU])
def test_e3_chains_of_width_one_are_exact(act: type[nn.Module]) -> None:
    model, (loss_fn, x, y) = mlp(5, 1, 1, 1, 1, act=act, last=True), squares(1)
    for name, _ in model.named_parameters():
        assert distance(model, loss_fn, x, y, name) < 1e-11


@pytest.mark.parametrize("act", [nn.ReLU, nn.LeakyReLU, nn.Identity])
def test_e4_piecewise_linear_networks_have_no_second_derivatives(act: type[nn.Module]) -> None:
    model, (loss_fn, x, y) = mlp(5, 6, 6, 4, act=act), classes()
    one = tnconv.hesscale(model, loss_fn, x, y)
    two = tnconv.hesscale(model, loss_fn, x, y, "gn")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_e5_convolutions() -> None:
    loss_fn, x = nn.MSELoss(), torch.randn(3, 2, 4, 4)
    last = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 2))
    assert distance(last, loss_fn, x, torch.randn(3, 2, 1, 1), "2.weight") < 1e-12
    full = nn.Sequential(nn.Conv2d(2, 3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(3, 2))
    assert distance(full, loss_fn, x, torch.randn(3, 2), "0.weight") < 1e-12
    ones = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Conv2d(3, 2, 1))
    assert distance(ones, loss_fn, x, torch.randn(3, 2, 4, 4), "0.weight") < 1e-12
    mixed = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))
    assert distance(mixed, loss_fn, x, torch.randn(3, 2), "0.weight") > 1e-2


def test_e6_the_last_bias_sums_to_what_the_loss_says() -> None:
    model, (loss_fn, x, y) = mlp(5, 6, 4), classes()
    p = model(x).softmax(1)
    expected = (1 - p.square().sum(1)).mean().detach()
    assert_close(tnconv.hesscale(model, loss_fn, x, y)["2.bias"].sum(), expected, 1e-12)
    loss_fn, x, y = squares()
    two = tnconv.hesscale(model, loss_fn, x, y)["2.bias"].sum()
    assert_close(two, torch.tensor(2.0), 1e-12)


@pytest.mark.parametrize("act", [nn.Tanh, nn.Sigmoid, nn.SiLU, nn.ReLU])
def test_e7_columns_make_the_last_two_exact_for_cross_entropy(act: type[nn.Module]) -> None:
    model, (loss_fn, x, y) = mlp(5, 6, 6, 4, act=act), classes()
    for name in ("2.weight", "2.bias", "4.weight", "4.bias"):
        assert distance(model, loss_fn, x, y, name, "hesscale+") < 1e-12
    weighted = nn.CrossEntropyLoss(torch.rand(4), label_smoothing=0.1)
    assert distance(model, weighted, x, y, "2.weight", "hesscale+") < 1e-12


def test_e7_through_views_activations_and_positions() -> None:
    """A linear layer over two positions, a convolution, and functions before the loss."""
    x, labels = torch.randn(3, 5), torch.randint(2, (3, 2))
    loss_fn = nn.CrossEntropyLoss()
    spatial = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Unflatten(1, (2, 2)))
    curved = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4, bias=False), nn.Sigmoid())
    for name in ("0.weight", "2.weight"):
        assert distance(spatial, loss_fn, x, labels, name, "hesscale+") < 1e-12
        args = loss_fn, x, torch.randint(4, (3,)), name
        assert distance(curved, *args, "hesscale+") < 1e-12
    image, labels = torch.randn(3, 2, 3, 3), torch.randint(4, (3, 2, 2))
    conv = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.ConvTranspose2d(3, 4, 2))
    assert distance(conv, loss_fn, image, labels, "0.weight", "hesscale+") < 1e-12
    tokens = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), Positions(), nn.Linear(3, 4), Classes())
    assert distance(tokens, loss_fn, x, labels[:, 0], "0.weight", "hesscale+") < 1e-12


class Positions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (2, 3)).transpose(1, 2).transpose(1, 2)


class Classes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1)


def test_gn_is_never_negative() -> None:
    model, (loss_fn, x, y) = mlp(5, 6, 6, 4), classes()
    assert all((s >= 0).all() for s in tnconv.hesscale(model, loss_fn, x, y, "gn").values())


IMAGE = (2, 2, 6, 6)


def small(*layers: nn.Module, shape: tuple[int, ...] = IMAGE) -> None:
    """Against the definition, behind an activation."""
    first = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)](2, 2, 1)
    x, features = torch.randn(shape), nn.Sequential(first, *layers, nn.Flatten())
    head = nn.Linear(features(x).shape[1], 3)
    network = Network(first, nn.Tanh(), *layers, nn.Flatten(), head)
    labels, loss_fn = torch.randint(3, (2,)), nn.CrossEntropyLoss()
    expected = explicit(network, x, loss_fn, labels)
    found = tnconv.hesscale(network, loss_fn, x, labels)
    for name, p in network.named_parameters():
        assert_close(found[name], expected[p], 1e-10)


def test_mistake_average_pooling_has_the_square_of_its_factor() -> None:
    """The published code has 1/|K|: 4 times too much for windows of 2 x 2."""
    small(nn.AvgPool2d(2))
    s = torch.randn(2, 3, 2, 2)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    edge = torch.autograd.graph.get_gradient_edge(nn.AvgPool2d(2)(x))
    flow = tnconv.recursions.Flow(None, s)
    found = tnconv.recursions.recursion(edge, flow, [x], curved=False)[x].diagonal
    assert_close(found, s.repeat_interleave(2, 2).repeat_interleave(2, 3) / 16, 1e-15)


def test_mistake_an_activation_before_the_loss_is_curved() -> None:
    """The published code drops f'' there; scalar chains show it, being exact."""
    model, (loss_fn, x, y) = mlp(5, 1, 1, last=True), squares(1)
    assert distance(model, loss_fn, x, y, "2.weight") < 1e-12
    assert distance(model, loss_fn, x, y, "2.weight", "gn") > 1e-2


def test_mistake_transposed_convolutions_square_their_weight() -> None:
    small(nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1), nn.Tanh())


@pytest.mark.parametrize("dims", [1, 3])
def test_mistake_activations_after_convolutions_of_one_and_three_dimensions(dims: int) -> None:
    layer = {1: nn.Conv1d, 3: nn.Conv3d}[dims](2, 2, 2)
    small(layer, nn.Tanh(), shape=(2, 2, *[3] * dims))


@pytest.mark.parametrize("kernel", [2, 3])
def test_mistake_same_padding(kernel: int) -> None:
    small(nn.Conv2d(2, 3, kernel, padding="same"), nn.Tanh())


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_mistake_padding_modes_are_not_zeros(mode: str) -> None:
    small(nn.Conv2d(2, 3, 3, padding=(1, 1), padding_mode=mode), nn.Tanh())


@st.composite
def padded(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolution whose padding repeats entries, in one or two dimensions."""
    dims = draw(st.sampled_from([1, 1, 2]))
    size = draw(st.integers(3, 6))
    kernel, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    pad = draw(st.integers(0, size - 1))
    while dilation * (kernel - 1) + 1 > size + 2 * pad:
        kernel -= 1
    mode = draw(st.sampled_from(["reflect", "replicate"]))
    how = {"stride": draw(st.integers(1, 3)), "dilation": dilation, "groups": 2}
    kind = {1: nn.Conv1d, 2: nn.Conv2d}[dims]
    return kind(2, 4, kernel, padding=pad, padding_mode=mode, **how), (2, 2, *[size] * dims)


@given(padded())
def test_paddings_that_repeat_entries(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    layer, shape = case
    small(layer.double(), shape=shape)
