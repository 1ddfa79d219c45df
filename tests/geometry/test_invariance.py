"""What stays in other parameters, and what does not: the exact statements."""

import copy
from math import log, pi

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import tnconv
from tests.geometry.networks import LOSS, PAIRS, jacobian, network, small, smooth
from tests.strategies import assert_close
from tnconv.geometry import (
    Dense,
    Diagonal,
    DiagonalScale,
    Elementwise,
    Euclidean,
    Landscape,
    ShapeOperator,
    Vector,
    WeightNorm,
    assert_invariant,
    kfac_metric,
    laplace_evidence,
    model_hessian,
    model_landscape,
    parametrization_map,
    pushed,
    relu_rescale,
    riemannian_logpdf,
    riemannian_map,
    sharpness,
)
from tnconv.geometry.curvature_metrics import points_of
from tnconv.geometry.points import split

pytestmark = pytest.mark.usefixtures("float64")


def shape(at: Landscape, kind="covariant") -> ShapeOperator:
    return ShapeOperator(at.hessian(kind), at.metric)


def naive(at: Landscape) -> ShapeOperator:
    """In the identity of whatever the parameters are."""
    return ShapeOperator(at.hessian("calculus"), Euclidean(at.theta))


def seeded(measure):
    """With equal draws."""
    return lambda at: measure(at, torch.Generator().manual_seed(1))


def damped_logdet(at: Landscape) -> Tensor:
    return shape(at).logdet(damping=10.0 * at.metric)


STAY = {
    "eigenvalues": lambda at: shape(at).eigenvalues(),
    "estimated trace": seeded(lambda at, draws: shape(at).trace(2, draws)),
    "leading": seeded(lambda at, draws: shape(at).eigenvalues(2, draws)),
    "largest": seeded(lambda at, draws: shape(at).max_eigenvalue(1e-12, draws)),
    "logdet": damped_logdet,
    "density": seeded(lambda at, draws: shape(at).spectral_density(4, 1, draws).values),
    "slope": lambda at: at.gradient @ at.natural_gradient(),
}
CHANGE = {
    "eigenvalues": lambda at: naive(at).eigenvalues(),
    "trace": lambda at: naive(at).eigenvalues().sum(),
    "slope": lambda at: at.gradient.flat().square().sum(),
}


@pytest.mark.parametrize("measure", STAY)
def test_measures_stay_under_rescaling(measure: str) -> None:
    model, at = small()
    x = network("plain")[1]
    for factor in (2.0, 10.0, 1000.0):
        map = relu_rescale(model, "0", "2", factor, x)
        assert_invariant(STAY[measure], at, map)
        symmetric = Landscape(at.loss, map(at.theta), pushed(at.field, map))  # the same loss
        found = torch.as_tensor(STAY[measure](symmetric))
        assert_close(found, torch.as_tensor(STAY[measure](at)), 1e-9)


@pytest.mark.parametrize("measure", CHANGE)
def test_naive_measures_change(measure: str) -> None:
    model, at = small()
    for factor in (2.0, 10.0, 1000.0):
        map = relu_rescale(model, "0", "2", factor, network("plain")[1])
        with pytest.raises(AssertionError, match=r"not invariant: .*a relative difference of"):
            assert_invariant(CHANGE[measure], at, map)


@pytest.mark.parametrize("kind", PAIRS)
def test_all_kinds_of_layers(kind: str) -> None:
    """With powers of two there is no rounding in the loss, nor in the Hessian's columns."""
    model, at = small(kind)
    factor = 2.0 ** torch.arange(model[0](network(kind)[1]).shape[1])
    map = relu_rescale(model, "0", "2", factor, network(kind)[1])
    there = at.reparametrized(map)
    assert torch.equal(there.loss(there.theta), at.loss(at.theta))
    symmetric = Landscape(at.loss, there.theta, there.field)
    assert_close(symmetric.loss(symmetric.theta), at.loss(at.theta), 1e-12)
    dense, before = there.hessian().dense(), at.hessian().dense()
    inverse = torch.linalg.inv(jacobian(map, at.theta))
    assert torch.equal(dense, inverse.T @ before @ inverse)
    expected = shape(at).eigenvalues()
    assert_close(shape(there).eigenvalues(), expected, 1e-11)
    assert (naive(there).eigenvalues() - expected).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.parametrize("function", ["sinh", "exp"])
