"""Two processes that train together give the result of one."""

import os
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.stateful import TOGETHER, shared
from tests.strategies import assert_close
from tnconv.optim import KFAC, SINGD, AdaHesScale, RFShampoo, StepSizeScaler
from tnconv.optim.workers import Workers
from tnconv.quantities import SampledColumns

STATEFUL = [(name, reduction) for reduction, names in TOGETHER.items() for name in names]
FISHERS = ("type-2", "mc", "empirical", "forward-only")
SETTINGS = [
    {"fisher": fisher, "inverse": inverse, "flavour": flavour}
    for fisher, inverse, flavour in zip(
        FISHERS,
        ("cholesky", "ekfac", "eigen", "cholesky"),
        ("expand", "reduce", "reduce", "expand"),
        strict=True,
    )
]

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def own_columns(source, loss_fn, output: Tensor, targets: Tensor) -> Tensor:
    """Monte Carlo columns that depend on their own sample alone."""
    return torch.sin(7 * output + targets[:, None])[None] / len(output) ** 0.5


def pooled_net() -> nn.Sequential:
    """With factors of full rank: eigenbases, and what depends on them, are unique."""
    conv, pool = nn.Conv2d(2, 4, 3, groups=2), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(conv, nn.ReLU(), pool, nn.Flatten(), nn.Linear(4, 3))


def even(step: int) -> bool:
    return step % 2 == 0


def trained(settings: dict[str, str], rank: int = 0, workers: int = 1) -> dict[str, Tensor]:
    """Parameters and factors after some steps, on this worker's share of each batch."""
    torch.manual_seed(0)
    model, loss_fn = pooled_net(), nn.CrossEntropyLoss()
    run = DistributedDataParallel(model) if workers > 1 else model
    optimizer = KFAC(run, loss_fn=loss_fn, update_inverses_every=even, **settings)
    for _ in range(4):
        x, y = torch.randn(64, 2, 5, 5), torch.randint(3, (64,))
        optimizer.zero_grad()
        loss_fn(run(x[rank::workers]), y[rank::workers]).backward()
        optimizer.step()
    states = {f"{at}.{k}": optimizer.state[model[at].weight][k] for at in (0, 4) for k in "AB"}
    return states | {name: p.detach() for name, p in model.named_parameters()}


def lonely(rank: int) -> None:
    """A layer that only one worker uses has the factors of that worker's samples."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)])
    optimizer = KFAC(model, lr=0.0, process_group=dist.group.WORLD)
    x = torch.randn(5, 3)
    for layer in list(model)[: 1 + rank]:
        layer(x).square().mean().backward()
    optimizer.step()
    for layer in model:
        assert_close(optimizer.state[layer.weight]["A"][0], x.T @ x / 5, 1e-10)
    unused = KFAC(nn.ModuleList([nn.Linear(3, 2)]), process_group=dist.group.WORLD)
    unused.step()
    assert not any(unused.state.values())


def late(rank: int) -> None:
    """A wrapper that is made after the optimizer is found when it runs; without one, none is."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2, bias=False), torch.randn(4, 3) + rank
    optimizer = KFAC(model, lr=0.0)
    model(x).square().mean().backward()
    with pytest.warns(UserWarning, match="no DistributedDataParallel runs this model"):
        optimizer.step()
    assert_close(optimizer.state[model.weight]["A"][0], x.T @ x / 4, 1e-10)
    wrapper = DistributedDataParallel(model)
    optimizer.zero_grad()
    optimizer.reset_factors()
    wrapper(x).square().mean().backward()
    optimizer.step()
    both = [x - rank + other for other in range(2)]
    expected = sum(each.T @ each for each in both) / 8
    assert_close(optimizer.state[model.weight]["A"][0], expected, 1e-10)
    if rank == 0:  # a model of this process alone, which others know nothing of
        own = nn.Linear(3, 2)
        optimizer = KFAC(own, process_group="local")
        own(x).square().mean().backward()
        optimizer.step()


