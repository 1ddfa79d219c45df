"""The run that is watched is the run that is not: weights bit by bit, also when resumed."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tnconv.monitor import (
    Alpha,
    CriticalBatchSize,
    DeadUnits,
    GradHist1d,
    GradHist2d,
    GradientCosine,
    HessMaxEV,
    HessSpectrum,
    HessTrace,
    Monitor,
    Smoothed,
    UpdateCosine,
    configuration,
    every,
)
from tnconv.monitor.published import PUBLISHED

EVERYTHING = [
    *(kind() for kind in PUBLISHED if kind.__name__ not in ("CABS", "EarlyStopping", "Time")),
    *(
        DeadUnits(),
        GradientCosine(),
        UpdateCosine(),
        CriticalBatchSize(),
        Smoothed(CriticalBatchSize()),
    ),
]
SLOW = ("GradHist2d", "Parameters", "HessTrace", "HessMaxEV")
EVERYTHING = [m for m in EVERYTHING if m.name not in SLOW]
EVERYTHING += [HessTrace("diag_ggn_mc"), GradHist2d(every=every(5))]
EVERYTHING += [HessMaxEV(3), HessSpectrum(2, every=every(3))]


def net() -> nn.Sequential:
    torch.manual_seed(1)
    layers = nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.3), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(48, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))


def run(
    steps: range, watched: bool, state: dict[str, Any] | None = None, stop: int = -1
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Some of the steps; the state at one of them."""
    model, loss_fn = net(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    monitor = Monitor(model, loss_fn, EVERYTHING, samples=4) if watched else None
    data = torch.Generator().manual_seed(2)
    torch.manual_seed(3)
    x = torch.randn(50, 6, 1, 4, 4, generator=data)
    y = torch.randint(3, (50, 6), generator=data)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if monitor is not None:
            monitor.load_state_dict(state["monitor"])
    kept: dict[str, Any] = {}
    for at in steps:
        if at == stop:
            kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            kept = copy.deepcopy(kept) | {"random": torch.get_rng_state()}
            if monitor is not None:
                kept["monitor"] = copy.deepcopy(monitor.state_dict())

        def train(x: Tensor = x[at], y: Tensor = y[at]) -> None:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()

        if monitor is None:
            train()
        else:
            with monitor.step():
                train()
    return model, monitor, kept


@pytest.fixture(scope="module")
def whole() -> tuple[nn.Module, Monitor, dict[str, Any]]:
    return run(range(50), True, stop=25)


def test_weights_are_bit_equal(whole: tuple[nn.Module, Monitor, dict[str, Any]]) -> None:
    model, _, _ = run(range(50), False)
    for p, q in zip(model.parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(p, q)
    assert not whole[0]._forward_hooks and not whole[0][0]._forward_hooks
    assert all(not p._post_accumulate_grad_hooks for p in whole[0].parameters())


def test_resumed_records_are_equal(whole: tuple[nn.Module, Monitor, dict[str, Any]]) -> None:
    _, monitor, state = whole
    _, resumed, _ = run(range(25, 50), True, state)
    assert [r["step"] for r in resumed.records] == [24, *range(25, 50)]  # and alpha of step 24
    assert resumed.records[0] == {"step": 24, "Alpha": monitor.records[24]["Alpha"]}
    for found, expected in zip(resumed.records[1:], monitor.records[25:], strict=True):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert same(value, expected[name]), (name, value, expected[name])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return all(map(same, a, b))
    return bool(np.array_equal(a, b, equal_nan=not isinstance(a, np.ndarray) or a.dtype != object))


def test_hooks_of_an_optimizer_measure_the_same() -> None:
    loss_fn = nn.CrossEntropyLoss()
    records = []
    for form in ("step", "hooks"):
        model = net().eval()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        monitor = Monitor(model, loss_fn, [*configuration("full"), *(CriticalBatchSize(),)])
        if form == "hooks":
            monitor.attach(optimizer)
        torch.manual_seed(0)
        for _ in range(3):
            x, y = torch.randn(5, 1, 4, 4), torch.randint(3, (5,))

            def train(x: Tensor = x, y: Tensor = y) -> None:
                optimizer.zero_grad()  # noqa: B023
                loss_fn(model(x), y).backward()  # noqa: B023
                optimizer.step()  # noqa: B023

            if form == "hooks":
                train()
                with torch.no_grad():  # validation in between is none of its business
                    loss_fn(model(x), y)
            else:
                with monitor.step():
                    train()
        monitor.detach()
        records.append(monitor.records)
    assert len(records[0]) == len(records[1]) == 3
    for one, other in zip(*records, strict=True):
        assert one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)


def test_weights_are_bit_equal_with_adam_and_a_function() -> None:
    """A loss that is no module is called by the monitor."""
    found = []
    for watched in (False, True):
        model, loss_fn = net(), nn.functional.cross_entropy
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        kinds = [Alpha(), GradHist1d(), HessMaxEV(2), *configuration("business")[9:]]
        monitor = Monitor(model, loss_fn, kinds)
        torch.manual_seed(3)
        for _ in range(4):
            x, y = torch.randn(5, 1, 4, 4), torch.randint(3, (5,))
            if watched:
                with monitor.step():
                    optimizer.zero_grad()
                    monitor.loss(model(x), y).backward()
                    optimizer.step()
            else:
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
        found.append(list(model.parameters()))
        assert not watched or ("Alpha" in monitor.records[0] and "TICDiag" in monitor.records[-1])
    for p, q in zip(*found, strict=True):
        assert torch.equal(p, q)
