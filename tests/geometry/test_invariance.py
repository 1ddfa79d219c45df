"""What stays in other parameters, and what does not: exact statements, on layers of any kind."""

from math import log, pi

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.geometry.networks import (
    FEW,
    KINDS,
    LOSS,
    Pair,
    jacobian,
    landscape,
    pairs,
    powers,
    smooth,
)
from tests.strategies import assert_close
from tnconv.geometry import (
    Diagonal,
    DiagonalScale,
    Elementwise,
    Estimate,
    Euclidean,
    Landscape,
    ShapeOperator,
    Vector,
    WeightNorm,
    assert_invariant,
    hessian,
    kfac_metric,
    laplace_evidence,
    model_landscape,
    points_of,
    pushed,
    relu_rescale,
    riemannian_logpdf,
    riemannian_map,
    shape_operator,
    sharpness,
)

pytestmark = pytest.mark.usefixtures("float64")


def shape(at: Landscape, kind="covariant") -> ShapeOperator:
    return ShapeOperator(at.hessian(kind), at.metric)


def naive(at: Landscape) -> ShapeOperator:
    """In the identity of whatever the parameters are."""
    return ShapeOperator(at.hessian("calculus"), Euclidean(at.theta))


def seeded(measure):
    """With equal draws."""
    return lambda at: measure(at, torch.Generator().manual_seed(1))


STAY = {
    "eigenvalues": lambda at: shape(at).eigenvalues(),
    "estimated trace": seeded(lambda at, draws: shape(at).trace(2, draws)),
    "leading": seeded(lambda at, draws: shape(at).eigenvalues(2, draws)),
    "largest": seeded(lambda at, draws: shape(at).max_eigenvalue(1e-12, draws)),
    "logdet": lambda at: shape(at).logdet(damping=100.0 * at.metric),
    "estimated logdet": lambda at: shape(at).logdet(100.0 * at.metric, Estimate(1, 4)),
    "density": seeded(lambda at, draws: shape(at).spectral_density(4, 1, draws).values),
    "slope": lambda at: at.gradient @ at.natural_gradient(),
}
CHANGE = {
    "eigenvalues": lambda at: naive(at).eigenvalues(),
    "slope": lambda at: at.gradient.flat().square().sum(),
    "estimated trace": seeded(lambda at, draws: naive(at).trace(2, draws)),
}


@FEW
@given(pair=pairs(), factor=st.sampled_from([2.0, 10.0, 1000.0]))
def test_measures_stay_under_rescaling(pair: Pair, factor: float) -> None:
    """Both where the loss is rewritten (``L ∘ φ⁻¹``), and where its symmetry is used (L at Tθ)."""
    model, x, at = landscape(pair)
    map = relu_rescale(model, "0", "2", factor, x)
    symmetric = Landscape(at.loss, map(at.theta), pushed(at.field, map))
    for measure in STAY.values():
        assert_invariant(measure, at, map)
    for name in ("eigenvalues", "estimated trace", "slope"):
        found = torch.as_tensor(STAY[name](symmetric))
        assert_close(found, torch.as_tensor(STAY[name](at)), 1e-9)
    for measure in CHANGE.values():
        with pytest.raises(AssertionError, match=r"not invariant: .*a relative difference of"):
            assert_invariant(measure, at, map, 1e-3)


@FEW
@given(pair=pairs())
def test_powers_of_two_are_exact(pair: Pair) -> None:
    """There is no rounding in the loss, nor in the Hessian's columns."""
    model, x, at = landscape(pair)
    map = relu_rescale(model, "0", "2", powers(model, x), x)
    there = at.reparametrized(map)
    assert torch.equal(there.loss(there.theta), at.loss(at.theta))
    assert_close(at.loss(there.theta), at.loss(at.theta), 1e-12)
    dense, before = there.hessian().dense(), at.hessian().dense()
    inverse = torch.linalg.inv(jacobian(map, at.theta))
    assert torch.equal(dense, inverse.T @ before @ inverse)
    assert_close(shape(there).eigenvalues(), shape(at).eigenvalues(), 1e-11)


