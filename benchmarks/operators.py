"""Products with curvature matrices of whole networks: tnconv's operators against curvlinops'.

Run as ``python -m benchmarks.operators``; ``--help`` lists the options. A number is the time of one
product over that of a gradient step, the median over interleaved rounds of CPU time.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import process_time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnconv
from benchmarks import measure
from benchmarks.models import PROBLEMS
from benchmarks.networks import GRADIENT, Step, gradient, ratios

Batch = tuple[Tensor, Tensor]
Maker = Callable[[nn.Module, Batch], Callable[[Tensor], Tensor]]
TOLERANCE = 1e-4
KINDS = ("hessian", "ggn", "fisher, one sample")


def ours(kind: str, retain_graph: bool) -> Maker:
    """A product by our operator, with or without the graph of the product before."""

    def make(model: nn.Module, batch: Batch) -> Callable[[Tensor], Tensor]:
        given, held = (model, F.cross_entropy, [batch]), {"retain_graph": retain_graph}
        made: tnconv.models.CurvatureOperator
        if kind == "hessian":
            made = tnconv.HessianOperator(*given, **held)
        elif kind == "ggn":
            made = tnconv.GGNOperator(*given, **held)
        else:
            made = tnconv.FisherOperator(*given, fisher="mc", **held)
        return made.matvec

    return make


def curvlinops(kind: str) -> Maker:
    """The same product by curvlinops."""

    def make(model: nn.Module, batch: Batch) -> Callable[[Tensor], Tensor]:
        import curvlinops as peer

        kinds = (peer.HessianLinearOperator, peer.GGNLinearOperator, peer.FisherMCLinearOperator)
        make_one = dict(zip(KINDS, kinds, strict=True))[kind]
        parameters = list(model.parameters())
        made = make_one(
            model, nn.CrossEntropyLoss(), parameters, [batch], check_deterministic=False
        )
        return lambda vector: made @ vector

    return make


def contestants(kind: str) -> dict[str, Maker]:
    """Who takes part, by name."""
    return {
        "tnconv": ours(kind, True),
        "tnconv, no graph held": ours(kind, False),
        "curvlinops": curvlinops(kind),
    }


def row(problem: str, kind: str, options: argparse.Namespace) -> dict[str, object]:
    """One matrix of one network, for all contestants.

    Raises:
        ArithmeticError: two products of a matrix without samples differ.
    """
    chosen = PROBLEMS[problem]
    model, batch = chosen.model(options.device), chosen.data(options.batch, options.device)
    vector = torch.randn(sum(p.numel() for p in model.parameters()), device=options.device)
    products = {name: make(model, batch) for name, make in contestants(kind).items()}
    found = {name: product(vector) for name, product in products.items()}
    expected = found["curvlinops"]
    worst = max(float((each - expected).abs().max()) for each in found.values())
    if "sample" not in kind and worst > TOLERANCE * float(expected.abs().max()):
        raise ArithmeticError(f"products of {kind} differ by {worst}")
    steps: dict[str, Step] = {GRADIENT: gradient(model, *batch)}
    for name, product in products.items():
        steps[name] = lambda product=product: product(vector)  # type: ignore[misc]
    time = ratios(steps, options.rounds, process_time)
    size = len(batch[0])
    return {"problem": problem, "batch": size, "rounds": options.rounds, "matrix": kind} | {
        "time": time
    }


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument("--problem", action="append", choices=PROBLEMS, help="repeatable")
    result.add_argument("--matrix", action="append", choices=KINDS, help="repeatable")
    result.add_argument("--batch", type=int, help="one batch size for all networks")
    result.add_argument("--rounds", type=int, default=15, help="interleaved rounds (15)")
    result.add_argument("--device", default="cpu")
    result.add_argument("--json", type=Path, help="write results to this file")
    return result


def main(arguments: Sequence[str]) -> None:
    """Run what the command line asks for."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    measure.with_allocator("benchmarks.operators", arguments)
    found = []
    for problem in options.problem or ["3c3d"]:
        for kind in options.matrix or KINDS:
            found.append(row(problem, kind, options))
            print(found[-1], flush=True)
    if options.json:
        measure.write_results(options.json, options.device, found)


if __name__ == "__main__":
    main(sys.argv[1:])
