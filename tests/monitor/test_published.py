"""All published quantities against their definitions, in float64, on several networks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tnconv
from tests.monitor.oracle import Oracle, Residual, alpha, chain
from tnconv.monitor import (
    CriticalBatchSize,
    HessSpectrum,
    HessTrace,
    LargestSample,
    Monitor,
    TICDiag,
)
from tnconv.monitor.published import PUBLISHED

pytestmark = pytest.mark.usefixtures("float64")
NETWORKS: dict[str, Callable[[], nn.Module]] = {"residual": Residual, "chain": chain}
SCALARS = ("Loss", "NormTest", "InnerTest", "OrthoTest", "CABS", "EarlyStopping", "MeanGSNR")
SCALARS += ("CriticalBatchSize", "LargestSample")


def close(found: float, expected: Any, tolerance: float = 1e-9) -> None:
    expected = float(expected)
    same = found != found and expected != expected
    assert same or abs(found - expected) <= tolerance * max(1e-3, abs(expected)), (found, expected)


def batch(samples: int) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 2, 4, 4), torch.randint(3, (samples,))


@pytest.mark.parametrize(("reduction", "micro"), [("mean", 1), ("mean", 2), ("sum", 2)])
@pytest.mark.parametrize("network", NETWORKS)
def test_values(network: str, reduction: str, micro: int) -> None:
    model = NETWORKS[network]()
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    rate = 0.3 if reduction == "mean" else 0.3 / 6
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    kinds = [*PUBLISHED, CriticalBatchSize, LargestSample]
    curvature = "diag_h" if network == "chain" else "hesscale"
    monitor = Monitor(model, loss_fn, kinds, optimizer=optimizer, curvature=curvature)
    oracles, grads = [], []
    for _ in range(3):
        x, y = batch(6)
        oracles.append(Oracle(model, nn.CrossEntropyLoss(), x, y))
        with monitor.step():
            optimizer.zero_grad()
            for part in range(micro):
                at = slice(part * 6 // micro, (part + 1) * 6 // micro)
                loss = loss_fn(model(x[at]), y[at])
                (loss / micro if reduction == "mean" else loss).backward()
            grads.append([float(p.grad.norm()) for p in model.parameters()])
            for p in model.parameters():
                p.grad.mul_(0.7)  # as clipping does
            optimizer.step()
    start = oracles[0].by_parameter(oracles[0].flat)
    for at, (oracle, record) in enumerate(zip(oracles, monitor.records, strict=True)):
        expected = oracle.values(0.3)
        for name in SCALARS:
            close(record[name], expected[name])
        assert np.array_equal(record["GradHist1d"]["hist"], expected["GradHist1d"])
        assert np.array_equal(record["GradHist2d"]["hist"], expected["GradHist2d"])
        for found, norm in zip(record["GradNorm"], grads[at], strict=True):
            close(found, norm)
        now = oracle.by_parameter(oracle.flat)
        for found, p, q in zip(record["Distance"], now, start, strict=True):
            close(found, (p - q).norm())
        assert np.allclose(np.concatenate([np.ravel(v) for v in record["Parameters"]]), oracle.flat)
        if not at:
            check_curvature(oracle, record, curvature, micro)
        if at < 2:
            after = oracles[at + 1]
            close(record["Alpha"], alpha(oracle, after), 1e-7)
            for found, d in zip(
                record["UpdateSize"], oracle.by_parameter(after.flat - oracle.flat), strict=True
            ):
                close(found, d.norm())
    assert "Alpha" not in monitor.records[-1] and "UpdateSize" in monitor.records[-1]


def check_curvature(oracle: Oracle, record: dict[str, Any], curvature: str, micro: int) -> None:
    """Eigenvalues of micro-batches are averaged: no one has all their graphs."""
    h, moments = oracle.hessian(), oracle.gradients().square().mean(0)
    values = torch.linalg.eigvalsh(h)
    if micro == 1:
        close(record["HessMaxEV"], values[values.abs().argmax()], 0.02)
    if curvature == "diag_h":
        close(record["TICDiag"], (moments / (h.diagonal() + 1e-7)).sum())
        close(record["TICTrace"], moments.sum() / (h.trace() + 1e-7))
        for found, d in zip(record["HessTrace"], oracle.by_parameter(h.diagonal()), strict=True):
            close(found, d.sum())


@pytest.mark.parametrize("kind", ["hesscale", "gn", "diag_ggn_exact", "diag_ggn_mc"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_curvatures(kind: Any, reduction: str) -> None:
    model, loss_fn = Residual(), nn.CrossEntropyLoss(reduction=reduction)
    x, y = batch(6)
    oracle, mean = Oracle(model, nn.CrossEntropyLoss(), x, y), nn.CrossEntropyLoss()
    monitor = Monitor(model, loss_fn, [HessTrace(kind), TICDiag(kind)])
    with monitor.step():
        loss_fn(model(x), y).backward()
    if kind == "diag_ggn_exact":
        d = oracle.ggn(mean).diagonal()
    elif kind == "diag_ggn_mc":
        assert len(monitor.records[0]["HessTrace"]) == len(oracle.names)
        assert min(monitor.records[0]["HessTrace"]) > 0
        return
    else:
        found = tnconv.hesscale(model, mean, x, y, kind)
        d = torch.cat([each.reshape(-1) for each in found.values()])
    for value, part in zip(monitor.records[0]["HessTrace"], oracle.by_parameter(d), strict=True):
        close(value, part.sum())
    moments = oracle.gradients().square().mean(0)
    close(monitor.records[0]["TICDiag"], (moments / (d + 1e-7)).sum())


def test_samples_of_the_hessian_are_unbiased() -> None:
    model, loss_fn = chain(), nn.CrossEntropyLoss()
    x, y = batch(6)
    monitor = Monitor(model, loss_fn, [HessTrace("diag_h_mc")])
    for _ in range(80):
        with monitor.step():
            model.zero_grad()
            loss_fn(model(x), y).backward()
    traces = torch.tensor([record["HessTrace"] for record in monitor.records])
    oracle = Oracle(model, loss_fn, x, y)
    expected = torch.stack([d.sum() for d in oracle.by_parameter(oracle.hessian().diagonal())])
    errors = traces.std(0) / len(traces) ** 0.5
    assert (traces.mean(0) - expected).abs().lt(4 * errors + 1e-12).all() and (errors > 0).any()


def test_both_ends_of_the_spectrum() -> None:
    model, loss_fn = Residual(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    monitor = Monitor(model, loss_fn, [HessSpectrum(products=40, tolerance=1e-4)])
    for _ in range(3):
        x, y = batch(8)
        values = torch.linalg.eigvalsh(Oracle(model, loss_fn, x, y).hessian())
        with monitor.step():
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
        found = monitor.records[-1]["HessSpectrum"]
        close(found["largest"], values[-1], 1e-3)
        close(found["smallest"], values[0], 1e-3)
