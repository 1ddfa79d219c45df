"""Two processes that train together give the result of one."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.strategies import assert_close
from tnconv.optim import KFAC
from tnconv.optim.workers import Workers
from tnconv.quantities import SampledColumns

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


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    SampledColumns.columns = own_columns
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        found = [trained(settings, rank, 2) for settings in SETTINGS]
        lonely(rank)
        costs = [3.0, 1.0, 2.0, 5.0]
        assert Workers(group=dist.group.WORLD).owners(costs) == [1, 0, 1, 0]
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("float64")
def test_two_workers_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    monkeypatch.setattr(SampledColumns, "columns", own_columns)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for settings, one, other in zip(SETTINGS, first, second, strict=True):
        for name, expected in trained(settings).items():
            assert torch.equal(one[name], other[name])
            assert_close(one[name], expected, 1e-10)
