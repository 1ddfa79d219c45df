"""Metrics that change from point to point: covariant objects against dense Christoffel symbols."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from tests.geometry.networks import FEW, LOSS, Pair, at_point, landscape, pairs, smooth
from tests.strategies import assert_close
from tnconv.geometry import (
    Constant,
    Covector,
    Dense,
    Diagonal,
    Elementwise,
    Estimate,
    Euclidean,
    GaussNewtonField,
    Landscape,
    Metric,
    ShapeOperator,
    Vector,
    assert_invariant,
    christoffel_term,
    ggn_metric,
    hessian,
    network_evidence,
    parametrization_map,
    points_of,
    pushed,
    relu_rescale,
    shape_operator,
)
from tnconv.geometry.points import Point, identity, split

pytestmark = pytest.mark.usefixtures("float64")


def curved(theta: Point) -> Metric:
    """A metric that changes from point to point, and couples entries."""
    flat = torch.cat([part.reshape(-1) for part in theta.values()])
    matrix = torch.outer(flat.sin(), flat.sin()) + torch.diag(1 + flat**2)
    return Dense(matrix, theta)


def bent(theta: Point) -> Metric:
    """A diagonal one, by names."""
    return Diagonal({name: 1 + part**2 for name, part in theta.items()})


def symbols(field: Callable[[Point], Metric], theta: Point) -> Tensor:
    """``Γ[k, i, j] = ½ Σ_l G⁻¹[k, l] (∂_i G[j, l] + ∂_j G[i, l] - ∂_l G[i, j])``, densely."""
    flat, eye = Vector(theta).flat(), identity(theta)

    def matrix(x: Tensor) -> Tensor:
        metric = field(split(x, theta))
        return torch.stack([metric.product(Vector(split(row, theta))).flat() for row in eye], 1)

    change = torch.func.jacfwd(matrix)(flat)  # (j, l, i)
    lowered = change.permute(2, 0, 1)  # [i, j, l]: the derivative along i of G[j, l]
    lowered = 0.5 * (lowered + lowered.transpose(0, 1) - lowered.permute(1, 2, 0))
    return torch.einsum("kl,ijl->kij", torch.linalg.inv(matrix(flat)), lowered)


def assert_covariant(at: Landscape) -> Tensor:
    """The Hessian and the Christoffel term are those of the dense symbols."""
    gamma, flat = symbols(at.field, at.theta), Vector(at.theta).flat()
    plain = torch.func.hessian(lambda x: at.loss(split(x, at.theta)))(flat)
    expected = plain - torch.einsum("kij,k->ij", gamma, at.gradient.flat())
    assert_close(at.hessian().dense(), expected, 1e-10)
    assert_close(at.hessian("calculus").dense(), plain, 1e-11)
    u, v = torch.randn(2, len(flat))
    term = christoffel_term(at.field, at.theta, Covector(split(u, at.theta)))
    found = term(Vector(split(v, at.theta))).flat()
    assert_close(found, torch.einsum("kij,j,k->i", gamma, v, u), 1e-9)
    metric = at.metric.dense()
    values = torch.linalg.eigvals(torch.linalg.solve(metric, expected)).real.sort().values
    assert_close(ShapeOperator(at.hessian(), at.metric).eigenvalues(), values, 1e-8)
    return expected


@FEW
@given(pair=pairs(smooth=True, most=40))
def test_christoffel_symbols(pair: Pair) -> None:
    """Of given fields, and of one in other coordinates."""
    _, _, at = landscape(pair)
    for field in (curved, bent, pushed(lambda theta: bent(theta), Elementwise("sinh").inverted())):
        assert_covariant(Landscape(at.loss, at.theta, field))


@settings(max_examples=max(settings.default.max_examples // 20, 1))
@given(pair=pairs(smooth=True, most=20))
def test_gauss_newton_fields(pair: Pair) -> None:
    """By automatic differentiation of its products alone; over loaders the network's own."""
    model, x, y = pair.build()
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    theta = points_of(model)
    field = GaussNewtonField(model, LOSS, [(x, y)], Constant(0.3 * Euclidean(theta)))
    _, _, at = landscape(pair)
    at = Landscape(at.loss, theta, field)
    metric = ggn_metric(model, LOSS, batches, 0.3 * Euclidean(theta))
    assert_close(at.metric.dense(), metric.dense())
    expected = assert_covariant(at)
    v = torch.randn(len(expected))
    loader = replace(field, batches=batches)
    found = hessian(model, LOSS, batches, "covariant", loader)
    assert_close(found(Vector(split(v, theta))).flat(), expected @ v, 1e-10)
    shape = shape_operator(model, LOSS, batches, metric, "covariant", loader)
    turned = torch.linalg.solve(metric.dense(), expected @ v)
    assert_close(shape(Vector(split(v, theta))).flat(), turned, 1e-8)