def test_covariant_hessians_at_points_that_are_not_critical(function: str) -> None:
    """The covariant Hessian is a form; the calculus Hessian is none."""
    at, map = smooth(), Elementwise(function).inverted()
    if function == "exp":  # the logarithm needs positive parameters
        at = Landscape(at.loss, {k: part.abs() + 0.1 for k, part in at.theta.items()})
    there = at.reparametrized(map)
    inverse = torch.linalg.inv(jacobian(map, at.theta))
    expected = inverse.T @ at.hessian().dense() @ inverse
    size = expected.abs().max()
    assert_close(there.hessian().dense() / size, expected / size, 1e-10)
    assert (there.hessian("calculus").dense() - expected).abs().max() > 0.01 * size
    assert_invariant(lambda where: shape(where).eigenvalues(), at, map)
    with pytest.raises(AssertionError, match="not invariant"):
        assert_invariant(lambda where: shape(where, "calculus").eigenvalues(), at, map)


def curved(theta) -> Diagonal | Dense:
    """A metric that changes from point to point, and couples entries."""
    flat = torch.cat([part.reshape(-1) for part in theta.values()])
    matrix = torch.outer(flat.sin(), flat.sin()) + torch.diag(1 + flat**2)
    return Dense(matrix, theta)


def test_christoffel_symbols() -> None:
    """``Γ^k_ij = ½ Σ_l G⁻¹[k, l] (∂_i G[j, l] + ∂_j G[i, l] - ∂_l G[i, j])``, densely."""
    at = smooth()
    at = Landscape(at.loss, at.theta, curved)
    flat = Vector(at.theta).flat()
    change = torch.func.jacrev(lambda x: curved(split(x, at.theta)).matrix)(flat)  # (i, j, l)
    lowered = change.permute(2, 0, 1)  # [i, j, l]: the derivative along i of G[j, l]
    lowered = 0.5 * (lowered + lowered.transpose(0, 1) - lowered.permute(1, 2, 0))
    symbols = torch.einsum("kl,ijl->kij", torch.linalg.inv(curved(at.theta).matrix), lowered)
    plain = torch.func.hessian(lambda x: at.loss(split(x, at.theta)))(flat)
    expected = plain - torch.einsum("kij,k->ij", symbols, at.gradient.flat())
    assert_close(at.hessian().dense(), expected, 1e-11)
    assert_close(at.hessian("calculus").dense(), plain, 1e-11)
    assert_invariant(lambda where: shape(where).eigenvalues(), at, Elementwise("sinh"), 1e-9)


def test_weight_norm() -> None:
    """The pencil on the metric's range has the eigenvalues; the whole has no determinant."""
    at = smooth()
    names = [name for name, part in at.theta.items() if part.dim() > 1]
    map, size = WeightNorm(names), len(Vector(at.theta).flat())
    rows = sum(len(at.theta[name]) for name in names)
    critical = Landscape(at.loss, at.theta)
    there = critical.reparametrized(map)
    form = map.transport(at.theta, at.hessian())
    found = ShapeOperator(form, there.metric)
    assert len(Vector(there.theta).flat()) == size + rows
    assert torch.linalg.matrix_rank(there.metric.dense()) == size
    assert_close(found.eigenvalues(), shape(at).eigenvalues(), 1e-10)
    with pytest.raises(ValueError, match="WeightNorm is no bijection"):
        found.logdet()
    with pytest.raises(ValueError, match="WeightNorm is no bijection"):
        there.metric.logdet()


def test_natural_gradient_steps() -> None:
    """One step is one step in linear parameters; in others the difference is of second order."""
    at = smooth()
    linear = DiagonalScale({name: torch.rand_like(p) + 0.5 for name, p in at.theta.items()})

    def gap(map, rate: float) -> float:
        there = at.reparametrized(map)
        here = Vector(at.theta) - rate * at.natural_gradient()
        moved = Vector(there.theta) - rate * there.natural_gradient()
        return float((Vector(map(here.parts)) - moved).flat().abs().max())

    assert gap(linear, 0.1) < 2e-12
    gaps = [gap(Elementwise("sinh"), rate) for rate in (1e-2, 1e-3)]
    assert 80 < gaps[0] / gaps[1] < 120


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
    naive = [riemannian_map(log_density, start), riemannian_map(there, map(start))]
    assert (map(naive[0])["w"] - naive[1]["w"]).abs().max() > 0.05
    usual = [laplace_evidence(f, m) for f, m in zip((log_density, there), naive, strict=True)]
    assert (usual[0] - usual[1]).abs() > 1e-3


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


def test_numbers_as_damping() -> None:
    """Refused where they would be silent, and found out where somebody builds them by hand."""
    model, at = small()
    with pytest.raises(TypeError, match="damping is a float; expected a Metric, such as"):
        shape(at).logdet(damping=1e-3)
    with pytest.raises(TypeError, match="metric is a float; expected a Metric"):
        ShapeOperator(at.hessian(), 1.0)

    def by_hand(where: Landscape) -> Tensor:
        return (
            ShapeOperator(where.hessian(), where.metric + 0.1 * Euclidean(where.theta)).trace(
                [Vector(v.parts) for v in where.metric.draws(2, torch.Generator().manual_seed(0))]
            )
            + (where.metric + 0.1 * Euclidean(where.theta)).logdet()
        )

    for factor in (2.0, 10.0, 1000.0):
        map = relu_rescale(model, "0", "2", factor, network("plain")[1])
        with pytest.raises(AssertionError, match="not invariant"):
            assert_invariant(by_hand, at, map)
        assert_invariant(
            lambda where: ShapeOperator(
                where.hessian(), where.metric + 0.1 * where.metric
            ).max_eigenvalue(1e-12, torch.Generator().manual_seed(0)),
            at,
            map,
        )


