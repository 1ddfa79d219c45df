"""Drift, stability, linear models and predictions against dense Jacobians."""

from copy import deepcopy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tnconv
from tests.models.test_geometries import layers
from tests.ntk.oracle import jacobian
from tests.operators.test_low_rank import NETWORKS
from tests.quick_programs import quick_programs
from tests.strategies import assert_close
from tnconv import ntk
from tnconv.losses import curvature

pytestmark = pytest.mark.usefixtures("float64")


def moved(model: nn.Module, size: float = 0.1) -> dict[str, Tensor]:
    return {n: p.detach() + size * torch.randn_like(p) for n, p in model.named_parameters()}


def case(name: str = "strided") -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    return model, x, moved(model)


def flat(j: dict[str, Tensor]) -> Tensor:
    """``J[(n, c), θ]``."""
    return torch.cat([each.flatten(0, 1) for each in j.values()], 1)


def check_drift(model: nn.Module, x: Tensor, before: dict[str, Tensor], chunks: int | None) -> None:
    j, k = jacobian(model, x), jacobian(model, x, state=before)
    change = {name: j[name] - k[name] for name in j}
    drift = ntk.jacobian_drift(model, x, before, chunks=chunks)
    size = float(flat(change).norm())
    for found, each in (
        (drift, flat(change)),
        *((drift.layers[name], flat({name: change[name]})) for name in change),
    ):
        assert found.frobenius == pytest.approx(float(each.norm()), rel=1e-9, abs=1e-7 * size)
        norm = float(torch.linalg.matrix_norm(each, 2))
        assert found.spectral == pytest.approx(norm, rel=1e-9, abs=1e-7 * size)


@pytest.mark.parametrize("name", NETWORKS)
def test_drift_of_networks(name: str) -> None:
    check_drift(*case(name), 2)


@settings(max_examples=12)
@given(layers(), st.sampled_from([None, 1]))
def test_drift_of_geometries(case: tuple[nn.Module, Tensor], chunks: int | None) -> None:
    layer, x = case
    try:
        entries = layer(x).flatten(1).shape[1]
    except RuntimeError:  # torch refuses the geometry
        assume(False)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(entries, 2))
    with quick_programs():
        check_drift(model, x, moved(model), chunks)


class Unused(nn.Module):
    """A layer that only one of two checkpoints uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)
        self.register_buffer("both", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x) if self.both else self.first(x)


def test_drift_where_a_layer_is_not_used() -> None:
    model, x = Unused(), torch.rand(4, 3)
    model.both.zero_()
    for now, before in ((model, Unused()), (Unused(), model)):
        second = flat({n: g for n, g in jacobian(Unused(), x).items() if "second" in n})
        drift = ntk.jacobian_drift(now, x, before, chunks=2)
        assert drift.frobenius == pytest.approx(float(second.norm()))


def test_small_drift_in_single_precision() -> None:
    """1e-4 at a drift of 1e-4, where kernels themselves differ by rounding errors alone."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 16, 3, 2), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(144, 10)),
    )
    x = torch.randn(8, 3, 8, 8)
    now = deepcopy(model)
    with torch.no_grad():
        for p in now.parameters():
            p.add_(1e-4 * p.norm() / p.numel() ** 0.5 * torch.randn_like(p))
    single, before = deepcopy(now).float(), deepcopy(model).float()
    exact = ntk.jacobian_drift(deepcopy(single).double(), x.float().double(), before.double())
    relative = exact.frobenius / float(flat(jacobian(model, x)).norm())
    assert 5e-5 < relative < 3e-4
    before = before.float()
    found = ntk.jacobian_drift(single, x.float(), before)
    assert found.spectral == pytest.approx(exact.spectral, rel=1e-4)
    assert found.frobenius == pytest.approx(exact.frobenius, rel=1e-4)
    tt, t0, oo = (
        ntk.empirical_ntk(a, x.float(), other=b)
        for a, b in ((single, None), (single, before), (before, None))
    )
    kernels = (tt - t0 - t0.permute(2, 3, 0, 1) + oo).flatten(2).flatten(0, 1)
    wrong = float(torch.linalg.matrix_norm(kernels.double(), 2)) ** 0.5
    assert abs(wrong / exact.spectral - 1) > 1e-2