@FEW
@given(pair=pairs(smooth=True), function=st.sampled_from(["sinh", "exp", "tanh", "softplus"]))
def test_covariant_hessians_at_points_that_are_not_critical(pair: Pair, function: str) -> None:
    """The covariant Hessian is a form; the calculus Hessian is none."""
    _, _, at = landscape(pair)
    map = Elementwise(function) if function == "tanh" else Elementwise(function).inverted()
    if function in ("exp", "softplus"):  # whose inverses need positive parameters
        at = Landscape(at.loss, {k: part.abs() + 0.1 for k, part in at.theta.items()})
    there = at.reparametrized(map)
    inverse = torch.linalg.inv(jacobian(map, at.theta))
    expected = inverse.T @ at.hessian().dense() @ inverse
    size = expected.abs().max()
    assert_close(there.hessian().dense() / size, expected / size, 1e-10)
    assert_invariant(lambda where: shape(where).eigenvalues(), at, map)
    if at.gradient.flat().norm() > 0.1:
        assert (there.hessian("calculus").dense() - expected).abs().max() > 1e-3 * size
        with pytest.raises(AssertionError, match="not invariant"):
            assert_invariant(lambda where: shape(where, "calculus").eigenvalues(), at, map, 1e-5)


@FEW
@given(pair=pairs(smooth=True))
def test_weight_norm(pair: Pair) -> None:
    """The pencil on the metric's range has the eigenvalues; the whole has no determinant."""
    _, _, at = landscape(pair)
    names = [name for name, part in at.theta.items() if part.dim() > 1]
    map, size = WeightNorm(names), len(Vector(at.theta).flat())
    rows = sum(len(at.theta[name]) for name in names)
    there = at.reparametrized(map)
    form = map.transport(at.theta, at.hessian())
    found = ShapeOperator(form, there.metric)
    assert len(Vector(there.theta).flat()) == size + rows
    assert torch.linalg.matrix_rank(there.metric.dense()) == size
    assert_close(found.eigenvalues(), shape(at).eigenvalues(), 1e-10)
    with pytest.raises(ValueError, match="the whole form has no determinant"):
        found.logdet()
    with pytest.raises(ValueError, match="WeightNorm is no bijection"):
        there.metric.logdet()


@FEW
@given(pair=pairs(smooth=True))
def test_natural_gradient_steps(pair: Pair) -> None:
    """One step is one step in linear parameters; in others the difference is of second order."""
    _, _, at = landscape(pair)
    linear = DiagonalScale({name: torch.rand_like(p) + 0.5 for name, p in at.theta.items()})

    def gap(map, rate: float) -> float:
        there = at.reparametrized(map)
        here = Vector(at.theta) - rate * at.natural_gradient()
        moved = Vector(there.theta) - rate * there.natural_gradient()
        return float((Vector(map(here.parts)) - moved).flat().abs().max())

    assert gap(linear, 0.1) < 2e-12
    gaps = [gap(Elementwise("sinh"), rate) for rate in (1e-3, 1e-4)]
    assert 95 < gaps[0] / gaps[1] < 105


