"""Bandits, continual learning and width sweeps against their definitions."""

from math import log, sqrt
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import linregress, multivariate_normal, t
from torch import Tensor, nn

from tests.ntk.oracle import jacobian
from tests.operators.test_low_rank import NETWORKS
from tests.strategies import assert_close
from tnconv import ntk
from tnconv.ntk.incremental import IncrementalNTK, Theory
from tnconv.ntk.width_sweep import Row, WidthSweep, WidthTable, student_quantile

pytestmark = pytest.mark.usefixtures("float64")


def linear(x: Tensor, y: Tensor | None = None) -> Tensor:
    return x @ (x if y is None else y).T


@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.floats(0.05, 5))
def test_points_in_any_portions(sizes: list[int], damping: float) -> None:
    """NeuralUCB's Z over features, made anew, against the bordered factor."""
    generator = torch.Generator().manual_seed(sum(sizes))
    x = torch.randn(sum(sizes), 4, generator=generator)
    rewards, new = torch.randn(len(x), generator=generator), torch.randn(3, 4, generator=generator)
    held = IncrementalNTK(linear, damping)
    for points, given_rewards in zip(x.split(sizes), rewards.split(sizes), strict=True):
        held.append(points, given_rewards)
    z = damping * torch.eye(4) + x.T @ x
    inverse = torch.linalg.inv(z)
    assert len(held) == len(x)
    assert_close(held.variance(new), ((new @ inverse) * new).sum(1), 1e-9)
    assert_close(held.mean(new), new @ inverse @ x.T @ rewards, 1e-9)
    expected = float(torch.logdet(z)) - 4 * log(damping)
    assert held.logdet() == pytest.approx(expected, abs=1e-9)
    noise = 0.7
    covariance = noise**2 / damping * (x @ x.T + damping * torch.eye(len(x)))
    density = multivariate_normal(cov=covariance.numpy()).logpdf(rewards.numpy())
    assert held.log_evidence(noise) == pytest.approx(float(density), rel=1e-8, abs=1e-8)
    best = held.exploration("evidence")
    for other in (0.99 * best, 1.01 * best):
        assert held.log_evidence(best) > held.log_evidence(other)
    theory = Theory(noise=0.5, failure=0.2, norm=3.0)
    gamma = sqrt(0.25 * expected - 0.5 * log(0.2)) + sqrt(damping) * 3
    assert held.exploration(theory) == pytest.approx(gamma)
    bound = held.mean(new) + gamma * held.variance(new).sqrt()
    assert_close(held.ucb(new, theory), bound)
    assert_close(held.ucb(new, 0.0, torch.ones(3)), torch.ones(3))


def test_bonus_of_a_network() -> None:
    torch.manual_seed(0)
    model, x = NETWORKS["strided"]()
    new, width = torch.rand(2, 2, 5, 6), 3

    def kernel(a: Tensor, b: Tensor | None = None) -> Tensor:
        return ntk.empirical_ntk(model, a, b, outputs="sum", reduce="trace") / width

    held = IncrementalNTK(kernel, 0.4)
    assert_close(held.variance(new), kernel(new).diagonal() / 0.4)
    for each in x.split(2):
        held.append(each)
    g, h = (
        torch.cat([j.flatten(1) for j in jacobian(model, each, torch.ones(1, 4)).values()], 1)
        for each in (x, new)
    )
    z = 0.4 * torch.eye(g.shape[1]) + g.T @ g / width
    assert_close(held.variance(new), ((h @ torch.linalg.inv(z)) * h).sum(1) / width, 1e-9)


def test_errors_of_bandits() -> None:
    with pytest.raises(ValueError, match="damping is 0"):
        IncrementalNTK(linear, 0)
    held = IncrementalNTK(linear)
    assert held.logdet() == 0 and held.exploration("evidence") == 1
    held.append(torch.eye(2))
    with pytest.raises(ValueError, match="rewards were given for some points only"):
        held.append(torch.eye(2), torch.ones(2))
    with pytest.raises(ValueError, match="the points have no rewards"):
        held.mean(torch.eye(2))
    with pytest.raises(ValueError, match=r"rewards have shape \(3,\); expected \(2,\)"):
        IncrementalNTK(linear).append(torch.eye(2), torch.ones(3))
    for gamma in ("theory", -1.0):
        with pytest.raises(ValueError, match="gamma is"):
            held.exploration(gamma)  # type: ignore[arg-type]