def test_covariant_eigenvalues_stay() -> None:
    """Where the metric changes from point to point, and the map is not linear."""
    at = smooth()
    assert_invariant(
        lambda where: ShapeOperator(where.hessian(), where.metric).eigenvalues(),
        Landscape(at.loss, at.theta, curved),
        Elementwise("sinh"),
        1e-9,
    )


@settings(max_examples=max(settings.default.max_examples // 20, 1))
@given(pair=pairs(most=50))
def test_evidence_of_networks(pair: Pair) -> None:
    """Four ways to one determinant, and one number however the network is written."""
    model, x, y = pair.build()
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    theta = points_of(model)
    prior = 2.0 * Euclidean(theta)
    matrix = ggn_metric(model, LOSS, batches, prior).dense() - prior.dense()
    flat, size = Vector(theta).flat(), len(Vector(theta).flat())
    loss = LOSS(model(x), y).detach()
    determinant = torch.linalg.slogdet(torch.eye(size) + 5 * matrix / 2).logabsdet
    expected = -5 * loss - flat @ flat - determinant / 2
    for curvature in ("low rank", "ggn"):
        found = network_evidence(model, LOSS, batches, prior, curvature=curvature)
        assert_close(found, expected, 1e-9)
    total = nn.CrossEntropyLoss(reduction="sum")
    assert_close(network_evidence(model, total, batches, prior), expected, 1e-9)
    map = relu_rescale(model, "0", "2", 8.0, x)
    twin = at_point(model, map(theta))
    there = prior.pushforward(map, theta)
    ways = {"curvature": "ggn", "estimate": Estimate(1, 8)}
    for how in ({}, {"curvature": "kfac"}, ways):
        first = network_evidence(model, LOSS, batches, prior, **how)
        assert_close(network_evidence(twin, LOSS, batches, there, **how), first, 1e-9)
    naive = network_evidence(twin, LOSS, batches, 2.0 * Euclidean(theta))
    assert (naive - expected).abs() > 1e-3
    mean = {name: part / 2 for name, part in theta.items()}
    off = network_evidence(model, LOSS, batches, prior, mean=mean)
    assert_close(off - expected, 0.75 * flat @ flat, 1e-9)


def test_evidence_in_the_ntk_parametrisation() -> None:
    """The prior that is carried along has a precision for every layer there."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x, y = torch.randn(8, 4), torch.randint(2, (8,))
    ntk, theta = parametrization_map(model, "ntk"), points_of(model)
    prior = Euclidean(theta)
    moved = prior.pushforward(ntk, theta).dense().diagonal()
    expected = {"0.weight": 1 / 4, "0.bias": 1.0, "2.weight": 1 / 6, "2.bias": 1.0}
    parts = split(moved, theta)
    for name, value in expected.items():
        assert_close(parts[name], torch.full_like(parts[name], value), 1e-12)
    for curvature in ("hessian", "kfac"):
        found = network_evidence(model, LOSS, [(x, y)], 9.0 * prior, curvature=curvature)
        assert found.isfinite()
    with pytest.raises(ValueError, match="curvature is 'full'; expected one of 'low rank'"):
        network_evidence(model, LOSS, [(x, y)], prior, curvature="full")
