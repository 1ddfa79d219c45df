"""Quantities of whole networks next to the gradient: tnconv against BackPACK, vmap and opacus.

Run as ``python -m benchmarks.networks --quick``; ``--help`` lists the options. A row is a quantity,
a number the time of a gradient step with it over that of the step alone.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnconv
from benchmarks import measure
from benchmarks.models import PROBLEMS
from tnconv import quantities

Step = Callable[[], object]
Maker = Callable[[nn.Module, Tensor, Tensor, str], Step]
GRADIENT = "gradient"

QUANTITIES: dict[str, tuple[quantities.Quantity[object], ...]] = {
    "per-sample gradients": (quantities.PerSampleGradients(),),
    "squared norms": (quantities.SquaredNorms(),),
    "dot products": (quantities.DotProducts(),),
    "sum of squares": (quantities.SumOfSquares(),),
    "variance": (quantities.Variance(),),
    "GGN diagonal, one sample": (quantities.GGNDiagonal("mc"),),
    "GGN diagonals by sample, one sample": (quantities.GGNDiagonal("mc", per_sample=True),),
    "GGN diagonal, exact": (quantities.GGNDiagonal(),),
    "KFAC, one sample": (quantities.KFAC("hybrid", "mc", scale="kfc"),),
    "KFAC-expand, one sample": (quantities.KFAC("expand", "mc"),),
    "KFAC-reduce, one sample": (quantities.KFAC("reduce", "mc"),),
    "KFLR": (quantities.KFLR(),),
    "norms, variance, GGN diagonal and KFAC": (
        quantities.SquaredNorms(),
        quantities.Variance(),
        quantities.GGNDiagonal("mc"),
        quantities.KFAC("hybrid", "mc", scale="kfc"),
    ),
    "nothing else": (),
}
BACKPACK = {
    "per-sample gradients": ("BatchGrad",),
    "squared norms": ("BatchL2Grad",),
    "sum of squares": ("SumGradSquared",),
    "variance": ("Variance",),
    "GGN diagonal, one sample": ("DiagGGNMC",),
    "GGN diagonals by sample, one sample": ("BatchDiagGGNMC",),
    "GGN diagonal, exact": ("DiagGGNExact",),
    "KFAC, one sample": ("KFAC",),
    "KFLR": ("KFLR",),
    "norms, variance, GGN diagonal and KFAC": ("BatchL2Grad", "Variance", "DiagGGNMC", "KFAC"),
}


def gradient(model: nn.Module, inputs: Tensor, targets: Tensor, quantity: str = "") -> Step:
    """The step that all others are compared with."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(inputs), targets).backward()

    return step


def ours(model: nn.Module, inputs: Tensor, targets: Tensor, quantity: str) -> Step:
    """Gradient and quantity in one call."""
    wanted = [quantities.Gradient(), *QUANTITIES[quantity]]
    return lambda: tnconv.compute(model, F.cross_entropy, inputs, targets, wanted)


def backpack(model: nn.Module, inputs: Tensor, targets: Tensor, quantity: str) -> Step:
    """BackPACK's extensions, on a copy that it may change."""
    from backpack import backpack, extend, extensions

    made = [getattr(extensions, name)() for name in BACKPACK[quantity]]
    twin, loss_fn = extend(model), extend(nn.CrossEntropyLoss())

    def step() -> None:
        twin.zero_grad(set_to_none=True)
        with backpack(*made):
            loss_fn(twin(inputs), targets).backward()

    return step


def mapped(model: nn.Module, inputs: Tensor, targets: Tensor, quantity: str) -> Step:
    """``torch.func.vmap(grad)``, then sums over what it gives."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    reduce = _REDUCTIONS[quantity]

    def loss(parameters: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = torch.func.functional_call(model, dict(parameters), (x[None],))
        return F.cross_entropy(output, y[None]) / len(inputs)

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def step() -> object:
        grads = each(parameters, inputs, targets)
        return [(grad.sum(0), reduce(grad)) for grad in grads.values()]

    return step


def opacus(model: nn.Module, inputs: Tensor, targets: Tensor, quantity: str) -> Step:
    """Opacus' per-sample gradients, on a copy that it may change."""
    import opacus

    twin, reduce = opacus.GradSampleModule(model.train()), _REDUCTIONS[quantity]

    def step() -> object:
        twin.zero_grad(set_to_none=True)
        F.cross_entropy(twin(inputs), targets).backward()
        grads = [p.grad_sample for p in twin.parameters()]
        result = [reduce(grad) for grad in grads]
        for p in twin.parameters():
            p.grad_sample = None
        return result

    return step