def test_accuracies_and_forgetting() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(2, 2), torch.randn(6, 2)
    labels = [torch.tensor([0, 1, 0, 1, 1, 0]), torch.tensor([1, 1, 1, 0, 0, 0])]

    def train(at: int) -> None:
        with torch.no_grad():
            model.bias.copy_(torch.tensor([[100.0, 0.0], [0.0, 100.0]][at]))

    tests = [(x, each) for each in labels]
    found = ntk.accuracy_matrix(model, [lambda: train(0), lambda: train(1)], tests)
    assert_close(found[1:], torch.full((2, 2), 0.5))
    a = torch.rand(5, 4)
    expected = sum(max(a[i + 1 : 4, i].tolist()) - float(a[4, i]) for i in range(3)) / 3
    assert ntk.forgetting(a) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"accuracies have shape \(2, 2\)"):
        ntk.forgetting(torch.ones(2, 2))
    with pytest.raises(ValueError, match="there are 0 tasks and 2 tests"):
        ntk.accuracy_matrix(model, [], tests)


def test_overlap_of_tasks() -> None:
    model, x = NETWORKS["tied"]()
    tasks = [x[:2], x[2:]]
    j = [torch.cat([g.flatten(2) for g in jacobian(model, t_).values()], 2) for t_ in tasks]
    p = [each.flatten(0, 1).T @ each.flatten(0, 1) for each in j]
    expected = float((p[0] * p[1]).sum() / p[0].norm() / p[1].norm())
    found = ntk.kernel_overlap(model, tasks)
    assert_close(found, torch.tensor([[1.0, expected], [expected, 1.0]]))


def test_slopes_are_those_of_regression(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = [
        Row(width, seed, "a", float(3 * width**-0.5 * torch.exp(0.1 * torch.randn(()))))
        for width in (4, 16, 64)
        for seed in range(4)
    ]
    table = WidthTable(tuple(rows))
    found = table.slope("a", 0.9)
    logs = [(log(row.width), log(row.value)) for row in rows]
    line = linregress(*zip(*logs, strict=True))
    half = t.ppf(0.95, 10) * line.stderr
    assert found.exponent == pytest.approx(line.slope)
    assert found.lower == pytest.approx(line.slope - half, abs=1e-4)
    assert found.upper == pytest.approx(line.slope + half, abs=1e-4)
    table.plot(tmp_path / "slopes.png")
    assert (tmp_path / "slopes.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="there are 0 values of probe 'b'"):
        table.slope("b")
    with pytest.raises(ValueError, match="confidence is 1"):
        table.slope("a", 1)
    with pytest.raises(ValueError, match="are not positive"):
        WidthTable((*rows, Row(4, 9, "a", 0.0))).slope("a")


@pytest.mark.parametrize("p", [0.9, 0.975, 0.995])
@pytest.mark.parametrize("freedom", [1, 2, 4, 10, 60])
def test_quantiles(p: float, freedom: int) -> None:
    assert student_quantile(p, freedom) == pytest.approx(t.ppf(p, freedom), rel=1e-2)


def test_seeds_make_networks() -> None:
    made = []

    def factory(width: int) -> nn.Module:
        made.append(nn.Linear(width, 1))
        return made[-1]

    before = torch.random.get_rng_state()
    sweep = WidthSweep(factory, (2, 3), (0, 1), {"norm": lambda net: float(net.weight.norm())})
    first, second = sweep.run(), sweep.run()
    assert torch.equal(before, torch.random.get_rng_state())
    assert first == second and len(first.rows) == 4 and len({row.value for row in first}) == 4
    with pytest.raises(ValueError, match="widths, seeds and probes"):
        WidthSweep(factory, (), (0,), {}).run()