def test_modes_and_evidence() -> None:
    """A log-normal-like density: its mode moves, that of ``p / √det G`` does not."""
    torch.manual_seed(0)
    a = torch.randn(4, 3)

    def log_density(theta) -> Tensor:
        return -((a @ theta["w"]).cosh().log().sum() + (theta["w"] ** 2).sum())

    start, map = {"w": torch.tensor([0.3, -0.2, 0.5])}, Elementwise("exp")
    field = pushed(lambda theta: Diagonal({"w": 1 + theta["w"] ** 2}), DiagonalScale({"w": 2.0}))
    start = {"w": 2 * start["w"]}

    def there(psi) -> Tensor:
        theta = map.inverse(psi)
        return log_density(theta) - map.log_abs_det(theta)

    moved = pushed(field, map)
    mode, other = (
        riemannian_map(log_density, start, field),
        riemannian_map(there, map(start), moved),
    )
    assert_close(map(mode)["w"], other["w"], 1e-8)
    psi = {"w": map(mode)["w"]}
    slope = torch.func.grad(lambda p: riemannian_logpdf(there, p, moved))(psi)
    assert slope["w"].abs().max() < 1e-8
    first = laplace_evidence(log_density, mode, field)
    assert_close(laplace_evidence(there, psi, moved), first, 1e-10)
    estimate = Estimate(2, 3)  # as many steps as there are parameters
    estimates = [laplace_evidence(log_density, mode, field, estimate)]
    estimates += [laplace_evidence(there, psi, moved, estimate)]
    assert_close(estimates[1], estimates[0], 1e-10)
    naive = [riemannian_map(log_density, start), riemannian_map(there, map(start))]
    assert (map(naive[0])["w"] - naive[1]["w"]).abs().max() > 0.05
    usual = [laplace_evidence(f, m) for f, m in zip((log_density, there), naive, strict=True)]
    assert (usual[0] - usual[1]).abs() > 1e-3


def test_modes_of_many_parameters() -> None:
    """Of more than dense steps would take: 20,000, coupled along a chain."""
    target = torch.randn(20000)

    def log_density(theta) -> Tensor:
        w = theta["w"]
        return -((w - target).cosh().log().sum() + (w[1:] - w[:-1]).square().sum())

    mode = riemannian_map(log_density, {"w": torch.zeros(20000)}, tolerance=1e-8)
    slope = torch.func.grad(lambda theta: log_density(theta))(mode)
    assert slope["w"].norm() < 1e-8


def test_evidence_of_gaussians_is_exact() -> None:
    torch.manual_seed(0)
    precision = torch.randn(3, 3)
    precision = precision @ precision.T + torch.eye(3)

    def log_joint(theta) -> Tensor:
        return -theta["w"] @ precision @ theta["w"] / 2

    expected = 1.5 * log(2 * pi) - torch.linalg.slogdet(precision).logabsdet / 2
    assert_close(laplace_evidence(log_joint, {"w": torch.zeros(3)}), expected, 1e-12)
    with pytest.raises(ValueError, match=r"smallest eigenvalue is -.*expected a positive definite"):
        laplace_evidence(lambda theta: -log_joint(theta), {"w": torch.zeros(3)})


def by_hand(where: Landscape) -> Tensor:
    """A damping that is the identity of whatever the parameters are."""
    damped = where.metric + 0.1 * Euclidean(where.theta)
    return ShapeOperator(where.hessian(), damped).eigenvalues()


def test_numbers_as_damping_are_refused() -> None:
    _, _, at = landscape(KINDS["linear"])
    with pytest.raises(TypeError, match="damping is a float; expected a Metric, such as"):
        shape(at).logdet(damping=1e-3)
    with pytest.raises(TypeError, match="metric is a float; expected a Metric"):
        ShapeOperator(at.hessian(), 1.0)


@FEW
@given(pair=pairs(), factor=st.sampled_from([2.0, 10.0, 1000.0]))
def test_numbers_as_damping_are_found_out(pair: Pair, factor: float) -> None:
    """Where somebody builds them by hand; a metric that is carried along passes."""
    model, x, at = landscape(pair)
    map = relu_rescale(model, "0", "2", factor, x)
    with pytest.raises(AssertionError, match="not invariant"):
        assert_invariant(by_hand, at, map, 1e-4)
    assert_invariant(
        lambda where: ShapeOperator(where.hessian(), where.metric + 0.1 * where.metric)
        .eigenvalues(),
        at,
        map,
    )  # fmt: skip