_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "per-sample gradients": lambda g: g,
    "squared norms": lambda g: g.flatten(1).square().sum(1),
    "dot products": lambda g: g.flatten(1) @ g.flatten(1).T,
    "sum of squares": lambda g: g.square().sum(0),
    "variance": lambda g: g.var(0, unbiased=False),
}
CONTESTANTS: dict[str, Maker] = {
    "tnconv": ours,
    "backpack": backpack,
    "vmap(grad)": mapped,
    "opacus": opacus,
}


def has(name: str, quantity: str) -> bool:
    """Whether a contestant computes a quantity."""
    if name == "tnconv":
        return True
    return quantity in (BACKPACK if name == "backpack" else _REDUCTIONS)


def step(problem: str, name: str, quantity: str, options: argparse.Namespace) -> Step:
    """One contestant's step, on a model of its own."""
    chosen = PROBLEMS[problem]
    model = chosen.model(options.device)
    make: Maker = gradient if name == GRADIENT else CONTESTANTS[name]
    return make(model, *chosen.data(options.batch, options.device), quantity)


def ratios(steps: Mapping[str, Step], rounds: int, clock: measure.Clock) -> dict[str, float]:
    """The median over rounds of each step's time over the gradient's in the same round."""
    shuffle, found = Random(0).shuffle, {name: list[float]() for name in steps}
    for name in steps:
        steps[name]()
    for _ in range(rounds):
        names, taken = list(steps), dict[str, float]()
        shuffle(names)
        for name in names:
            started = clock()
            steps[name]()
            taken[name] = clock() - started
        for name in names:
            found[name].append(taken[name] / taken[GRADIENT])
    return {name: median(each) for name, each in found.items()}


def peak(problem: str, name: str, quantity: str, options: argparse.Namespace) -> float:
    """The high-water mark of a fresh process that takes the step three times, in MiB."""
    arguments = ["--step", problem, name, quantity, "--device", options.device]
    arguments += ["--batch", str(options.batch)] if options.batch else []
    command = [sys.executable, "-m", "benchmarks.networks", "--default-allocator", *arguments]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def row(problem: str, quantity: str, options: argparse.Namespace) -> dict[str, object]:
    """One quantity on one network, for all contestants that compute it."""
    steps, missing = {GRADIENT: step(problem, GRADIENT, quantity, options)}, dict[str, str]()
    for name in options.contestant or CONTESTANTS:
        if has(name, quantity):
            try:
                made = step(problem, name, quantity, options)
                made()
                steps[name] = made
            except (ImportError, RuntimeError, NotImplementedError, ValueError) as reason:
                missing[name] = f"{type(reason).__name__}: {str(reason)[:100]}"
    batch = options.batch or PROBLEMS[problem].batch
    result: dict[str, object] = {"problem": problem, "batch": batch, "rounds": options.rounds}
    result |= {"quantity": quantity, "missing": missing}
    result["time"] = ratios(steps, options.rounds, time.process_time)
    if options.memory:
        result["memory"] = {name: peak(problem, name, quantity, options) for name in steps}
    return result


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=__doc__)
    result.add_argument("--quick", action="store_true", help="small batches, few rounds")
    result.add_argument("--problem", action="append", choices=PROBLEMS, help="repeatable")
    result.add_argument("--quantity", action="append", choices=QUANTITIES, help="repeatable")
    result.add_argument("--contestant", action="append", choices=CONTESTANTS, help="repeatable")
    result.add_argument("--batch", type=int, help="one batch size for all networks")
    result.add_argument("--rounds", type=int, help="interleaved rounds (15; quick: 3)")
    result.add_argument("--device", default="cpu")
    result.add_argument("--memory", action="store_true", help="also peak memory, in new processes")
    result.add_argument("--json", type=Path, help="write results to this file")
    result.add_argument(
        "--default-allocator", action="store_true", help="leave malloc's settings as they are"
    )
    result.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    return result


def main(arguments: Sequence[str]) -> None:
    """Run what the command line asks for."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    if options.step:
        taken = step(*options.step, options)
        for _ in range(3):
            taken()
        print(measure.high_water())
        return
    if not options.default_allocator:
        measure.with_allocator("benchmarks.networks", arguments)
    options.rounds = options.rounds or (3 if options.quick else 15)
    options.batch = options.batch or (2 if options.quick else None)
    found = []
    for problem in options.problem or ("3c3d", "allcnnc", "resnet18"):
        for quantity in options.quantity or QUANTITIES:
            found.append(row(problem, quantity, options))
            print(found[-1], flush=True)
            if options.json:
                measure.write_results(options.json, options.device, found)


if __name__ == "__main__":
    main(sys.argv[1:])
