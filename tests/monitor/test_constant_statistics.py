"""Gradients of samples where batch normalisation trains, with its statistics as constants."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.monitor.oracle import Oracle
from tnconv.monitor import Alpha, HessTrace, Monitor, NormalisationNoiseScale

pytestmark = pytest.mark.usefixtures("float64")
SCALARS = ("Loss", "NormTest", "InnerTest", "OrthoTest", "MeanGSNR", "CriticalBatchSize")


class Net(nn.Module):
    """Batch normalisation with and without running statistics, dropout, a bypass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.mid = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.last = nn.BatchNorm1d(4, track_running_stats=False)
        self.middle, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.first(x)))
        y = (y + torch.tanh(self.mid(y))).mean((2, 3))
        return self.head(self.middle(torch.tanh(self.last(y))))


class Frozen(nn.Module):
    """The same with given statistics and no dropout: what the measurements are of."""

    def __init__(self, net: Net, x: Tensor) -> None:
        super().__init__()
        self.net, self.given = net, {}
        with torch.no_grad():
            a = net.first(x)
            self.given["norm"] = a.mean((0, 2, 3)), a.var((0, 2, 3), correction=0)
            y = torch.tanh(self.normalised("norm", a))
            b = (y + torch.tanh(net.mid(y))).mean((2, 3))
            self.given["last"] = b.mean(0), b.var(0, correction=0)

    def normalised(self, name: str, a: Tensor) -> Tensor:
        layer: Any = getattr(self.net, name)
        mean, var = (s.reshape(-1, *[1] * (a.dim() - 2)) for s in self.given[name])
        weight, bias = (s.reshape(-1, *[1] * (a.dim() - 2)) for s in (layer.weight, layer.bias))
        return (a - mean) / (var + layer.eps).sqrt() * weight + bias

    def forward(self, x: Tensor) -> Tensor:
        net = self.net
        y = torch.tanh(self.normalised("norm", net.first(x)))
        y = (y + torch.tanh(net.mid(y))).mean((2, 3))
        return net.head(net.middle(torch.tanh(self.normalised("last", y))))


@pytest.mark.parametrize(("reduction", "micro"), [("mean", 1), ("sum", 2)])
def test_values(reduction: str, micro: int) -> None:
    """Against networks that have the statistics as numbers."""
    model, loss_fn = Net(), nn.CrossEntropyLoss(reduction=reduction)
    kinds = [*SCALARS, "GradNorm", "GradHist1d", NormalisationNoiseScale()]
    kinds += [HessTrace("diag_ggn_exact")]
    monitor = Monitor(model, loss_fn, kinds, batch_statistics_as_constants=True)
    x, y = torch.randn(6, 2, 4, 4), torch.randint(3, (6,))
    parts = [torch.arange(6)] if micro == 1 else [torch.arange(4), torch.arange(4, 6)]
    frozen = [Oracle(Frozen(model, x[at]), nn.CrossEntropyLoss(), x[at], y[at]) for at in parts]
    each = torch.cat([oracle.gradients() for oracle in frozen])
    trace = sum(len(at) / 6 * o.ggn(nn.CrossEntropyLoss()).diagonal()
                for at, o in zip(parts, frozen, strict=True))  # fmt: skip
    whole = Oracle(Frozen(model, x), nn.CrossEntropyLoss(), x, y)
    whole.gradients, whole.losses = lambda: each, lambda: torch.cat([o.losses() for o in frozen])  # type: ignore[method-assign]
    with monitor.step():
        for at in parts:
            loss_fn(model(x[at]), y[at]).backward()
    record, expected = monitor.records[0], whole.values()
    for name in SCALARS:
        assert record[name] == pytest.approx(float(expected[name]), rel=1e-9, nan_ok=True), name
    assert (record["GradHist1d"]["hist"] == expected["GradHist1d"]).all()
    norms = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
    assert record["GradNorm"] == pytest.approx(norms, rel=1e-12)  # of the run's own gradient
    found = [float(part.sum()) for part in frozen[0].by_parameter(trace)]
    assert record["HessTrace"] == pytest.approx(found, rel=1e-8)


def test_the_run_is_as_without() -> None:
    """Weights, running statistics and masks of dropout, bit by bit; steps compared in pairs."""
    found = []
    for watched in (False, True):
        torch.manual_seed(0)
        model, loss_fn = Net(), nn.CrossEntropyLoss()
        model.middle = nn.Sequential(nn.LayerNorm(4), nn.Dropout(0.4))  # type: ignore[assignment]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        kinds = ["NormTest", Alpha(), "GradHist1d"]
        monitor = Monitor(model, loss_fn, kinds, batch_statistics_as_constants=True)
        for _ in range(4):
            x, y = torch.randn(6, 2, 4, 4), torch.randint(3, (6,))

            def train(x: Tensor = x, y: Tensor = y) -> None:
                optimizer.zero_grad()  # noqa: B023
                loss_fn(model(x), y).backward()  # noqa: B023
                optimizer.step()  # noqa: B023

            if watched:
                with monitor.step():
                    train()
            else:
                train()
        found.append(copy.deepcopy(model.state_dict()))
        assert not watched or all("NormTest" in r for r in monitor.records)
        assert not watched or all("Alpha" in r for r in monitor.records[:-1])
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
    assert found[0].keys() == found[1].keys()


def test_what_is_not_repeated_is_left_out() -> None:
    """A loss of something else than the model's output, and statistics of all workers."""
    model, loss_fn = Net(), nn.CrossEntropyLoss()
    monitor = Monitor(model, loss_fn, ["NormTest", "Loss"], batch_statistics_as_constants=True)
    with pytest.warns(UserWarning, match="reads something else than what the model returned"):
        with monitor.step():
            loss_fn(2 * model(torch.randn(6, 2, 4, 4)), torch.randint(3, (6,))).backward()
    assert monitor.records[0].keys() == {"step", "Loss"}
