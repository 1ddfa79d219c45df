"""Empirical tangent kernels next to the contraction of torch.func's Jacobians: time and memory.

Run as ``python -m benchmarks.tangent_kernels --json results.json``; ``--help`` lists the options.
The networks are that of torch's tutorial on tangent kernels (three convolutions and a linear layer)
and LeNet (two convolutions, three linear layers), on 20 and 5 samples with 10 outputs: the numbers
are jacrev over tnconv, the median over interleaved rounds by the process' own clock, and what each
holds at most beside its operands. ``resnet18`` is measured in a fresh process, whose high-water
mark in MiB counts; the Jacobian that the other way needs is larger than most machines.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from benchmarks import measure
from benchmarks.models import cifar_resnet18
from benchmarks.networks import GRADIENT, ratios
from tnconv.ntk import empirical_ntk

TNCONV, JACREV = "tnconv", "jacrev"


class Tutorial(nn.Module):
    """The network of torch's tutorial "Neural Tangent Kernels"."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(c, 32, 3) for c in (3, 32, 32))
        self.fc = nn.Linear(32 * 26 * 26, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3(self.conv2(self.conv1(x).relu()).relu())
        found: Tensor = self.fc(x.flatten(1))
        return found


class LeNet(nn.Module):
    """Two convolutions and three linear layers (LeCun et al. 1998, with torch's pools)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x).relu(), 2)
        x = F.max_pool2d(self.conv2(x).relu(), 2).flatten(1)
        found: Tensor = self.fc3(self.fc2(self.fc1(x).relu()).relu())
        return found


SMALL: dict[str, Callable[[], nn.Module]] = {"tutorial": Tutorial, "lenet": LeNet}
LARGE = "resnet18"


def jacobian_contraction(model: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """``Θ[n, c, m, d]`` from the Jacobians of all samples, as in torch's tutorial."""
    values = {name: p.detach() for name, p in model.named_parameters()}

    def single(own: dict[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = functional_call(model, own, (x[None],))[0]
        return found

    first, second = (vmap(jacrev(single), (None, 0))(values, x) for x in (x1, x2))
    pairs = zip(first.values(), second.values(), strict=True)
    return torch.stack(
        [torch.einsum("ncp,mdp->ncmd", j.flatten(2), k.flatten(2)) for j, k in pairs]
    ).sum(0)


def small(name: str, options: argparse.Namespace) -> dict[str, object]:
    """One of the small networks: both ways agree, then their times and memory."""
    torch.manual_seed(0)
    model = SMALL[name]().to(options.device)
    x1, x2 = (torch.randn(n, 3, 32, 32, device=options.device) for n in (20, 5))
    ours, theirs = (partial(f, model, x1, x2) for f in (empirical_ntk, jacobian_contraction))
    expected = theirs()
    ours()  # sizes that return are searched for
    error = float((ours() - expected).abs().max() / expected.abs().max())
    if error > 1e-4:
        raise RuntimeError(f"{name}: kernels differ by {error:.1e} of the largest entry")
    calls = {GRADIENT: ours, JACREV: theirs}  # ratios are to the first
    found = ratios(calls, options.rounds, time.process_time)[JACREV]
    held = {way: measure.peak_memory(call, options.device) / 2**20
            for way, call in ((TNCONV, ours), (JACREV, theirs))}  # fmt: skip
    result: dict[str, object] = {"network": name, "samples": [20, 5], "rounds": options.rounds}
    result |= {"error": error, "ratio": found, "memory": held}
    return result | {"memory_ratio": held[TNCONV] / held[JACREV]}


def large(samples: int, memory_limit: int) -> dict[str, object]:
    """ResNet-18 at 32 pixels, once, in this process."""
    torch.manual_seed(0)
    model = cifar_resnet18(10).eval()
    before = measure.high_water()
    started = time.process_time()
    theta = empirical_ntk(model, torch.randn(samples, 3, 32, 32), memory_limit=memory_limit)
    seconds = time.process_time() - started
    parameters = sum(p.numel() for p in model.parameters())
    jacobian = theta.shape[0] * theta.shape[1] * parameters * 4 / 2**20
    result: dict[str, object] = {"network": LARGE, "samples": samples, "seconds": seconds}
    result |= {"memory_limit": memory_limit / 2**20, "high_water": measure.high_water()}
    return result | {"high_water_before": before, "jacobian": jacobian}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    names = [*SMALL, LARGE]
    result = argparse.ArgumentParser(prog="python -m benchmarks.tangent_kernels")
    result.description = __doc__
    result.add_argument("--network", action="append", choices=names, help="repeatable")
    result.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    result.add_argument("--samples", type=int, default=16, help=f"of {LARGE}")
    result.add_argument("--memory-limit", type=int, default=2**29, help=f"of {LARGE}, in bytes")
    result.add_argument("--device", default="cpu")
    result.add_argument("--json", type=Path, help="write results to this file")
    result.add_argument(
        "--default-allocator", action="store_true", help="leave malloc's settings as they are"
    )
    result.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    return result


def main(arguments: Sequence[str]) -> None:
    """Run what the command line asks for."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    if options.alone:
        print(json.dumps(large(options.samples, options.memory_limit)))
        return
    if not options.default_allocator:
        measure.with_allocator("benchmarks.tangent_kernels", arguments)
    found: list[dict[str, object]] = []
    for name in options.network or [*SMALL, LARGE]:
        if name == LARGE:
            command = [sys.executable, "-m", "benchmarks.tangent_kernels", "--alone"]
            command += ["--samples", str(options.samples)]
            command += ["--memory-limit", str(options.memory_limit)]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(run.stdout))
        else:
            found.append(small(name, options))
        print(found[-1], flush=True)
        if options.json:
            measure.write_results(options.json, options.device, found)


if __name__ == "__main__":
    main(sys.argv[1:])
