"""Maps of parameters: inverses, derivatives and determinants against dense Jacobians."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

from tests.geometry.networks import FEW, LOSS, Pair, jacobian, network, pairs
from tests.strategies import assert_close
from tnconv.geometry import (
    BatchNormFold,
    Bilinear,
    Covector,
    DiagonalScale,
    Elementwise,
    Endomorphism,
    Euclidean,
    Kronecker,
    KroneckerAffine,
    Permutation,
    TorchParametrization,
    Vector,
    WeightNorm,
    kfac_metric,
    parametrization_map,
    permuted_channels,
    points_of,
    relu_rescale,
)
from tnconv.geometry.points import split
from tnconv.quantities import KroneckerFactors

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
    "permuted rows": lambda: Permutation({"a": (1, torch.tensor([[2, 0, 1], [0, 2, 1]]))}),
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
    v, u = (type(each)(dict(reversed(each.parts.items()))) for each in (v, at_psi[1]))
    assert_close(map.jvp(theta, v).flat(psi), dense @ given, 1e-11)  # the order says nothing
    assert_close(map.vjp(theta, u).flat(theta), dense.T @ given, 1e-11)
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
    shape = Euclidean(theta).raised(form)
    moved = [map.transport(theta, each) for each in (v, u, form, shape)]
    assert_close(moved[3](moved[0]).flat(), map.transport(theta, shape(v)).flat(), 1e-10)
    jac = jacobian(map, theta)
    assert_close(moved[3].dense(), jac @ matrix @ torch.linalg.inv(jac), 1e-9)
    assert_close((shape @ shape + shape).dense(), matrix @ matrix + matrix, 1e-12)
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
    shape = Endomorphism(lambda w: w, u.parts)
    with pytest.raises(TypeError, match="an endomorphism and a Bilinear have no sum; expected two"):
        shape + Bilinear(lambda w: u, u.parts)
    with pytest.raises(TypeError, match="an endomorphism and a Vector have no composition"):
        shape @ v
    with pytest.raises(TypeError, match="the argument is a Covector; expected a Vector"):
        shape(u)
    with pytest.raises(ValueError, match="different parameters; only one has b"):
        v + Vector({"w": torch.ones(2), "b": torch.ones(1)})
    assert float((2 * v + v - v * 0.5) @ u) == 5


@FEW
@given(pair=pairs())
def test_relu_rescaling_keeps_the_function(pair: Pair) -> None:
    model, x, _ = pair.build()
    count = relu_rescale(model, "0", "2", 2.0, x).factors["0.weight"].numel()
    channels = model[0](x).shape[1]
    for factor in (1024.0, torch.rand(channels) + 0.1):
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


@FEW
@given(pair=pairs(), data=st.data())
def test_permutations_keep_the_function(pair: Pair, data: st.DataObject) -> None:
    """Channels within their groups, before and after; not from one group to another."""
    model, x, _ = pair.build()
    channels, theta = model[0](x).shape[1], points_of(model)
    size = channels // max(pair.first.groups, pair.second.groups)
    own = data.draw(st.permutations(range(size)))
    order = [start + at for start in range(0, channels, size) for at in own]
    first = permuted_channels(model, "0", "2", order, x)
    count = model[2](model[1](model[0](x))).shape[1]
    if pair.second.groups == 1:
        first = permuted_channels(model, "2", "5", [*range(1, count), 0], x) @ first
    for name, back in first.inverse(first(theta)).items():
        assert torch.equal(back, theta[name])
    assert_close(functional_call(model, dict(first(theta)), (x,)), model(x).detach(), 1e-12)
    if size < channels:
        with pytest.raises(ValueError, match=r"has groups of \d+ .* channels; expected an order"):
            permuted_channels(model, "0", "2", [*range(1, channels), 0], x)


@FEW
@given(pair=pairs())
def test_affine_maps_of_layers(pair: Pair) -> None:
    """KFAC's factors follow where outputs are mixed within groups, in every kind of layer."""
    model, x, y = pair.build()
    theta, metric = points_of(model), kfac_metric(model, LOSS, [(x, y)])
    a, b = metric.factors["0.weight"]
    left = torch.eye(b.shape[-1]) + torch.rand_like(b) / 4
    right = torch.eye(a.shape[-1]) + torch.rand_like(a) / 4
    map = KroneckerAffine("0.weight", left, right, model=model)
    dense = jacobian(map, theta)
    assert_close(map.log_abs_det(theta), torch.linalg.slogdet(dense).logabsdet, 1e-10)
    for name, back in map.inverse(map(theta)).items():
        assert_close(back, theta[name], 1e-11)
    inverse = [torch.linalg.inv(each) for each in (right, left)]
    moved = [each.mT @ factor @ each for each, factor in zip(inverse, (a, b), strict=True)]
    factors = metric.factors | {"0.weight": KroneckerFactors(*moved)}
    there = Kronecker(factors, theta, model)
    assert_close(there.dense(), metric.pushforward(map, theta).dense(), 1e-10)


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
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_folded_batch_norm(kind, bias: bool) -> None:
    """In front of layers with groups, too; covectors and metrics go through the submersion."""
    torch.manual_seed(0)
    model = nn.Sequential(kind(2, 4, 2, groups=2, bias=bias), nn.BatchNorm2d(4)).eval()
    norm = model[1]
    for each in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        each.copy_(torch.rand(4) + 0.5)
    fold, x = BatchNormFold(model, "0", "1"), torch.randn(2, 2, 4, 4)
    psi = points_of(model)
    theta = fold.inverse(psi)
    single = kind(2, 4, 2, groups=2)
    given = {name.split(".")[1]: part for name, part in theta.items()}
    assert_close(functional_call(single, given, (x,)), model(x).detach(), 1e-12)
    for name, part in fold.inverse(fold(theta)).items():
        assert_close(part, theta[name], 1e-12)
    assert {name: part.shape for name, part in fold(theta).items()} == {
        name: part.shape for name, part in psi.items()
    }
    v = torch.randn_like(model(x))

    def dot(net, point) -> torch.Tensor:
        return (functional_call(net, point, (x,)) * v).sum()

    slope = Covector(torch.func.grad(lambda p: dot(single, p))(given))
    slope = Covector({f"0.{name}": g for name, g in slope.parts.items()})
    expected = torch.func.grad(lambda p: dot(model, p))(psi)
    for name, g in fold.inverse_vjp(psi, slope).parts.items():
        assert_close(g, expected[name], 1e-11)
    pushed = Euclidean(fold.inverse(fold(theta))).pushforward(fold, theta)
    assert pushed.degenerate and torch.linalg.matrix_rank(pushed.dense()) == pushed.size