def test_stable_jacobian() -> None:
    model, x, before = case()
    start = deepcopy(model)
    start.load_state_dict(before)
    j, k = flat(jacobian(model, x)), flat(jacobian(start, x))
    least = float(torch.linalg.eigvalsh(k @ k.T)[0])
    targets = torch.randn(5, 4)
    found = ntk.stable_jacobian(model, x, targets, before)
    assert found.smallest_eigenvalue == pytest.approx(least, rel=1e-8)
    radius = 3 * float((targets - start(x)).detach().norm()) / least**0.5
    assert found.radius == pytest.approx(radius, rel=1e-8)
    constant = 3 * float(torch.linalg.matrix_norm(j - k, 2)) / least**0.5
    assert found.constant == pytest.approx(constant, rel=1e-8)
    travel = torch.stack([(p - before[n]).norm() for n, p in model.named_parameters()]).norm()
    assert found.distance == pytest.approx(float(travel))
    assert found.inside_ball == (found.distance <= found.radius)
    near = {n: p.detach() + 1e-5 * torch.randn_like(p) for n, p in model.named_parameters()}
    assert ntk.stable_jacobian(model, x, targets, near).verdict == "not refuted"
    far = {n: p.detach() + torch.rand_like(p) for n, p in model.named_parameters()}
    refuted = ntk.stable_jacobian(model, x, 1e6 * targets, far)
    assert refuted.verdict == "refuted"
    assert ntk.stable_jacobian(model, x, start(x).detach(), start).verdict == "outside the ball"
    with pytest.raises(ValueError, match=r"targets have shape \(5,\); expected the outputs'"):
        ntk.stable_jacobian(model, x, torch.zeros(5), before)
    with pytest.warns(UserWarning, match=r"smallest eigenvalue was computed in torch.float32"):
        ntk.stable_jacobian(model.float(), x.float(), targets.float(), near)


@pytest.mark.parametrize("name", NETWORKS)
def test_linearized_values_and_gradients(name: str) -> None:
    model, x, values = case(name)
    linear = ntk.linearize(model)
    linear.moved.load_state_dict(values, strict=False)
    j = jacobian(model, x)
    change = torch.cat([(values[n] - p.detach()).flatten() for n, p in model.named_parameters()])
    expected = model(x).flatten() + flat(j) @ change
    assert_close(linear(x).flatten(), expected.detach(), 1e-11)
    weights = torch.randn(len(x), 4)
    (linear(x) * weights).sum().backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in linear.moved.parameters()]
    gradient = torch.cat([each.flatten() for each in found])
    assert_close(gradient, flat(j).T @ weights.flatten(), 1e-11)
    assert all(p.grad is None for p in linear.origin.parameters())


