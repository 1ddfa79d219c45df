"""A budget is kept, whatever measurements cost."""

import os
from datetime import timedelta
from itertools import accumulate, count
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.monitor.oracle import chain
from tnconv.monitor import HessTrace, Monitor, TICDiag, TICTrace, configuration
from tnconv.monitor.budgets import Budget, Group

GROUPS: tuple[Group, ...] = ("samples", "curvature", "spectrum")


@settings(max_examples=20)
@given(
    limit=st.floats(0.02, 0.3),
    costs=st.tuples(*[st.floats(0.05, 10.0)] * 3),
    first=st.floats(1.0, 4.0),
    seed=st.integers(0, 99),
)
def test_overhead_stays_below(
    limit: float, costs: tuple[float, ...], first: float, seed: int
) -> None:
    """But for what one turn costs more than it was expected to; the groups take turns."""
    random, budget, extra, steps = Random(seed), Budget(limit), 0.0, 3000
    price = dict(zip(GROUPS, costs, strict=True))
    for _ in range(steps):
        group = budget.chosen(GROUPS)
        alone = random.uniform(0.9, 1.1)
        over = 0.0
        if group is not None:
            over = price[group] * (first if budget.turns[group] == 1 else random.uniform(0.9, 1.1))
        extra += over
        budget.spent(alone + over)
    surprise = first * max(costs) + 2 * max(costs)
    assert extra <= limit * 1.1 * steps + surprise  # steps alone vary by as much
    assert budget.reached == pytest.approx(extra / steps, abs=0.02 + 0.02 * limit)
    turns = [budget.turns.get(group, 0) for group in GROUPS]
    if sum(costs) * 6 < limit * steps and first * max(costs) < limit * steps / 6:
        assert min(turns) >= 1 and max(turns) - min(turns) <= 1


def test_fewer_samples_where_turns_come_seldom() -> None:
    budget = Budget(0.02)
    budget.batch = 32
    for _ in range(2000):
        budget.chosen(["samples"])
        samples = budget.samples or 32
        budget.spent(1.0 + (0.09 * samples if budget.last else 0.0))
    assert budget.samples == 8 and budget.turns["samples"] > 10
    assert budget.reached < 0.025 and budget.report()["samples"] == 8


def test_in_a_run() -> None:
    """Cheap measurements at every step, others as they are paid for, alpha with its second step."""
    torch.manual_seed(0)
    model, loss_fn = chain(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kinds = [*configuration("economy"), HessTrace("diag_ggn_exact")]
    kinds += [TICTrace("diag_h"), TICDiag("diag_h")]
    monitor = Monitor(model, loss_fn, kinds, budget=2.0)
    assert monitor.budget is not None
    for _ in range(60):
        with monitor.step():
            x, y = torch.randn(6, 2, 4, 4), torch.randint(3, (6,))
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
    records = monitor.records
    assert len(records) == 60 and all("Loss" in r and "GradNorm" in r for r in records)
    noisy = [r for r in records if "NormTest" in r]
    assert 0 < len(noisy) < 60 and all("Alpha" in r for r in noisy[:-1])
    assert not any("NormTest" in r and "HessTrace" in r for r in records)
    report = monitor.budget.report()
    assert set(report) == {"limit", "reached", "samples", "instead", "turns", "prices"}
    expected = {"HessTrace": "diag_ggn_mc", "TICTrace": "diag_h_mc", "TICDiag": "hesscale"}
    assert report["instead"] == expected
    assert any({"HessTrace", "TICTrace", "TICDiag"} <= r.keys() for r in records)
    with pytest.raises(ValueError, match="budget is 0"):
        Monitor(model, loss_fn, budget=0.0)


def worker(rank: int, port: str, folder: str) -> None:
    """One of two that take different times; they would wait for each other if they chose alone."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=30))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, loss_fn = chain(), nn.CrossEntropyLoss()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(wrapped, loss_fn, configuration("economy"), budget=1.5)
    clock = accumulate(1 + rank * (at % 7) for at in count())
    monitor._now = lambda: float(next(clock))  # type: ignore[method-assign]
    for _ in range(14):
        with monitor.step():
            x, y = torch.randn(3, 2, 4, 4), torch.randint(3, (3,))
            optimizer.zero_grad()
            loss_fn(wrapped(x), y).backward()
            optimizer.step()
    assert monitor.budget is not None
    kinds = [sorted(record) for record in monitor.records]
    torch.save((kinds, monitor.budget.turns), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_workers_choose_alike(tmp_path: Any) -> None:
    port = str(31500 + os.getpid() % 2000)
    mp.start_processes(worker, (port, str(tmp_path)), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second and any("NormTest" in kinds for kinds in first[0])
