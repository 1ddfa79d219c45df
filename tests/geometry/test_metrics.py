"""Metrics against their dense matrices, and against what they are made of."""

import copy

import pytest
import torch
from torch import nn

import tnconv
from tests.geometry.networks import LOSS, jacobian, network, roots
from tests.strategies import assert_close
from tnconv.geometry import (
    BlockDiagonal,
    Covector,
    Dense,
    Diagonal,
    DiagonalScale,
    Elementwise,
    Euclidean,
    Kronecker,
    LowRank,
    Metric,
    Vector,
    adam_metric,
    ekfac_metric,
    ggn_diagonal_metric,
    ggn_metric,
    kfac_metric,
    natural_gradient,
    relu_rescale,
    shampoo_metric,
)
from tnconv.geometry.curvature_metrics import points_of
from tnconv.geometry.points import split
from tnconv.quantities import KroneckerFactors

pytestmark = pytest.mark.usefixtures("float64")


def batches(x, y):
    return [(x[:2], y[:2]), (x[2:], y[2:])]


def trained(model, x, y, make) -> torch.optim.Optimizer:
    optimizer = make(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()
    return optimizer


def random_factors(theta, model) -> Kronecker:
    """Positive definite ones."""
    own = kfac_metric(model, LOSS, [network("groups")[1:]])
    found = {}
    for name, (a, b) in own.factors.items():
        draws = [torch.randn_like(each) for each in (a, b)]
        found[name] = KroneckerFactors(*[d @ d.mT + torch.eye(d.shape[-1]) for d in draws])
    return Kronecker(found, theta, model)


def shampoo(theta) -> Metric:
    def square(size: int) -> torch.Tensor:
        draw = torch.randn(size, size)
        return draw @ draw.T + torch.eye(size)

    sizes = {n: (len(p), p[0].numel() if p.dim() > 1 else 1) for n, p in theta.items()}
    return shampoo_metric({n: (square(d), square(a)) for n, (d, a) in sizes.items()}, theta)


def halves(theta) -> Metric:
    first = {name: part for name, part in theta.items() if name.endswith("weight")}
    second = {name: part for name, part in theta.items() if name not in first}
    return BlockDiagonal([3.0 * Euclidean(second), Diagonal({n: p**2 for n, p in first.items()})])


METRICS = {
    "euclidean": lambda model, theta, x, y: Euclidean(theta),
    "scaled": lambda model, theta, x, y: 3.0 * Diagonal({n: p**2 for n, p in theta.items()}),
    "adam": lambda model, theta, x, y: adam_metric(trained(model, x, y, torch.optim.Adam), model),
    "diagonal GGN": lambda model, theta, x, y: ggn_diagonal_metric(
        model, LOSS, batches(x, y), 1e-2 * Euclidean(theta)
    ),
    "low rank": lambda model, theta, x, y: LowRank(tnconv.low_rank_ggn(model, LOSS, x, y), 0.1),
    "KFAC": lambda model, theta, x, y: kfac_metric(model, LOSS, batches(x, y), 1e-2),
    "Kronecker": lambda model, theta, x, y: random_factors(theta, model),
    "EKFAC": lambda model, theta, x, y: ekfac_metric(random_factors(theta, model)),
    "Shampoo": lambda model, theta, x, y: shampoo(theta),
    "blocks": lambda model, theta, x, y: halves(theta),
    "sum": lambda model, theta, x, y: Euclidean(theta) + random_factors(theta, model),
    "pushed": lambda model, theta, x, y: random_factors(theta, model).pushforward(
        Elementwise("sinh") @ relu_rescale(model, "0", "2", 3.0, x), theta
    ),
    "pulled": lambda model, theta, x, y: Euclidean(theta).pullback(Elementwise("sinh"), theta),
}


@pytest.mark.parametrize("name", METRICS)
def test_products_roots_and_determinants(name: str) -> None:
    model, x, y = network("groups")
    metric = METRICS[name](model, points_of(model), x, y)
    dense, size = metric.dense(), metric.size
    assert dense.shape == (size, size) and torch.allclose(dense, dense.T, rtol=1e-9, atol=1e-12)
    draw = torch.randn(size)
    u = Covector(split(draw, metric.space))
    scale = dense.abs().max() * torch.linalg.inv(dense).abs().max()
    assert_close(metric.inverse_product(u).flat(), torch.linalg.solve(dense, draw), 1e-13 * scale)
    root = roots(metric)
    assert_close(root @ root.T, torch.linalg.inv(dense), 1e-13 * scale)
    assert_close(metric.root_transposed(u), root.T @ draw, 1e-11)
    assert_close(metric.logdet(), torch.linalg.slogdet(dense).logabsdet, 1e-9)
    v = Vector(split(draw, metric.space))
    assert_close(metric.norm(v), (draw @ dense @ draw).sqrt(), 1e-11)


@pytest.mark.parametrize("name", ["euclidean", "Kronecker", "low rank"])
def test_carried_along(name: str) -> None:
    """``J⁻ᵀ G J⁻¹``, and back."""
    model, x, y = network("groups")
    theta = points_of(model)
    metric = METRICS[name](model, theta, x, y)
    map = Elementwise("sinh") @ relu_rescale(model, "0", "2", 3.0, x)
    inverse = torch.linalg.inv(jacobian(map, theta))
    pushed = metric.pushforward(map, theta)
    assert_close(pushed.dense(), inverse.T @ metric.dense() @ inverse, 1e-9)
    assert_close(pushed.pullback(map, theta).dense(), metric.dense(), 1e-9)
    assert pushed.intrinsic == metric.intrinsic


def test_whose_matrices_they_are() -> None:
    model, x, y = network("groups")
    theta = points_of(model)
    matrix = tnconv.GGNOperator(model, LOSS, [(x, y)]) @ torch.eye(len(Vector(theta).flat()))
    eye = torch.eye(len(matrix))
    low = LowRank(tnconv.low_rank_ggn(model, LOSS, x, y), 0.1)
    assert_close(low.dense(), matrix + 0.1 * eye, 1e-10)
    diagonal = ggn_diagonal_metric(model, LOSS, batches(x, y), 1e-2 * Euclidean(theta))
    assert_close(diagonal.dense(), (matrix + 1e-2 * eye).diagonal().diag(), 1e-10)
    implicit = ggn_metric(model, LOSS, batches(x, y), 0.1 * Euclidean(theta))
    assert_close(implicit.dense(), matrix + 0.1 * eye, 1e-10)
    u = torch.randn(len(matrix))
    found = implicit.inverse_product(Covector(split(u, theta))).flat()
    assert_close(found, torch.linalg.solve(matrix + 0.1 * eye, u), 1e-8)
    with pytest.raises(NotImplementedError, match="a metric of products alone has no root"):
        implicit.logdet()


def test_kfac_is_its_blocks() -> None:
    model, x, y = network("plain")
    metric = kfac_metric(model, LOSS, [(x, y)])
    kfac = tnconv.quantities.KFAC("expand", "type-2")
    factors = tnconv.compute(model, LOSS, x, y, [kfac])[kfac]
    expected = torch.block_diag(*[factors[name].blocks[0] for name in metric.space])
    assert_close(metric.dense(), expected, 1e-11)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_adams_steps_are_its_metrics(make) -> None:
    """``θ <- θ - η G⁻¹ m / (1 - β₁ᵗ)``."""
    model, x, y = network("plain")
    optimizer = trained(model, x, y, lambda p: make(p, 1e-3, weight_decay=0.0))
    before = copy.deepcopy(dict(model.named_parameters()))
    LOSS(model(x), y).backward()
    optimizer.step()
    metric = adam_metric(optimizer, model)
    mean = {
        name: optimizer.state[p]["exp_avg"] / (1 - 0.9**4) for name, p in model.named_parameters()
    }
    step = metric.inverse_product(Covector(mean))
    for name, p in model.named_parameters():
        assert_close((before[name] - p).detach(), 1e-3 * step.parts[name], 1e-10)
    with pytest.raises(ValueError, match=r"no averages of '0.weight'; expected Adam's"):
        adam_metric(make(network("plain")[0].parameters()), network("plain")[0])


def rewritten(model: nn.Module, map) -> nn.Module:
    twin = copy.deepcopy(model)
    psi = map(points_of(model))
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(psi[name])
    return twin


@pytest.mark.parametrize("kind", ["plain", "groups", "transposed", "depthwise", "signal", "linear"])
@pytest.mark.parametrize("flavour", ["expand", "reduce"])
def test_kfac_follows_rescaled_channels(kind: str, flavour: str) -> None:
    """Made anew it is the one that is carried along, but not with a damping that is a number."""
    model, x, y = network(kind)
    factor = 2.0 ** torch.arange(model[0](x).shape[1])
    map, theta = relu_rescale(model, "0", "2", factor, x), points_of(model)
    twin = rewritten(model, map)

    def made(net: nn.Module, damping=None) -> Kronecker:
        return kfac_metric(net, LOSS, [(x, y)], damping, flavour=flavour)

    expected = made(model).pushforward(map, theta).dense()
    assert_close(made(twin).dense(), expected, 1e-11)
    assert made(model).intrinsic and not made(model, 1e-2).intrinsic
    damped = made(model, 1e-2).pushforward(map, theta).dense()
    assert (made(twin, 1e-2).dense() - damped).abs().max() > 1e-3 * damped.abs().max()


def test_gauss_newton_follows_rescaled_channels() -> None:
    model, x, y = network("groups")
    map, theta = relu_rescale(model, "0", "2", 8.0, x), points_of(model)
    twin = rewritten(model, map)
    inverse = torch.linalg.inv(jacobian(map, theta))
    eye = torch.eye(len(inverse))
    matrices = [tnconv.GGNOperator(net, LOSS, [(x, y)]) @ eye for net in (model, twin)]
    assert_close(matrices[1], inverse.T @ matrices[0] @ inverse, 1e-10)
    diagonals = [matrix.diagonal() for matrix in matrices]
    assert_close(diagonals[1], diagonals[0] * inverse.diagonal() ** 2, 1e-10)


def test_natural_gradients_and_refusals() -> None:
    model, x, y = network("linear")
    theta = points_of(model)
    with pytest.raises(ValueError, match=r"have no gradient; expected loss.backward"):
        natural_gradient(model, Euclidean(theta))
    LOSS(model(x), y).backward()
    found = natural_gradient(model, 4.0 * Euclidean(theta))
    for name, p in model.named_parameters():
        assert_close(found.parts[name], p.grad / 4, 1e-12)
    with pytest.raises(ValueError, match="'w' has entries that are not positive; expected a dam"):
        Diagonal({"w": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"factor of a metric is -1.0; expected a positive"):
        -1.0 * Euclidean(theta)
    with pytest.raises(ValueError, match="a parameter is in several blocks"):
        BlockDiagonal([Euclidean(theta), Euclidean(theta)])
    with pytest.raises(ValueError, match="the metric is not positive definite"):
        Dense(-torch.eye(2), {"w": torch.zeros(2)}).logdet()
    with pytest.raises(
        ValueError, match=r"a factor of '.*' is not positive definite; expected a d"
    ):
        kfac_metric(model, LOSS, [(x[:1], y[:1])]).logdet()
    with pytest.raises(ValueError, match="factors and parameters differ by b"):
        Kronecker({}, {"b": torch.ones(1)})
    model.spare = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"KFAC has nothing for spare; expected parameters of"):
        kfac_metric(model, LOSS, [(x, y)])


def test_factors_of_normalisations() -> None:
    """Of which every channel is a group of its own."""
    model, (_, x, y) = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), network("linear")
    metric = kfac_metric(model, LOSS, [(x, y)], 1e-2)
    dense, draw = metric.dense(), torch.randn(metric.size)
    found = metric.inverse_product(Covector(split(draw, metric.space))).flat()
    assert_close(found, torch.linalg.solve(dense, draw), 1e-9)


def test_scales_of_maps_and_metrics() -> None:
    """The identity's volume changes by the map's determinant."""
    theta = {"w": torch.ones(3)}
    pushed = Euclidean(theta).pushforward(DiagonalScale({"w": 2.0}), theta)
    assert_close(pushed.logdet(), -6 * torch.tensor(2.0).log(), 1e-12)
