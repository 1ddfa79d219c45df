"""Metrics against their dense matrices, and against what they are made of."""

import copy

import pytest
import torch
from torch import nn

import tnconv
from tests.geometry.networks import LOSS, at_point, jacobian, network, roots
from tests.strategies import assert_close
from tnconv.geometry import (
    BlockDiagonal,
    Covector,
    Dense,
    Diagonal,
    DiagonalScale,
    Elementwise,
    Estimate,
    Euclidean,
    Implicit,
    Kronecker,
    KroneckerDamped,
    KroneckerEigen,
    LowRank,
    Metric,
    Summed,
    Vector,
    adam_metric,
    ekfac_metric,
    fisher_metric,
    ggn_diagonal_metric,
    ggn_metric,
    kfac_metric,
    low_rank_metric,
    natural_gradient,
    points_of,
    relu_rescale,
    shampoo_metric,
    shampoo_statistics,
)
from tnconv.geometry.eigenbasis_metrics import eigenbases
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


def curved(theta) -> Diagonal:
    """With entries of several sizes in every parameter."""
    return Diagonal({name: 0.1 + part**2 for name, part in theta.items()})


def shampoo(model, x, y) -> Metric:
    statistics = shampoo_statistics(model, LOSS, batches(x, y), 1e-3)
    return shampoo_metric(statistics, points_of(model), model)


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
    "GGN": lambda model, theta, x, y: ggn_metric(model, LOSS, batches(x, y), curved(theta)),
    "Fisher": lambda model, theta, x, y: fisher_metric(
        model, LOSS, batches(x, y), curved(theta), fisher="empirical"
    ),
    "low rank": lambda model, theta, x, y: low_rank_metric(
        model, LOSS, batches(x, y), random_factors(theta, model)
    ),
    "KFAC": lambda model, theta, x, y: kfac_metric(
        model, LOSS, batches(x, y), 1e-2 * Euclidean(theta)
    ),
    "Kronecker": lambda model, theta, x, y: random_factors(theta, model),
    "EKFAC": lambda model, theta, x, y: ekfac_metric(
        model, LOSS, batches(x, y), 1e-2 * Euclidean(theta)
    ),
    "Shampoo": lambda model, theta, x, y: shampoo(model, x, y),
    "blocks": lambda model, theta, x, y: halves(theta),
    "sum": lambda model, theta, x, y: Summed(
        [random_factors(theta, model), curved(theta)], tolerance=1e-14
    ),
    "sum of factors": lambda model, theta, x, y: (
        random_factors(theta, model) + random_factors(theta, model)
    ),
    "sum of three": lambda model, theta, x, y: Summed(
        [random_factors(theta, model), Euclidean(theta), curved(theta)], tolerance=1e-14
    ),
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
    turned = Covector(dict(reversed(u.parts.items())))  # the order of names says nothing
    assert_close(metric.root_transposed(turned), root.T @ draw, 1e-11)
    assert_close(metric.inverse_product(turned).flat(u.parts), metric.inverse_product(u).flat())
    v = Vector(split(draw, metric.space))
    product = metric.product(Vector(dict(reversed(v.parts.items()))))
    assert_close(product.flat(v.parts), dense @ draw, 1e-11)
    assert_close(metric.norm(v), (draw @ dense @ draw).sqrt(), 1e-11)


@pytest.mark.parametrize("name", ["GGN", "Kronecker", "low rank"])
def test_carried_along(name: str) -> None:
    """``J⁻ᵀ G J⁻¹``, and back."""
    model, x, y = network("groups")
    theta = points_of(model)
    metric = METRICS[name](model, theta, x, y)
    map = Elementwise("sinh") @ relu_rescale(model, "0", "2", 3.0, x)
    inverse = torch.linalg.inv(jacobian(map, theta))
    root = metric.root(torch.arange(float(metric.size)))
    assert_close(
        metric.pushforward(map, theta).root(torch.arange(float(metric.size))).flat(),
        map.transport(theta, root).flat(),
        1e-10,
    )
    pushed = metric.pushforward(map, theta)
    assert_close(pushed.dense(), inverse.T @ metric.dense() @ inverse, 1e-9)
    assert_close(pushed.pullback(map, theta).dense(), metric.dense(), 1e-9)
    assert pushed.intrinsic == metric.intrinsic