def summed(rank: int) -> None:
    """Gradients of a sum are averaged over workers: the loss is 1/W of the sum, so is B."""
    torch.manual_seed(0)
    for fisher in ("type-2", "empirical"):
        model, loss_fn = nn.Linear(3, 2), nn.CrossEntropyLoss(reduction="sum")
        x, y = torch.randn(6, 3), torch.randint(2, (6,))
        found = []
        for run, at in ((model, slice(None)), (DistributedDataParallel(model), slice(rank, 6, 2))):
            settings = {"reduction": "sum", "loss_fn": loss_fn, "fisher": fisher}
            group = "local" if run is model else None
            optimizer = KFAC(run, 0.0, process_group=group, **settings)
            optimizer.zero_grad()
            loss_fn(run(x[at]), y[at]).backward()
            optimizer.step()
            found.append(optimizer.state[model.weight]["B"])
            optimizer.remove_hooks()
        assert_close(found[1], found[0] / 2, 1e-10)


def joined(rank: int) -> None:
    """One worker has three batches more: the other takes part until the end."""
    torch.manual_seed(0)
    wrapper = DistributedDataParallel(nn.Linear(3, 2))
    optimizer = KFAC(wrapper, update_inverses_every=2)
    with wrapper.join():
        for _ in range(3 + 3 * rank):
            optimizer.zero_grad()
            wrapper(torch.randn(4, 3)).square().mean().backward()
            optimizer.step()
    assert optimizer.steps == 6
    state = optimizer.state[wrapper.module.weight]
    for name in ("A", "B", "A_inverse"):
        every = [torch.empty_like(state[name]) for _ in range(2)]
        dist.all_gather(every, state[name].contiguous())
        assert torch.equal(*every)


INVERSE_FREE = [
    *(
        lambda run, group, s=s: SINGD(
            run, 0.05, structures=s, process_group=group, update_factors_every=2, factor_lr=0.1
        )
        for s in ("dense", ("hierarchical", "diagonal"), "triangular_toeplitz")
    ),
    lambda run, group: RFShampoo(run, 0.01, damping=0.1, factor_lr=0.1, update_factors_every=2),
]


def inverse_free(rank: int) -> None:
    """Factors are those of the joint batch: SINGD's entries are summed, and Shampoo's samples."""
    for made in INVERSE_FREE:
        found = []
        for workers in (1, 2):
            torch.manual_seed(0)
            model, loss_fn = pooled_net(), nn.CrossEntropyLoss()
            run = DistributedDataParallel(model) if workers > 1 else model
            optimizer = made(run, "local" if workers == 1 else None)
            at = slice(rank, None, 2) if workers > 1 else slice(None)
            for _ in range(4):
                x, y = torch.randn(8, 2, 5, 5), torch.randint(3, (8,))
                optimizer.zero_grad()
                loss_fn(run(x[at]), y[at]).backward()
                optimizer.step()
            optimizer.remove_hooks()
            found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert_close(found[1], found[0], 1e-10)


def failing(rank: int) -> None:
    """An error of one worker in a step is an error of all, and the next step is as before."""
    torch.manual_seed(0)
    wrapper, loss_fn = DistributedDataParallel(nn.Linear(3, 2)), nn.MSELoss()
    optimizer = KFAC(wrapper, fisher="type-2", loss_fn=loss_fn)
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    (loss_fn if rank else nn.functional.mse_loss)(wrapper(x), y).backward()
    with pytest.raises(RuntimeError, match="another worker" if rank else "no loss of the model"):
        optimizer.step()
    assert "A" not in optimizer.state[wrapper.module.weight]
    optimizer.zero_grad()
    loss_fn(wrapper(x), y).backward()
    optimizer.step()
    assert "A" in optimizer.state[wrapper.module.weight]