def jacobian_rows(model: nn.Module, theta, x: Tensor) -> Tensor:
    found = torch.func.jacrev(lambda p: functional_call(model, p, (x,)))(dict(theta))
    return torch.cat([part.flatten(2) for part in found.values()], 2).flatten(0, 1)


def test_tangent_kernels() -> None:
    """``J M⁻¹ Jᵀ`` stays, ``J Jᵀ`` does not; factors by layer are a diagonal metric."""
    model, x, _ = network("groups")
    theta = points_of(model)
    map = relu_rescale(model, "0", "2", 10.0, x)
    psi = map(theta)
    metric = Euclidean(theta).pushforward(map, theta)

    def kernel(at, metric) -> Tensor:
        rows = jacobian_rows(model, at, x)
        roots = torch.stack([metric.root(row).flat() for row in torch.eye(metric.size)], 1)
        return rows @ roots @ roots.T @ rows.T

    plain = kernel(theta, Euclidean(theta))
    assert_close(kernel(psi, metric), plain, 1e-10)
    assert (kernel(psi, Euclidean(psi)) - plain).abs().max() > plain.abs().max()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(psi[name])
    scale = {name: 1.0 for name in theta} | {"0.weight": 100.0, "0.bias": 100.0, "2.weight": 0.01}
    found = tnconv.ntk.empirical_ntk(twin, x, scales=scale)
    expected = tnconv.ntk.empirical_ntk(model, x)
    assert_close(found, expected, 1e-9)
    ntk = parametrization_map(model, "ntk")
    there = Landscape(lambda p: p["0.weight"].sum(), ntk(theta))
    scaled = kernel(theta, Euclidean(there.theta).pullback(ntk, theta))
    assert_close(
        tnconv.ntk.empirical_ntk(model, x, scales="ntk").reshape(scaled.shape), scaled, 1e-9
    )


def test_sharpness_of_a_network() -> None:
    """By operators and loaders it is that of the landscape."""
    model, x, y = network("groups")
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    metric = kfac_metric(model, LOSS, batches, 1e-2)
    at = model_landscape(model, LOSS, batches)
    expected = ShapeOperator(at.hessian("calculus"), metric)
    assert_close(model_hessian(model, LOSS, batches).dense(), at.hessian("calculus").dense(), 1e-10)
    draws = [torch.Generator().manual_seed(0) for _ in range(4)]
    found = sharpness(model, LOSS, batches, metric, probes=3, generator=draws[0])
    assert_close(found, expected.trace(3, draws[1]), 1e-9)
    every = expected.eigenvalues()
    assert_close(sharpness(model, LOSS, batches, metric, "max_eig"), every[-1], 1e-4)
    heavy = 100.0 * metric
    logdet = sharpness(model, LOSS, batches, metric, "logdet", damping=heavy)
    assert_close(logdet, (every + 100).log().sum(), 1e-9)
    with pytest.raises(ValueError, match="measure is 'max'; expected one of 'trace'"):
        sharpness(model, LOSS, batches, metric, "max")
    with pytest.raises(ValueError, match="kind is 'plain'; expected 'calculus' or 'covariant'"):
        at.hessian("plain")
    with pytest.raises(ValueError, match="smallest eigenvalue is"):
        sharpness(model, LOSS, batches, metric, "logdet")
    with pytest.raises(ValueError, match="there are no probes"):
        expected.trace([])


def test_traces_are_unbiased() -> None:
    """The mean over many probes is the sum of the eigenvalues."""
    _, at = small("linear")
    found = shape(at)
    draws = found.metric.draws(4000, torch.Generator().manual_seed(0))
    matrix = found.form.dense()
    each = torch.stack([z.flat() @ matrix @ z.flat() for z in draws])
    error = each.std() / 4000**0.5
    assert (each.mean() - found.eigenvalues().sum()).abs() < 4 * error
    assert_close(found.trace(draws[:50]), each[:50].mean(), 1e-12)


def test_single_precision() -> None:
    """The same to about 1e-4."""
    model, x, y = network("plain")
    model = model.float()
    at = model_landscape(model, LOSS, [(x.float(), y)])
    map = relu_rescale(model, "0", "2", 10.0, x.float())
    assert_invariant(lambda where: shape(where).eigenvalues(), at, map, 1e-4)