def test_gap_and_travel() -> None:
    model, x, before = case()
    start = deepcopy(model)
    start.load_state_dict(before)
    linear = ntk.linearize(start)
    linear.moved.load_state_dict(model.state_dict())
    expected = (model(x) - linear(x)).norm() / (model(x) - start(x)).norm()
    assert ntk.linearization_gap(model, before, x) == pytest.approx(float(expected))
    assert ntk.linearization_gap(model, model, x) == 0.0
    affine = nn.Linear(3, 2)
    assert ntk.linearization_gap(affine, moved(affine), torch.rand(4, 3)) < 1e-12
    own = [(p - before[n], before[n]) for n, p in model.named_parameters()]
    norms = [torch.stack([each[at].norm() for each in own]).norm() for at in (0, 1)]
    assert ntk.parameter_travel(model, before) == pytest.approx(float(norms[0] / norms[1]))


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_gradient_flow_is_predicted(ridge: float) -> None:
    """The linearised model trained by fourth-order Runge-Kutta steps, as `ntk_predict` says."""
    model, x, _ = case()
    other, y = torch.randn(3, 2, 5, 6), torch.randn(5, 4)
    theta = ntk.empirical_ntk(model, x)
    cross = ntk.empirical_ntk(model, other, x)
    linear = ntk.linearize(model)
    parameters = list(linear.moved.parameters())
    origin = list(linear.origin.parameters())

    def velocity(values: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            for p, value in zip(parameters, values, strict=True):
                p.copy_(value)
        away = sum(((p - o).square().sum() for p, o in zip(parameters, origin, strict=True)))
        loss = (linear(x) - y).square().sum() / 2 + ridge / 2 * away
        return list(torch.autograd.grad(-rate * loss, parameters))

    def along(values: list[Tensor], slopes: list[Tensor], step: float) -> list[Tensor]:
        return [v + step * s for v, s in zip(values, slopes, strict=True)]

    rate = 1 / float(ntk.spectrum(theta)[0])
    values, step = [p.detach().clone() for p in parameters], 0.15
    for _ in range(20):
        k1 = velocity(values)
        k2 = velocity(along(values, k1, step / 2))
        k3 = velocity(along(values, k2, step / 2))
        k4 = velocity(along(values, k3, step))
        for slopes, weight in zip((k1, k2, k3, k4), (1, 2, 2, 1), strict=True):
            values = along(values, slopes, step * weight / 6)
    velocity(values)
    residual, start = (y - model(x)).detach(), model(other).detach()
    found = ntk.ntk_predict(theta, cross, residual, start, time=3.0, rate=rate, ridge=ridge)
    assert_close(linear(other).detach(), found.mean, 1e-6)


def test_posterior() -> None:
    model, x, _ = case("normalised")
    other, y, ridge = torch.randn(3, 2, 4, 4), torch.randn(5, 4), 0.2
    j, k = flat(jacobian(model, x)), flat(jacobian(model, other))
    blocks = [ntk.empirical_ntk(model, *each) for each in ((x,), (other, x), (other,))]
    residual, start = (y - model(x)).detach(), model(other).detach()
    found = ntk.ntk_predict(*blocks[:2], residual, start, ridge=ridge, test=blocks[2])
    inverse = torch.linalg.inv(j.T @ j + ridge * torch.eye(j.shape[1]))
    assert_close(found.mean.flatten(), start.flatten() + k @ inverse @ j.T @ residual.flatten())
    assert found.covariance is not None
    assert_close(found.covariance.flatten(2).flatten(0, 1), ridge * k @ inverse @ k.T, 1e-9)


def test_rank_deficient_kernels_learn_what_they_can() -> None:
    theta = torch.ones(2, 2)
    found = ntk.ntk_predict(theta, theta, torch.tensor([1.0, 0.0]), torch.zeros(2))
    assert_close(found.mean, torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("loss", ["cross-entropy", "squares"])
def test_curvature_from_kernels(loss: str) -> None:
    model, x, _ = case("tied")
    labels = torch.tensor([0, 3, 1, 1, 2])
    targets = labels if loss == "cross-entropy" else torch.randn(5, 4)
    kind = nn.CrossEntropyLoss if loss == "cross-entropy" else nn.MSELoss
    outputs, theta = model(x).detach(), ntk.empirical_ntk(model, x)
    expected = tnconv.low_rank_ggn(model, kind(), x, targets).eigvalsh()
    found = ntk.ggn_spectrum(theta, kind(), outputs, targets)
    assert_close(found[: len(expected)], expected[: len(found)], 1e-9)
    other, loss_fn = torch.randn(3, 3, 6), kind(reduction="sum")
    root = curvature(loss_fn, outputs, targets).vectors().flatten(2)  # (m, n, c)
    hessian = torch.einsum("mnc,mnd->ncd", root, root)
    j, k = flat(jacobian(model, x)).reshape(5, 4, -1), flat(jacobian(model, other))
    precision = torch.einsum("ncp,ncd,ndq->pq", j, hessian, j) + 0.7 * torch.eye(j.shape[2])
    covariance = k @ torch.linalg.solve(precision, k.T)
    cross = ntk.empirical_ntk(model, other, x)
    how = loss_fn, outputs, targets, 0.7
    whole = ntk.glm_covariance(theta, cross, ntk.empirical_ntk(model, other), *how)
    assert_close(whole.flatten(2).flatten(0, 1), covariance, 1e-9)
    own = ntk.empirical_ntk(model, other, reduce="sample_diagonal")
    each = ntk.glm_covariance(theta, cross, own, *how)
    assert_close(each, covariance.reshape(3, 4, 3, 4).diagonal(dim1=0, dim2=2).permute(2, 0, 1))


def test_descriptions_of_kernels() -> None:
    model, x, before = case()
    theta, other = ntk.empirical_ntk(model, x), ntk.empirical_ntk(deepcopy(model), x, other=before)
    a, b = (k.flatten(2).flatten(0, 1) for k in (theta, other))
    assert ntk.kernel_drift(theta, other) == pytest.approx(float((a - b).norm() / b.norm()))
    cosine = float((a * b).sum() / a.norm() / b.norm())
    assert ntk.kernel_distance(theta, other) == pytest.approx(1 - cosine)
    assert ntk.kernel_distance(theta, theta) == 0
    centring = torch.eye(20) - 1 / 20
    a_c, b_c = (centring @ k @ centring for k in (a, b))
    alignment = float((a_c * b_c).sum() / a_c.norm() / b_c.norm())
    assert ntk.centred_alignment(theta, other) == pytest.approx(alignment)
    y = torch.randn(5, 4)
    expected = float(y.flatten() @ a @ y.flatten() / a.norm() / y.square().sum())
    assert ntk.target_alignment(theta, y) == pytest.approx(expected)
    assert ntk.effective_rank(torch.diag(torch.tensor([1.0, 1.0, 0.0]))) == pytest.approx(2)
    assert_close(ntk.spectrum(theta), torch.linalg.eigvalsh(a).flip(0))
    with pytest.warns(UserWarning, match="smallest eigenvalue"):
        ntk.smallest_eigenvalue(theta.float())


def test_errors() -> None:
    theta = torch.eye(4)
    wrong = {
        r"train and cross are matrices of shapes \(4, 4\) and": (torch.ones(3), torch.ones(4), {}),
        "time, rate and ridge are -1": (torch.ones(4), torch.ones(4), {"time": -1}),
        "time is 1; the posterior": (torch.ones(4), torch.ones(4), {"time": 1, "test": theta}),
    }
    for message, (residual, start, options) in wrong.items():
        with pytest.raises(ValueError, match=message):
            ntk.ntk_predict(theta, theta, residual, start, **options)
    with pytest.raises(ValueError, match=r"the kernel has 4 rows and outputs have shape \(3, 2\)"):
        ntk.ggn_spectrum(theta, nn.MSELoss(), torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="prior_precision is 0"):
        ntk.glm_covariance(*[theta] * 3, nn.MSELoss(), torch.ones(2, 2), torch.ones(2, 2), 0)
    with pytest.raises(ValueError, match=r"a kernel has shape \(2, 2, 2\)"):
        ntk.spectrum(torch.ones(2, 2, 2))
    with pytest.raises(ValueError, match=r"kernels have shapes \(4, 4\) and \(3, 3\)"):
        ntk.kernel_drift(theta, torch.eye(3))