SCALED = {
    "adahesscale": lambda run, loss_fn: AdaHesScale(run, loss_fn, 1e-3),
    "scaled": lambda run, loss_fn: StepSizeScaler(
        torch.optim.SGD(run.parameters(), 1.0), run, loss_fn, 1e-5, beta=0.5
    ),
    "both": lambda run, loss_fn: StepSizeScaler(AdaHesScale(run, loss_fn), run, delta=1e-6),
}


def diagonals(kind: str, reduction: str, rank: int = 0, workers: int = 1) -> list[Tensor]:
    """Parameters after some steps with Hessian diagonals, on this worker's share of each batch.

    Gradients are averaged over two workers: the loss of a sum is half of it, as with weights 1/2.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    halved = torch.full((3,), 0.5) if reduction == "sum" and workers == 1 else None
    loss_fn = nn.CrossEntropyLoss(halved, reduction=reduction)
    run = DistributedDataParallel(model) if workers > 1 else model
    optimizer = SCALED[kind](run, loss_fn)
    for _ in range(4):
        x, y = torch.randn(8, 5), torch.randint(3, (8,))
        optimizer.zero_grad()
        loss = loss_fn(run(x[rank::workers]), y[rank::workers])
        loss.backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def dying(rank: int, folder: str) -> None:
    """Whom the other worker left in a step gets an error, and can go on alone."""
    where = f"file://{folder}/die"
    dist.init_process_group(
        "gloo", init_method=where, rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = KFAC(model, process_group=dist.group.WORLD)
    model(torch.randn(4, 3)).square().mean().backward()
    if rank:
        os._exit(0)
    with pytest.raises(RuntimeError):
        optimizer.step()
    dist.destroy_process_group()
    optimizer.step()
    assert "A_inverse" in optimizer.state[model.weight]
    (Path(folder) / "alive").touch()


def test_a_worker_that_dies(tmp_path: Path) -> None:
    context = mp.get_context("fork")
    each = [context.Process(target=dying, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in each:
        process.start()
    for process in each:
        process.join(60)
    assert [process.exitcode for process in each] == [0, 0]
    assert (tmp_path / "alive").exists()


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    SampledColumns.columns = own_columns
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        found = [trained(settings, rank, 2) for settings in SETTINGS]
        for test in (lonely, late, summed, joined, failing, inverse_free):
            test(rank)
        costs = [3.0, 1.0, 2.0, 5.0]
        assert Workers(group=dist.group.WORLD).owners(costs) == [1, 0, 1, 0]
        for kind, reduction in product(SCALED, ("mean", "sum")):
            found.append(diagonals(kind, reduction, rank, 2))
        found += [shared(*each, rank, 2) for each in STATEFUL]
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("float64")
def test_two_workers_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is expected is computed first: forked workers find its programs."""
    monkeypatch.setattr(SampledColumns, "columns", own_columns)
    alone = [trained(settings) for settings in SETTINGS]
    scaled = [diagonals(*each) for each in product(SCALED, ("mean", "sum"))]
    stateful = [shared(*each) for each in STATEFUL]
    mp.start_processes(work, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(first) == len(second) == len(alone) + len(scaled) + len(stateful)
    trios = list(zip(first, second, alone + scaled + stateful, strict=True))
    ends = len(alone), len(alone) + len(scaled)
    for one, other, expected in trios[: ends[0]]:
        for name, value in expected.items():
            assert torch.equal(one[name], other[name])
            assert_close(one[name], value, 1e-10)
    for one, other, expected in trios[ends[0] : ends[1]]:
        for a, b, value in zip(one, other, expected, strict=True):
            assert torch.equal(a, b)
            assert_close(a, value, 1e-10)
    for what, (one, other, expected) in zip(STATEFUL, trios[ends[1] :], strict=True):
        if isinstance(one, str):
            assert one == other and "expected" in one, what
            continue
        assert one.keys() == expected.keys(), what
        for name, value in expected.items():
            assert torch.equal(one[name], other[name]), (what, name)
            assert_close(one[name], value, 1e-10)