def test_whose_matrices_they_are() -> None:
    model, x, y = network("groups")
    theta = points_of(model)
    matrix = tnconv.GGNOperator(model, LOSS, [(x, y)]) @ torch.eye(len(Vector(theta).flat()))
    damping = curved(theta)
    expected = matrix + damping.dense()
    assert_close(low_rank_metric(model, LOSS, batches(x, y), damping).dense(), expected, 1e-10)
    assert_close(ggn_metric(model, LOSS, batches(x, y), damping).dense(), expected, 1e-10)
    assert_close(fisher_metric(model, LOSS, batches(x, y), damping).dense(), expected, 1e-10)
    diagonal = ggn_diagonal_metric(model, LOSS, batches(x, y), damping)
    assert_close(diagonal.dense(), expected.diagonal().diag(), 1e-10)
    layers = tnconv.low_rank_ggn(model, LOSS, x, y, groups="parameter")
    sizes = [p.numel() for p in theta.values()]
    blocks = [torch.ones(size, size) for size in sizes]
    assert_close(
        LowRank.of(layers, damping).dense(),
        matrix * torch.block_diag(*blocks) + damping.dense(),
        1e-10,
    )


def test_ekfac_is_the_diagonal_in_its_bases() -> None:
    """Of the Gauss-Newton matrix; KFAC's own eigenvalues make KFAC's matrix."""
    model, x, y = network("transposed")
    found = ekfac_metric(model, LOSS, batches(x, y))
    kfac = kfac_metric(model, LOSS, batches(x, y))
    matrix = tnconv.GGNOperator(model, LOSS, [(x, y)]) @ torch.eye(found.size)
    bases, eigenvalues = eigenbases(kfac)
    own = KroneckerEigen(bases, eigenvalues, points_of(model), model)
    assert_close(own.dense(), kfac.dense(), 1e-11)
    ones = {name: torch.ones_like(s) for name, s in eigenvalues.items()}
    turned = KroneckerEigen(found.bases, ones, points_of(model), model)  # where A has no rank, too
    columns = []  # of the orthogonal matrix of all bases
    for row in torch.eye(found.size):
        parts = split(row, found.space).items()
        each = [turned.rows.back(n, turned._out(n, turned.rows.of(n, p))) for n, p in parts]
        columns.append(torch.cat([part.reshape(-1) for part in each]))
    q = torch.stack(columns, 1)
    assert_close(found.dense(), q @ (q.T @ matrix @ q).diagonal().diag() @ q.T, 1e-10)
    zeros = {name: 0 * s for name, s in ones.items()}
    with pytest.raises(ValueError, match=r"scales of '.*' are not all positive; expected a dam"):
        KroneckerEigen(bases, zeros, points_of(model), model).logdet()


def test_shampoos_statistics() -> None:
    """Sums over batches of each one's gradient, on both sides."""
    model, x, y = network("groups")
    found = shampoo_statistics(model, LOSS, batches(x, y), 0.5)
    left, right = (0.5 * torch.eye(size).expand(2, size, size) for size in (2, 4))
    for inputs, targets in batches(x, y):
        model.zero_grad()
        LOSS(model(inputs), targets).backward()
        w = model[0].weight.grad.reshape(2, 2, 4)
        left, right = left + w @ w.mT, right + w.mT @ w
    assert_close(found["0.weight"][0], left, 1e-12)
    assert_close(found["0.weight"][1], right, 1e-12)
    quarter = shampoo(model, x, y)
    four = shampoo_metric(found, points_of(model), model, exponent=1.0)
    power = shampoo_metric(found, points_of(model), model)
    assert_close(torch.linalg.matrix_power(power.dense(), 4), four.dense(), 1e-9)
    assert not quarter.intrinsic


def test_sums_are_exact_where_they_can_be() -> None:
    model, x, y = network("groups")
    theta = points_of(model)
    first, second = random_factors(theta, model), random_factors(theta, model)
    kinds = {
        KroneckerDamped: (first, second),
        Diagonal: (curved(theta), 2.0 * Euclidean(theta)),
        Summed: (first, curved(theta)),
    }
    for kind, (one, other) in kinds.items():
        for total in (one + other, other + one):
            assert type(total) is kind
            assert_close(total.dense(), one.dense() + other.dense(), 1e-12)
    constant = 0.5 * Euclidean(theta)
    assert type(first + constant) is type(constant + first) is KroneckerDamped
    assert type(ekfac_metric(model, LOSS, batches(x, y)) + constant) is KroneckerEigen
    with pytest.raises(ValueError, match="metrics are over different parameters"):
        Summed([first, Euclidean({"w": torch.ones(2)})])


