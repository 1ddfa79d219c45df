"""Quantities on random networks: groups, paddings, norms, bypasses, micro-batches."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.monitor.oracle import Oracle
from tnconv.monitor import Monitor
from tnconv.monitor.further_measurements import NormalisationNoiseScale

pytestmark = pytest.mark.usefixtures("float64")
SCALARS = ("Loss", "NormTest", "InnerTest", "OrthoTest", "MeanGSNR", "EarlyStopping")


class Network(nn.Module):
    """A convolution, a norm, a bypass around a grouped convolution, a classifier."""

    def __init__(self, given: dict[str, Any], bypass: bool, norm: bool, calls: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 1 if given["stride"] > 1 else 3, padding=1)
        self.norm = nn.GroupNorm(2, 4) if norm else nn.Identity()
        self.mid = nn.Conv2d(4, 4, **given)
        self.bypass, self.calls = bypass, calls
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.first(x)))
        for _ in range(self.calls):
            z = torch.tanh(self.mid(y))
            y = y + z if self.bypass and z.shape == y.shape else z
        return self.head(y.mean((2, 3)))


@st.composite
def networks(draw: st.DrawFn) -> Network:
    mode = draw(st.sampled_from(["zeros", "circular", "reflect", "same", "valid"]))
    given: dict[str, Any] = {"kernel_size": draw(st.sampled_from([1, 2, 3]))}
    given |= {"groups": draw(st.sampled_from([1, 2, 4])), "bias": draw(st.booleans())}
    given["stride"] = 1 if mode == "same" else draw(st.sampled_from([1, 2]))
    given["dilation"] = draw(st.sampled_from([1, 2])) if given["kernel_size"] < 3 else 1
    given["padding"] = mode if mode in ("same", "valid") else 1
    given["padding_mode"] = mode if mode in ("circular", "reflect") else "zeros"
    calls = draw(st.sampled_from([1, 1, 2])) if mode in ("same", "circular") else 1
    return Network(given, draw(st.booleans()), draw(st.booleans()), calls)


@settings(max_examples=8)
@given(model=networks(), micro=st.sampled_from([1, 2]), mean=st.booleans(), seed=st.integers(0, 99))
def test_values(model: Network, micro: int, mean: bool, seed: int) -> None:
    torch.manual_seed(seed)
    for p in model.parameters():
        nn.init.normal_(p, std=0.6)
    x, y = torch.randn(4, 2, 5, 5), torch.randint(3, (4,))
    loss_fn = nn.CrossEntropyLoss(reduction="mean" if mean else "sum")
    kinds = [*SCALARS, "GradHist1d", "GradHist2d", NormalisationNoiseScale()]
    monitor = Monitor(model, loss_fn, kinds)
    oracle = Oracle(model, nn.CrossEntropyLoss(), x, y)
    with monitor.step():
        for part in torch.arange(4).chunk(micro):
            loss = loss_fn(model(x[part]), y[part])
            (loss / micro if mean else loss).backward()
    record, expected = monitor.records[0], oracle.values()
    for name in SCALARS:
        value = float(expected[name])
        assert record[name] == pytest.approx(value, rel=1e-8, abs=1e-9, nan_ok=True), name
    assert np.array_equal(record["GradHist1d"]["hist"], expected["GradHist1d"])
    assert np.array_equal(record["GradHist2d"]["hist"], expected["GradHist2d"])
    check_noise(model, oracle, record)


def check_noise(model: Network, oracle: Oracle, record: dict[str, Any]) -> None:
    """The noise scale in the parameters of the norm; nothing where there is none."""
    if isinstance(model.norm, nn.Identity):
        assert "NormalisationNoiseScale" not in record
        return
    parts = dict(zip(oracle.names, torch.split(oracle.gradients(), oracle.sizes, 1), strict=True))
    g = torch.cat([parts["norm.weight"], parts["norm.bias"]], 1)
    noise = g.var(0).sum()
    signal = g.mean(0).square().sum() - noise / len(g)
    value = float(noise / signal) if signal > 0 else float("nan")
    found = record["NormalisationNoiseScale"]
    assert found == pytest.approx(value, rel=1e-6, nan_ok=True)


def test_noise_of_normalisation_layers_alone() -> None:
    """The cheap set has it; it is the same with everything else and with nothing else."""
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)
    model, loss_fn = nn.Sequential(*layers), nn.CrossEntropyLoss()
    x, y = torch.randn(8, 5, 3), torch.randint(3, (8,))
    found = []
    for kinds in ("cheap", ["NormalisationNoiseScale", "NormTest"]):
        monitor = Monitor(model, loss_fn, kinds)
        with monitor.step():
            model.zero_grad()
            loss_fn(model(x).mean(1), y).backward()
        found.append(monitor.records[0]["NormalisationNoiseScale"])
    assert found[0] == pytest.approx(found[1], rel=1e-10, nan_ok=True)