def test_sharpness_of_a_network() -> None:
    """By operators and loaders it is that of the landscape."""
    model, x, y = KINDS["groups"].build()
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    metric = kfac_metric(model, LOSS, batches, 1e-2 * Euclidean(points_of(model)))
    at = model_landscape(model, LOSS, batches)
    expected = ShapeOperator(at.hessian("calculus"), metric)
    assert_close(hessian(model, LOSS, batches).dense(), at.hessian("calculus").dense(), 1e-10)
    draws = [torch.Generator().manual_seed(0) for _ in range(4)]
    found = sharpness(model, LOSS, batches, metric, probes=3, generator=draws[0])
    assert_close(found, expected.trace(3, draws[1]), 1e-9)
    every = expected.eigenvalues()
    assert_close(sharpness(model, LOSS, batches, metric, "max_eig"), every[-1], 1e-4)
    heavy = (1 - 2 * min(float(every[0]), 0.0)) * metric
    logdet = sharpness(model, LOSS, batches, metric, "logdet", damping=heavy)
    assert_close(logdet, (every + heavy.factor).log().sum(), 1e-9)
    with pytest.raises(ValueError, match="measure is 'max'; expected one of 'trace'"):
        sharpness(model, LOSS, batches, metric, "max")
    with pytest.raises(ValueError, match="kind is 'plain'; expected 'calculus' or 'covariant'"):
        at.hessian("plain")
    with pytest.raises(ValueError, match="kind is 'plain'; expected 'calculus' or 'covariant'"):
        hessian(model, LOSS, batches, "plain")
    with pytest.raises(ValueError, match="smallest eigenvalue is"):
        sharpness(model, LOSS, batches, metric, "logdet")
    with pytest.raises(ValueError, match="there are no probes"):
        expected.trace([])


def test_traces_are_unbiased() -> None:
    """The mean over many probes is the sum of the eigenvalues."""
    _, _, at = landscape(KINDS["linear"])
    found = shape(at)
    draws = found.metric.draws(400, torch.Generator().manual_seed(0))
    matrix = found.form.dense()
    each = torch.stack([z.flat() @ matrix @ z.flat() for z in draws])
    error = each.std() / 400**0.5
    assert (each.mean() - found.eigenvalues().sum()).abs() < 4 * error
    assert_close(found.trace(draws[:50]), each[:50].mean(), 1e-12)


def test_spectral_densities() -> None:
    """With all steps a probe's density has that probe's moments; smoothed, its mass stays one."""
    model, x, y = KINDS["signal"].build()
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    metric = 2.0 * Euclidean(points_of(model))
    found = shape_operator(model, LOSS, batches, metric)
    matrix = ShapeOperator(found.form, metric)._dense()
    density = found.spectral_density(len(matrix), 1, torch.Generator().manual_seed(0))
    z = torch.randn(len(matrix), generator=torch.Generator().manual_seed(0))
    power = z
    for moment in range(4):
        assert_close((density.values**moment) @ density.weights, z @ power / (z @ z), 1e-9)
        power = matrix @ power
    grid = torch.linspace(-10, 10, 4001)
    assert_close(density.smoothed(grid, 0.1).sum() * (grid[1] - grid[0]), torch.tensor(1.0), 1e-6)


def test_estimated_determinants() -> None:
    """Lanczos quadrature: unbiased, the more exact the more probes."""
    _, _, at = landscape(KINDS["signal"])
    damping = 2.0 * at.metric
    exact = shape(at).logdet(damping)
    found = shape(at).logdet(damping, Estimate(30, 12))
    assert (found - exact).abs() < 0.1 * exact.abs()
    assert found != exact
    with pytest.raises(ValueError, match="smallest eigenvalue is"):
        shape(at).logdet(1e-3 * at.metric, Estimate(5, 20))


@FEW
@given(pair=pairs())
def test_single_precision(pair: Pair) -> None:
    """The same to about 1e-4 of the largest eigenvalue."""
    model, x, y = pair.build()
    model = model.float()
    at = model_landscape(model, LOSS, [(x.float(), y)])
    map = relu_rescale(model, "0", "2", 10.0, x.float())
    assert_invariant(lambda where: shape(where).eigenvalues(), at, map, 1e-4)


def test_maps_that_are_not_finite_are_refused() -> None:
    at = smooth()
    with pytest.raises(ValueError, match="is not finite at the point"):
        at.reparametrized(Elementwise("exp").inverted())
