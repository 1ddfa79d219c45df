"""What the monitor does with unusual runs: what it measures is right, or left out and said so."""

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from tests.monitor.oracle import Oracle, chain
from tnconv.monitor import (
    CABS,
    Alpha,
    GradNorm,
    HessMaxEV,
    HessTrace,
    Loss,
    Measurement,
    Monitor,
    NormTest,
    UpdateSize,
    configuration,
    every,
)

KINDS = ["NormTest", "InnerTest", "OrthoTest", "MeanGSNR", "Loss", "GradNorm", "GradHist1d"]
SHARDED = ("Loss", "GradNorm", "UpdateSize", "Distance")
TESTS = ("NormTest", "InnerTest", "OrthoTest", "MeanGSNR", "Loss")


def batch(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 2, 4, 4, generator=generator)
    return x, torch.randint(3, (samples,), generator=generator)


@pytest.mark.usefixtures("float64")
def test_batch_of_one_warns_once() -> None:
    model, loss_fn = chain(), nn.CrossEntropyLoss()
    monitor = Monitor(model, loss_fn, "economy")
    with pytest.warns(UserWarning, match="one sample") as told:
        for _ in range(2):
            with monitor.step():
                x, y = batch(1)
                loss_fn(model(x), y).backward()
    assert len([w for w in told if "one sample" in str(w.message)]) == 1
    assert math.isnan(monitor.records[0]["NormTest"]) and monitor.records[0]["Loss"] > 0


@pytest.mark.usefixtures("float64")
def test_last_batch_is_smaller_and_steps_are_not_consecutive() -> None:
    model, loss_fn = chain(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, loss_fn, KINDS, every=every(2))
    expected = {}
    for step, samples in enumerate((6, 6, 4)):
        x, y = batch(samples, step)
        expected[step] = Oracle(model, loss_fn, x, y).values()
        with monitor.step():
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
    assert [r["step"] for r in monitor.records] == [0, 2]
    for record in monitor.records:
        for name in TESTS:
            assert record[name] == pytest.approx(float(expected[record["step"]][name]), rel=1e-9)


@pytest.mark.usefixtures("float64")
def test_alpha_at_every_other_step() -> None:
    """The step after is watched as far as the step before needs it, and records nothing else."""
    model, loss_fn = chain(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    records = []
    for interval in (1, 2):
        torch.manual_seed(0)
        model = chain()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        monitor = Monitor(model, loss_fn, [Alpha(), Loss()], every=interval)
        for step in range(5):
            with monitor.step():
                x, y = batch(6, step)
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
        records.append({r["step"]: r for r in monitor.records})
    assert list(records[1]) == [0, 2, 4]
    for step in (0, 2):
        assert records[1][step]["Alpha"] == pytest.approx(records[0][step]["Alpha"], rel=1e-12)


@pytest.mark.usefixtures("float64")
def test_frozen_parameters_and_groups() -> None:
    """Each group's rate weighs its part."""
    model, loss_fn = chain(), nn.CrossEntropyLoss()
    model[3].requires_grad_(False)
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": learned[:2], "lr": 0.3}, {"params": learned[2:], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    monitor = Monitor(model, loss_fn, [CABS(), *KINDS], optimizer=optimizer)
    x, y = batch(6)
    oracle = Oracle(model, loss_fn, x, y)
    with monitor.step():
        loss_fn(model(x), y).backward()
    record, expected = monitor.records[0], oracle.values()
    for name in TESTS:
        assert record[name] == pytest.approx(float(expected[name]), rel=1e-9)
    variance = oracle.by_parameter(oracle.gradients().var(0, correction=0))
    noise = sum(r * float(v.sum()) for r, v in zip((0.3, 0.3, 0.1, 0.1), variance, strict=True))
    assert record["CABS"] == pytest.approx(noise / record["Loss"], rel=1e-9)
    with pytest.raises(ValueError, match="CABS is derived for stochastic gradient descent without"):
        Monitor(model, loss_fn, [CABS()], optimizer=torch.optim.Adam(learned))


@pytest.mark.usefixtures("float64")
def test_subsets_of_samples_are_unbiased() -> None:
    """Averaged over many draws, sums over samples are those of the batch."""

    class Noise(Measurement):
        needs = ("squared_norms", "inner")

        def value(self, seen: Any) -> list[float]:
            return [seen.total_squared_norms, seen.inner[1]]

    model, loss_fn = chain(), nn.CrossEntropyLoss()
    x, y = batch(6)
    found = []
    for samples in (None, 3):
        monitor = Monitor(model, loss_fn, [Noise()], samples=samples)
        for _ in range(1 if samples is None else 60):
            with monitor.step():
                model.zero_grad()
                loss_fn(model(x), y).backward()
        rows = torch.tensor([r["Noise"] for r in monitor.records])
        found.append((rows.mean(0), rows.std(0, correction=0) / len(rows) ** 0.5))
    assert (found[1][0] - found[0][0]).abs().lt(4 * found[1][1] + 1e-12).all()
    assert (found[1][1] > 0).all()


def test_batch_norm_is_left_out_once() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3))
    loss_fn = nn.CrossEntropyLoss()
    monitor = Monitor(model, loss_fn, [*configuration("economy"), HessTrace("hesscale")])
    x, y = batch(6)
    with pytest.warns(UserWarning, match=r"gradients of single samples: layer '1' normalises"):
        for _ in range(2):
            with monitor.step():
                model.zero_grad()
                loss_fn(model(x), y).backward()
    assert {"Loss", "GradNorm", "Distance"} <= monitor.records[1].keys()
    assert not {"NormTest", "Alpha", "GradHist1d"} & monitor.records[0].keys()


