"""Cases that are computed by hand, and identities between quantities."""

from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from tests.monitor.oracle import Residual, chain
from tnconv.monitor import (
    Alpha,
    GradHist1d,
    GradHist2d,
    HessMaxEV,
    HessTrace,
    InnerTest,
    MeanGSNR,
    Monitor,
    NormTest,
    OrthoTest,
    configuration,
    linear,
    logarithmic,
)
from tnconv.monitor.lanczos import extreme
from tnconv.monitor.lanczos_experience import Experience

pytestmark = pytest.mark.usefixtures("float64")
TESTS = [NormTest(), InnerTest(), OrthoTest()]


class Dot(nn.Module):
    """``L = mean_n w·x[n]``: the samples' gradients are the samples."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return output.mean()


def step(monitor: Monitor, model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> None:
    with monitor.step():
        model.zero_grad()
        loss_fn(model(x), y).backward()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([[1.0, 0.0], [0.0, 1.0]], (1, 0, 1)), ([[2.0, 0.0], [0.0, 0.0]], (1, 1, 0))],
)
def test_two_gradients(rows: list[list[float]], expected: tuple[float, ...]) -> None:
    model = nn.Linear(2, 1, bias=False)
    monitor = Monitor(model, Dot(), TESTS)
    step(monitor, model, Dot(), torch.tensor(rows), torch.zeros(2))
    monitor = Monitor(model, loss := Dot(), TESTS)
    step(monitor, model, loss, torch.tensor(rows), torch.zeros(2))
    found = [monitor.records[0][each.name] for each in TESTS]
    assert found == pytest.approx(expected, abs=1e-12)


def test_identities() -> None:
    model, loss_fn = Residual(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    kinds = [*configuration("economy"), "CABS", "TICTrace", "HessTrace", GradHist2d()]
    monitor = Monitor(model, loss_fn, kinds, optimizer=optimizer)
    x, y = torch.randn(6, 2, 4, 4), torch.randint(3, (6,))
    step(monitor, model, loss_fn, x, y)
    r = monitor.records[0]
    square, b = sum(n**2 for n in r["GradNorm"]), 6
    assert r["NormTest"] ** 2 == pytest.approx(r["InnerTest"] ** 2 + r["OrthoTest"] ** 2, rel=1e-12)
    cabs = 0.2 * (b - 1) * square * r["NormTest"] ** 2 / r["Loss"]
    assert r["CABS"] == pytest.approx(cabs, rel=1e-12)
    trace = square * (1 + (b - 1) * r["NormTest"] ** 2) / (sum(r["HessTrace"]) + 1e-7)
    assert r["TICTrace"] == pytest.approx(trace, rel=1e-12)
    entries = b * sum(p.numel() for p in model.parameters())
    assert r["GradHist1d"]["hist"].sum() == r["GradHist2d"]["hist"].sum() == entries


@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0])
def test_parabola(eta: float) -> None:
    """``½ h θ²`` with gradient descent: alpha is ``η h - 1`` for any variances."""
    model, loss_fn = nn.Linear(1, 1, bias=False), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=eta)
    monitor = Monitor(model, loss_fn, [Alpha()])
    x, y = torch.ones(4, 1), torch.zeros(4, 1)
    for _ in range(2):
        with monitor.step():
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
    assert monitor.records[0]["Alpha"] == pytest.approx(eta * 2 - 1, abs=1e-9)


def test_softmax_of_nothing() -> None:
    """Zero weights, C classes: the bias' trace is 1 - 1/C, the weight's that times mean |x|²."""
    model, loss_fn = nn.Linear(5, 4), nn.CrossEntropyLoss()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    x, y = torch.randn(7, 5), torch.randint(4, (7,))
    kinds = [HessTrace("diag_ggn_exact"), HessMaxEV(60, 1e-10)]
    monitor = Monitor(model, loss_fn, kinds)
    step(monitor, model, loss_fn, x, y)
    weight, bias = monitor.records[0]["HessTrace"]
    assert bias == pytest.approx(0.75) and weight == pytest.approx(0.75 * x.square().sum(1).mean())
    one = torch.cat([x, torch.ones(7, 1)], 1)
    largest = torch.linalg.eigvalsh(one.T @ one / 7)[-1] / 4
    assert monitor.records[0]["HessMaxEV"] == pytest.approx(float(largest), rel=1e-6)


def test_duplicated_batch() -> None:
    model, loss_fn = chain(), nn.CrossEntropyLoss()
    x, y = torch.randn(5, 2, 4, 4), torch.randint(3, (5,))
    monitor = Monitor(
        model, loss_fn, [NormTest(), MeanGSNR(1e-12), HessTrace(), HessMaxEV(40, 1e-9)]
    )
    step(monitor, model, loss_fn, x, y)
    step(monitor, model, loss_fn, torch.cat([x, x]), torch.cat([y, y]))
    one, two = monitor.records
    assert two["NormTest"] ** 2 == pytest.approx(one["NormTest"] ** 2 * 4 / 9, rel=1e-10)
    for name in ("MeanGSNR", "HessTrace", "HessMaxEV"):
        assert two[name] == pytest.approx(one[name], rel=1e-7)


def test_largest_magnitude() -> None:
    matrix = torch.diag(torch.tensor([-6.0, 2.0, 1.0]))
    assert extreme(lambda v: matrix @ v, torch.ones(3)).value == pytest.approx(-6)
    assert extreme(lambda v: matrix @ v, torch.ones(3), "largest").value == pytest.approx(2)


def test_short_runs_know_what_long_ones_showed() -> None:
    """Matrices of alike spectra in other bases and scales: fewer products, within the tolerance."""
    experience, taken, alone = Experience(), [], []
    spectrum = torch.cat([torch.ones(1), torch.linspace(0.7, -0.2, 59)])
    weights = torch.rand(60) + 0.2
    weights[0] = 2.0
    for step in range(40):
        q, scale = torch.linalg.qr(torch.randn(60, 60))[0], 0.5 + float(torch.rand(()))
        matrix = scale * (q * spectrum) @ q.T
        start = q @ (weights * (1 + 0.05 * torch.randn(60)))
        how = lambda v, m=matrix: m @ v, start, "magnitude", 12, 0.01
        found = extreme(*how, experience)
        assert found.value == pytest.approx(scale, rel=0.005), step
        taken.append(found.products)
        alone.append(extreme(*how).products)
    assert sum(taken[16:]) < 0.9 * sum(alone[16:]) and max(taken[:2]) > min(alone)
    assert Experience.of(experience.state()) == experience


def test_schedules() -> None:
    for start, end, steps, base in (
        (0, 3, 50, 10.0),
        (0, 9, 10, 2.0),
        (1, 2, 7, 10.0),
        (0, 4, 300, 10),
    ):
        exponents = [start + k * (end - start) / (steps - 1) for k in range(steps)]
        expected = {s for e in exponents if (s := int(base**e + 1e-9)) < 3000} | {0}
        schedule = logarithmic(start, end, steps, base)
        last = int(base**end) + 5
        assert {s for s in range(min(last, 3000)) if schedule(s)} == expected
    assert [s for s in range(9) if linear(3, 2)(s)] == [2, 5, 8]
    with pytest.raises(ValueError, match="interval is 0"):
        linear(0)


def test_layerwise_histograms_add_up() -> None:
    model, loss_fn = Residual(), nn.CrossEntropyLoss()
    monitor = Monitor(model, loss_fn, [GradHist1d(20, layerwise=True, adaptation="absmax")])
    for _ in range(2):
        step(monitor, model, loss_fn, torch.randn(5, 2, 4, 4), torch.randint(3, (5,)))
    first, second = (record["GradHist1d"] for record in monitor.records)
    each = [first[f"param_{at}"]["hist"] for at in range(len(list(model.parameters())))]
    assert (sum(each[1:], each[0]) == first["hist"]).all()
    assert first["edges"][-1] == 2 and sqrt(1e-9) < second["edges"][-1] != 2
