"""Orders of contraction of layers' Gram matrices: the chosen one against the best of five.

Run as ``python -m benchmarks.gram_orders --json results.json``; ``--help`` lists the options. A row
is a convolution of a network; its number is the time of what prices chose over the least time of
all orders, each forced, and of the chosen one, medians of interleaved rounds by the process' clock.
The problem ``table`` has convolutions of 3x3 taps and equal channels; a layer is there named by its
channels, pixels, samples and classes.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.models import all_cnn_c, cifar_resnet18, cifar_resnet20, three_c_three_d
from tnconv.codegen import compile
from tnconv.diagrams import conv, gradient_dots, ntk_block, per_sample_gradients
from tnconv.operators.low_rank import ORDERS
from tnconv.operators.low_rank.gram_plans import GramPlan, Settings, planned
from tnconv.operators.low_rank.tiles import Tiled

Shape = tuple[int, ...]
Layer = tuple[Shape, Shape, int, int]  # x, weight, stride, padding
HOPELESS = 3.0  # orders that are predicted to take this multiple of the chosen one are not run
LARGEST = 2**32  # nor are those that hold more bytes
TABLE = (  # channels, pixels along a side, samples, classes
    (64, 32, 4, 10),
    (128, 16, 8, 10),
    (256, 8, 16, 10),
    (512, 4, 16, 10),
    (512, 4, 64, 1),
    (256, 8, 64, 1),
    (128, 16, 32, 1),
    (512, 2, 64, 10),
)
NETWORKS = {  # with the batch size and the number of classes
    "3c3d": (three_c_three_d, 32, 10),
    "allcnnc": (all_cnn_c, 8, 100),
    "resnet20": (cifar_resnet20, 16, 10),
    "resnet18": (cifar_resnet18, 4, 10),
}


def layers(problem: str, batch: int) -> Iterator[tuple[str, Layer]]:
    """The convolutions of a network, equal ones once."""
    make, _, classes = NETWORKS[problem]
    model, found = make(classes).eval(), dict[Layer, str]()

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(module, nn.Conv2d)
            shape = (batch, *given[0].shape[1:])
            settings = module.stride[0], int(module.padding[0])
            found.setdefault((shape, tuple(module.weight.shape), *settings), name)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note(name))
    with torch.no_grad():
        model(torch.rand(1, 3, 32, 32))
    yield from ((name, layer) for layer, name in found.items())


def cases(problem: str, options: argparse.Namespace) -> Iterator[tuple[str, Layer, int]]:
    """Layers by name, with the number of vectors."""
    if problem == "table":
        for c, size, samples, vectors in TABLE:
            layer = (samples, c, size, size), (c, c, 3, 3), 1, 1
            yield f"{c}, {size}x{size}; {samples}, {vectors}", layer, vectors
    else:
        for name, each in layers(problem, options.batch or NETWORKS[problem][1]):
            yield name, each, options.vectors


def measured(layer: Layer, vectors: int, rounds: int) -> dict[str, object]:
    """Times of the chosen order and of those that are not hopeless."""
    x, weight, stride, padding = layer
    net = conv(x, weight, stride=stride, padding=padding)
    network = gradient_dots(net, "weight", vectors)
    pair = ntk_block(net, net, "weight", vectors, vectors)
    rows = per_sample_gradients(net, "weight", vectors)
    plans = {
        order: planned(Settings(compile, "cpu", order, None), network, pair, rows)
        for order in ("auto", *ORDERS)
    }
    least = plans["auto"].way.seconds
    tried = {
        order: plan
        for order, plan in plans.items()
        if plan.way.seconds < HOPELESS * least and held(plan) < LARGEST
    }
    given = [torch.rand(shape) for shape in plans["auto"].operands.values()]
    times: dict[str, list[float]] = {order: [] for order in tried}
    for _ in range(rounds + 1):
        for order, plan in tried.items():
            start = time.process_time()
            plan.run(*given)
            times[order].append(time.process_time() - start)
    found = {order: median(each[1:]) for order, each in times.items()}
    result: dict[str, object] = {"seconds": found, "best": min(found, key=lambda o: found[o])}
    result["ratio"] = found["auto"] / min(found.values())
    result["predicted"] = {order: plan.way.seconds for order, plan in plans.items()}
    return result


def held(plan: GramPlan) -> int:
    """The bytes that it holds at most, in single precision."""
    way = plan.way
    return way.peak(4) if isinstance(way, Tiled) else way.peak_memory()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.gram_orders", description=__doc__)
    names = [*NETWORKS, "table"]
    result.add_argument("--problem", action="append", choices=names, help="repeatable")
    result.add_argument("--layer", action="append", help="its name; all by default, repeatable")
    result.add_argument("--batch", type=int, help="the batch size (32, 8 and 16)")
    result.add_argument("--vectors", type=int, default=9, help="vectors for each sample")
    result.add_argument("--rounds", type=int, default=5)
    result.add_argument("--json", type=Path, help="write results to this file")
    return result


def _with_before(path: Path, found: list[dict[str, object]]) -> list[dict[str, object]]:
    """Rows with those that a file has of other layers: long problems are measured in parts."""
    measured = [(row["problem"], row["layer"]) for row in found]
    return [
        row for row in measure.read_rows(path) if (row["problem"], row["layer"]) not in measured
    ] + found


def main(arguments: Sequence[str]) -> None:
    """Run what the command line asks for."""
    options = parser().parse_args(arguments)
    measure.with_allocator("benchmarks.gram_orders", arguments)
    torch.set_num_threads(1)
    found: list[dict[str, object]] = []
    for problem in options.problem or [*NETWORKS, "table"]:
        for name, layer, vectors in cases(problem, options):
            if options.layer and name not in options.layer:
                continue
            what = {"problem": problem, "layer": name, "shapes": layer, "vectors": vectors}
            found.append(what | measured(layer, vectors, options.rounds))
            times = {o: round(1e3 * s, 1) for o, s in found[-1]["seconds"].items()}  # type: ignore[attr-defined]
            print(problem, name, layer, f"{found[-1]['ratio']:.2f}", times, flush=True)
            if options.json:
                measure.write_results(options.json, "cpu", _with_before(options.json, found))


if __name__ == "__main__":
    main(sys.argv[1:])