def test_mixed_precision_scales_nothing() -> None:
    """Scaled losses and skipped steps; the same numbers as without a scaler."""
    found = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model, loss_fn = chain(), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        monitor = Monitor(model, loss_fn, KINDS, scaler=scaler if scaled else None)
        x, y = batch(6)
        for _ in range(2):
            with monitor.step():
                optimizer.zero_grad()
                scaler.scale(loss_fn(model(x), y)).backward()
                scaler.step(optimizer)
                scaler.update()
        found.append(monitor.records)
    for one, other in zip(*found, strict=True):
        for name in TESTS:
            assert other[name] == pytest.approx(one[name], rel=1e-4)
        assert other["GradNorm"] == pytest.approx(one["GradNorm"], rel=1e-4)


def test_compiled_models() -> None:
    torch.manual_seed(0)
    model, loss_fn = chain(), nn.CrossEntropyLoss()
    x, y = batch(6)
    records = []
    for each in (model, torch.compile(model, backend="eager")):
        monitor = Monitor(each, loss_fn, KINDS)
        with monitor.step():
            model.zero_grad()
            loss_fn(each(x), y).backward()
        records.append(monitor.records[0])
    for name in TESTS:
        assert records[0][name] == pytest.approx(records[1][name], rel=1e-5)


def test_what_fails_is_left_out_and_the_run_goes_on() -> None:
    """A loss that couples nothing known, a model that a layer without rules is in."""

    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * 2

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(Odd.apply(self.one(x)))

    model, loss_fn = Net(), nn.CrossEntropyLoss()
    monitor = Monitor(model, loss_fn, [HessTrace(), NormTest()])
    with pytest.warns(UserWarning, match=r"leaves out Diagonal\(kind='hesscale'\)"):
        with monitor.step():
            loss_fn(model(torch.randn(5, 4)), torch.randint(3, (5,))).backward()
    assert monitor.records[0].keys() == {"step", "NormTest"}


def test_errors_name_what_was_given() -> None:
    model = chain()
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: Monitor(model, quantities="everything"), "quantities is 'everything'"),
        (lambda: Monitor(model, quantities=["Normtest"]), "quantity 'Normtest' is unknown"),
        (lambda: Monitor(model, quantities=[Loss(), "Loss"]), r"holds \['Loss'\] twice"),
        (lambda: Monitor(model, samples=0), "samples is 0"),
        (lambda: Monitor(model, quantities=[HessTrace("diag")]), "curvature is 'diag'"),
        (lambda: Monitor(model).loss(1, 2), "without loss_fn"),
        (lambda: Monitor(model, every=0), "every is 0"),
    ]
    for call, match in cases:
        with pytest.raises(ValueError, match=match):
            call()


def worker(rank: int, port: str, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model, loss_fn = chain(), nn.CrossEntropyLoss()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kinds = [*KINDS, "Alpha", "HessTrace", "UpdateSize", "Distance", HessMaxEV(40, 1e-6)]
    monitor = Monitor(wrapped, loss_fn, kinds, folder=f"{folder}/run")
    for step in range(2):
        x, y = batch(6, step)
        at = slice(rank * 3, rank * 3 + 3)
        with monitor.step():
            optimizer.zero_grad()
            loss_fn(wrapped(x[at].double()), y[at]).backward()
            optimizer.step()
    torch.manual_seed(0)
    sharded = chain()
    fully_shard(sharded)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    kinds = [*SHARDED, "NormTest", "HessMaxEV"]
    others = Monitor(sharded, loss_fn, kinds, process_group=dist.group.WORLD)
    for step in range(2):
        x, y = batch(6, step)
        at = slice(rank * 3, rank * 3 + 3)
        with others.step():
            optimizer.zero_grad()
            loss_fn(sharded(x[at].double()), y[at]).backward()
            optimizer.step()
    if rank == 0:
        torch.save((monitor.records, others.records, others.subject.left_out), f"{folder}/found.pt")
    assert (rank == 0) == (monitor._writer is not None)
    dist.destroy_process_group()


@pytest.mark.usefixtures("float64")
def test_workers_measure_the_whole_batch(tmp_path: Any) -> None:
    port = str(29500 + os.getpid() % 2000)
    mp.start_processes(worker, (port, str(tmp_path)), nprocs=2, start_method="fork")
    found, sharded, left_out = torch.load(tmp_path / "found.pt", weights_only=False)
    torch.manual_seed(0)
    model, loss_fn = chain(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kinds = [*KINDS, "Alpha", "HessTrace", "UpdateSize", "Distance", HessMaxEV(40, 1e-6)]
    monitor = Monitor(model, loss_fn, kinds)
    for step in range(2):
        x, y = batch(6, step)
        with monitor.step():
            optimizer.zero_grad()
            loss_fn(model(x.double()), y).backward()
            optimizer.step()
    for one, other in zip(found, monitor.records, strict=True):
        assert one.keys() == other.keys()
        for name in (*TESTS, "Alpha"):
            if name in one:
                assert one[name] == pytest.approx(other[name], rel=1e-9)
        assert one["HessMaxEV"] == pytest.approx(other["HessMaxEV"], rel=1e-4)
        for name in ("GradNorm", "HessTrace", "UpdateSize"):
            assert one[name] == pytest.approx(other[name], rel=1e-9)
        assert (one["GradHist1d"]["hist"] == other["GradHist1d"]["hist"]).all()
    assert {GradNorm().name, UpdateSize().name} <= found[0].keys()
    for one, other in zip(sharded, monitor.records, strict=True):
        assert one.keys() == {"step", *SHARDED}
        for name in SHARDED:
            assert one[name] == pytest.approx(other[name], rel=1e-9)
    assert len(left_out) == 2 and all("sharded" in why for why in left_out.values())
