"""Two and three processes give the kernel of one; a process that dies is an error of the others."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import tnconv
from tests.strategies import assert_close
from tnconv.ntk import empirical_ntk

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

OPTIONS: list[dict[str, Any]] = [
    {"reduce": "trace", "outputs": "sum", "chunks": 2},
    {"reduce": "sample_diagonal", "per_layer": True, "scales": "ntk"},
]


def case() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3, 2), nn.Flatten(), nn.Linear(9, 3))
    return model, torch.randn(4, 2, 7), torch.randn(4, 2, 7)


def kernels(**shared: Any) -> list[Any]:
    model, x1, x2 = case()
    few = empirical_ntk(model, x1[:2], **shared)  # fewer samples than processes
    both = empirical_ntk(model, x1, x2, **shared)
    return [few, both, *(empirical_ntk(model, x1, **each, **shared) for each in OPTIONS)]


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    tnconv.tiered_compilation(True)
    where, wait = f"file://{folder}/meet{world}", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, timeout=wait)
    group = dist.group.WORLD
    torch.save(kernels(group=group), Path(folder) / f"{world}-{rank}.pt")
    torch.save(kernels(group=group, gather=False), Path(folder) / f"own-{world}-{rank}.pt")
    if world == 3:
        model, x1, _ = case()
        if rank == 2:
            os._exit(0)
        with pytest.raises(RuntimeError, match="a process of the group gave no rows"):
            empirical_ntk(model, x1, group=group)
        (Path(folder) / f"alive-{rank}").touch()
        os._exit(0)  # a group without one of its processes cannot be closed
    dist.destroy_process_group()


def equal(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, block in expected.items():
            equal(found[name], block)
    else:
        assert_close(found, expected, 1e-12)


@pytest.mark.usefixtures("float64")
def test_processes_share_rows(tmp_path: Path) -> None:
    expected = kernels()
    context = mp.get_context("fork")  # with what is imported, and the programs so far
    each = [
        context.Process(target=work, args=(rank, world, str(tmp_path)))
        for world in (2, 3)
        for rank in range(world)
    ]
    for process in each:
        process.start()
    for process in each:
        process.join(200)
    assert [process.exitcode for process in each] == [0] * 5
    assert all((tmp_path / f"alive-{rank}").exists() for rank in range(2))
    for world in (2, 3):
        parts = [torch.load(tmp_path / f"own-{world}-{rank}.pt") for rank in range(world)]
        for rank in range(world):
            whole = torch.load(tmp_path / f"{world}-{rank}.pt")
            for found, one in zip(whole, expected, strict=True):
                equal(found, one)
        for at, one in enumerate(expected):
            own = [part[at] for part in parts]
            if isinstance(one, dict):
                equal({name: torch.cat([each[name] for each in own]) for name in one}, one)
            else:
                equal(torch.cat(own), one)
