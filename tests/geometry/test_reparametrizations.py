"""Maps of parameters: inverses, derivatives and determinants against dense Jacobians."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

from tests.geometry.networks import PAIRS, jacobian, network
from tests.strategies import assert_close
from tnconv.geometry import (
    BatchNormFold,
    Bilinear,
    Covector,
    DiagonalScale,
    Elementwise,
    KroneckerAffine,
    Permutation,
    TorchParametrization,
    Vector,
    WeightNorm,
    parametrization_map,
    permuted_channels,
    relu_rescale,
)
from tnconv.geometry.points import split

pytestmark = pytest.mark.usefixtures("float64")


def point():
    """Positive entries, so that every map is defined in both directions."""
    torch.manual_seed(0)
    return {"a": torch.rand(2, 3) / 2 + 0.2, "b": torch.rand(4) / 2 + 0.2}


def affine() -> KroneckerAffine:
    torch.manual_seed(1)
    return KroneckerAffine("a", torch.randn(2, 2), torch.randn(3, 3), torch.randn(2, 3))


MAPS = {
    "scale": lambda: DiagonalScale({"a": torch.tensor([2.0, -3.0, 0.5]), "b": 4.0}),
    "exp": lambda: Elementwise("exp"),
    "log": lambda: Elementwise("exp").inverted(),
    "softplus": lambda: Elementwise("softplus", ["a"]),
    "tanh": lambda: Elementwise("tanh"),
    "sinh": lambda: Elementwise("sinh"),
    "asinh": lambda: Elementwise("sinh").inverted(),
    "affine": affine,
    "permutation": lambda: Permutation({"a": (1, torch.tensor([2, 0, 1]))}),
    "composed": lambda: Elementwise("sinh", ["b"]) @ affine() @ Elementwise("exp"),
}


@pytest.mark.parametrize("name", MAPS)
def test_derivatives(name: str) -> None:
    map, theta = MAPS[name](), point()
    psi, dense = map(theta), jacobian(map, theta)
    for key, back in map.inverse(psi).items():
        assert_close(back, theta[key], 1e-12)
    given = torch.randn(10)
    v, u = Vector(split(given, theta)), Covector(split(given, theta))
    at_psi = Vector(split(given, psi)), Covector(split(given, psi))
    assert_close(map.jvp(theta, v).flat(), dense @ given, 1e-11)
    assert_close(map.vjp(theta, at_psi[1]).flat(), dense.T @ given, 1e-11)
    assert_close(map.inverse_jvp(psi, at_psi[0]).flat(), torch.linalg.solve(dense, given), 1e-10)
    expected = torch.linalg.solve(dense.T, given)
    assert_close(map.inverse_vjp(psi, u).flat(), expected, 1e-10)
    assert_close(map.log_abs_det(theta), torch.linalg.slogdet(dense).logabsdet, 1e-10)
    other = jacobian(map, {key: part * 1.1 for key, part in theta.items()})
    assert map.linear == torch.allclose(dense, other, rtol=1e-12)
    assert map.diagonal == torch.equal(dense, dense.diagonal().diag())


def test_transport() -> None:
    """Pairings and forms are numbers, whatever the parameters."""
    map, theta = MAPS["composed"](), point()
    psi = map(theta)
    v, u = Vector(split(torch.randn(10), theta)), Covector(split(torch.randn(10), theta))
    matrix = torch.randn(10, 10)
    matrix = matrix + matrix.T
    form = Bilinear(lambda w: Covector(split(matrix @ w.flat(), theta)), theta)
    moved = [map.transport(theta, each) for each in (v, u, form)]
    assert_close(moved[0] @ moved[1], v @ u, 1e-12)
    assert_close(moved[2](moved[0]) @ moved[0], form(v) @ v, 1e-11)
    assert moved[2].space.keys() == psi.keys()


def test_types() -> None:
    v, u = Vector({"w": torch.ones(2)}), Covector({"w": torch.ones(2)})
    with pytest.raises(TypeError, match="a vector and a covector have no sum; expected two vecto"):
        v + u
    with pytest.raises(TypeError, match="a covector and a vector have no sum"):
        u - v
    with pytest.raises(TypeError, match="a Vector and a Vector have no pairing"):
        v @ v
    with pytest.raises(TypeError, match="the argument is a Covector; expected a Vector"):
        Bilinear(lambda w: u, u.parts)(u)
    with pytest.raises(TypeError, match="a bilinear form and a Vector have no sum"):
        Bilinear(lambda w: u, u.parts) + v
    with pytest.raises(ValueError, match="different parameters; only one has b"):
        v + Vector({"w": torch.ones(2), "b": torch.ones(1)})
    assert float((2 * v + v - v * 0.5) @ u) == 5


@pytest.mark.parametrize("kind", PAIRS)
def test_relu_rescaling_keeps_the_function(kind: str) -> None:
    model, x, _ = network(kind)
    count = relu_rescale(model, "0", "2", 2.0, x).factors["0.weight"].numel()
    channels = model[0](x).shape[1]
    for factor in (1000.0, torch.rand(channels) + 0.1):
        map = relu_rescale(model, "0", "2", factor, x)
        theta = {name: p.detach() for name, p in model.named_parameters()}
        assert_close(functional_call(model, dict(map(theta)), (x,)), model(x).detach(), 1e-11)
    assert count == model[0].weight.numel()
    last = relu_rescale(model, "2", "5", 4.0, x)  # through the flattening
    theta = {name: p.detach() for name, p in model.named_parameters()}
    assert torch.equal(functional_call(model, dict(last(theta)), (x,)), model(x))


def test_what_is_no_symmetry_is_refused() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3)
    smooth = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"outputs change by .* not positively homogeneous"):
        relu_rescale(smooth, "0", "2", 2.0, x)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="not positive; expected a > 0"):
        relu_rescale(model, "0", "2", -1.0, x)
    with pytest.raises(ValueError, match="layer '2' reads 5 channels, '0' writes 4"):
        relu_rescale(nn.Sequential(model[0], nn.ReLU(), nn.Linear(5, 2)), "0", "2", 2.0, x)
    with pytest.raises(ValueError, match="order is no permutation of 4 channels"):
        permuted_channels(model, "0", "2", [0, 1, 2, 2], x)
    with pytest.raises(ValueError, match="have no c; expected all that the map names"):
        DiagonalScale({"c": 2.0})(point())
    with pytest.raises(ValueError, match="'a' has entries that are zero or not finite"):
        DiagonalScale({"a": 0.0})
    with pytest.raises(ValueError, match="function is 'cos'; expected one of 'exp'"):
        Elementwise("cos")


@pytest.mark.parametrize("kind", ["plain", "signal", "linear"])
def test_permutations_keep_the_function(kind: str) -> None:
    model, x, _ = network(kind)
    channels = model[0](x).shape[1]
    theta = {name: p.detach() for name, p in model.named_parameters()}
    first = permuted_channels(model, "0", "2", [*range(1, channels), 0], x)
    count = model[2](model[1](model[0](x))).shape[1]
    second = permuted_channels(model, "2", "5", [*range(1, count), 0], x)
    both = second @ first
    assert_close(functional_call(model, dict(both(theta)), (x,)), model(x).detach(), 1e-12)
    with pytest.raises(ValueError, match="layer '0' has groups"):
        grouped, x, _ = network("groups")
        permuted_channels(grouped, "0", "2", [1, 0, 2, 3], x)


def test_parametrizations_of_networks() -> None:
    model, _, _ = network("groups")
    map = parametrization_map(model, "ntk")
    assert_close(map.factors["0.weight"], torch.tensor(4**0.5), 1e-12)
    assert_close(map.factors["2.weight"], torch.tensor(8**0.5), 1e-12)
    assert "0.bias" not in map.factors


class Exp(nn.Module):
    def forward(self, x):
        return x.exp()

    def right_inverse(self, y):
        return y.log()


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT

    def right_inverse(self, y):
        return y.triu()


def test_torch_parametrizations() -> None:
    layer = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    layer[0].weight.data.abs_()
    weight = layer[0].weight.detach().clone()
    parametrize.register_parametrization(layer[0], "weight", Exp())
    map = TorchParametrization(layer)
    stored = dict(layer.named_parameters())
    used = map.inverse(stored)
    assert map.bijective and used.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert_close(used["0.weight"].detach(), weight, 1e-12)
    theta = {name: part.detach() for name, part in used.items()}
    dense = jacobian(map, theta)
    assert_close(map.log_abs_det(theta), torch.linalg.slogdet(dense).logabsdet, 1e-10)
    parametrize.register_parametrization(layer[1], "weight", Symmetric())
    assert not TorchParametrization(layer).bijective
    normed = parametrizations.weight_norm(nn.Linear(3, 2))
    map = TorchParametrization(normed)
    own = WeightNorm(["weight"])
    psi = {name: p.detach() for name, p in normed.named_parameters()}
    theta = map.inverse(psi)
    assert not map.bijective
    assert_close(theta["weight"], normed.weight.detach(), 1e-12)
    for name, part in zip(("weight_g", "weight_v"), list(map(theta).values())[1:], strict=True):
        assert_close(own(theta)[name], part, 1e-12)


def test_submersions() -> None:
    torch.manual_seed(0)
    theta = {"w": torch.randn(2, 3), "b": torch.randn(2)}
    norm = WeightNorm(["w"])
    for name, part in norm.inverse(norm(theta)).items():
        assert_close(part, theta[name], 1e-12)
    for call in (
        lambda: norm.jvp(theta, Vector(theta)),
        lambda: norm.vjp(theta, Covector(theta)),
        lambda: norm.log_abs_det(theta),
        lambda: norm.transport(theta, Vector(theta)),
        lambda: norm.inverted(),
    ):
        with pytest.raises(ValueError, match="WeightNorm is no bijection and has no"):
            call()


@pytest.mark.parametrize("bias", [True, False])
def test_folded_batch_norm(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2, bias=bias), nn.BatchNorm2d(3)).eval()
    norm = model[1]
    for each in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        each.copy_(torch.rand(3) + 0.5)
    fold, x = BatchNormFold(model, "0", "1"), torch.randn(2, 2, 4, 4)
    psi = {name: p.detach() for name, p in model.named_parameters()}
    theta = fold.inverse(psi)
    folded = torch.nn.functional.conv2d(x, theta["0.weight"], theta["0.bias"])
    assert_close(folded, model(x).detach(), 1e-12)
    for name, part in fold.inverse(fold(theta)).items():
        assert_close(part, theta[name], 1e-12)
    assert {name: part.shape for name, part in fold(theta).items()} == {
        name: part.shape for name, part in psi.items()
    }