def test_estimated_determinants_of_metrics() -> None:
    """By Lanczos quadrature: unbiased, and one number in all parameters."""
    model, x, y = network("groups")
    theta = points_of(model)
    exact = ggn_metric(model, LOSS, batches(x, y), curved(theta)).relative_logdet()
    metric = ggn_metric(model, LOSS, [(x, y)], curved(theta))
    found = []
    for seed in range(12):
        metric.estimate = Estimate(1, 15, seed)
        found.append(metric.relative_logdet())
    error = torch.stack(found).std() / 12**0.5
    assert (torch.stack(found).mean() - exact).abs() < 4 * error < exact
    assert metric.relative_logdet() == metric.relative_logdet()  # the same draws
    map = relu_rescale(model, "0", "2", 8.0, x)
    twin = at_point(model, map(theta))
    there = ggn_metric(
        twin, LOSS, [(x, y)], curved(theta).pushforward(map, theta), estimate=Estimate(1, 15, 11)
    )
    assert_close(there.relative_logdet(), metric.relative_logdet(), 1e-9)
    draws = torch.randn(metric.size)
    moved = map.transport(theta, metric.root(draws))
    assert_close(there.root(draws).flat(), moved.flat(), 1e-9)


def test_what_products_cannot_do() -> None:
    model, x, y = network("linear")
    theta = points_of(model)
    for make in (ggn_metric, low_rank_metric, kfac_metric, fisher_metric):
        with pytest.raises(TypeError, match="damping is a float; expected a Metric, such as"):
            make(model, LOSS, [(x, y)], 0.1)
    few = Implicit(ggn_metric(model, LOSS, [(x, y)], Euclidean(theta)).form_alone,
                   1e-4 * Euclidean(theta), steps=2)  # fmt: skip
    for call in (
        lambda: few.root(torch.ones(few.size)),
        lambda: few.inverse_product(Covector(theta)),
    ):
        with pytest.raises(RuntimeError, match="is left after at most 2 steps; expected more"):
            call()
    less = Implicit((2.0 * Euclidean(theta)).form(), Euclidean(theta))
    assert_close(less.logdet(), less.size * torch.tensor(3.0).log(), 1e-12)
    huge = {"w": torch.zeros(5000)}
    with pytest.raises(ValueError, match=r"5000 rows; expected at most 4096, or estimate=Estimate"):
        Implicit(Euclidean(huge).form(), Euclidean(huge)).logdet()
    found = Implicit(Euclidean(huge).form(), Euclidean(huge), estimate=Estimate(1, 3)).logdet()
    assert_close(found, 5000 * torch.tensor(2.0).log(), 1e-10)


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


def test_natural_gradients_and_refusals() -> None:
    model, x, y = network("linear")
    theta = points_of(model)
    with pytest.raises(ValueError, match=r"have no gradient; expected loss.backward"):
        natural_gradient(model, Euclidean(theta))
    LOSS(model(x), y).backward()
    found = natural_gradient(model, 4.0 * Euclidean(theta))
    for name, p in model.named_parameters():
        assert_close(found.parts[name], p.grad / 4, 1e-12)
    over = natural_gradient(model, 4.0 * Euclidean(theta), LOSS, batches(x, y))
    assert_close(over.flat(), found.flat(), 1e-12)
    with pytest.raises(ValueError, match="one of loss_fn and batches is missing"):
        natural_gradient(model, Euclidean(theta), LOSS)
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
    metric = kfac_metric(model, LOSS, [(x, y)], 1e-2 * Euclidean(points_of(model)))
    dense, draw = metric.dense(), torch.randn(metric.size)
    found = metric.inverse_product(Covector(split(draw, metric.space))).flat()
    assert_close(found, torch.linalg.solve(dense, draw), 1e-9)


def test_scales_of_maps_and_metrics() -> None:
    """The identity's volume changes by the map's determinant."""
    theta = {"w": torch.ones(3)}
    pushed = Euclidean(theta).pushforward(DiagonalScale({"w": 2.0}), theta)
    assert_close(pushed.logdet(), -6 * torch.tensor(2.0).log(), 1e-12)
