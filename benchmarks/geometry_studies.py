"""What networks look like in metrics that are carried along: three studies on handwritten digits.

Run as ``python -m benchmarks.geometry_studies --json folder --plot folder``; ``--help`` lists the
options. Extras ``demo`` (scikit-learn's digits) and ``plots``. All in double precision. A fourth
study, of rescaled ReLU layers, is `benchmarks.sharpness`.

* ``optimizers``: networks that SGD, Adam, KFAC and Shampoo train to one loss, and how sharp each is
  in the metrics of all four.
* ``evidence``: Laplace's evidence of a network in the standard and the NTK parametrisation.
* ``folding``: sharpness of a network with BatchNorm along rescalings that keep its function.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import tnconv
from benchmarks import measure
from benchmarks.images import digits
from tnconv.geometry import (
    BatchNormFold,
    Diagonal,
    Estimate,
    Euclidean,
    Metric,
    Point,
    TorchParametrization,
    Vector,
    adam_metric,
    kfac_metric,
    network_evidence,
    parametrization_map,
    points_of,
    shampoo_metric,
    shampoo_statistics,
    shape_operator,
)

LOSS = nn.CrossEntropyLoss()
Row = dict[str, Any]
Batches = list[tuple[Tensor, Tensor]]


def data(count: int) -> tuple[Tensor, Tensor]:
    """The first images, and their labels."""
    images, labels = digits()
    return images[:count].double(), labels[:count]


def network(width: int, norms: bool = False) -> nn.Sequential:
    """Two convolutions and a linear layer for images of 8 pixels."""

    def norm() -> list[nn.Module]:
        return [nn.BatchNorm2d(width)] if norms else []

    first = [nn.Conv2d(1, width, 3, padding=1), *norm(), nn.ReLU()]
    second = [nn.Conv2d(width, width, 3, stride=2, padding=1), *norm(), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(16 * width, 10)).double()


def loaded(model: nn.Module, values: Point) -> nn.Module:
    """A copy with other values of some parameters."""
    twin = deepcopy(model)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(values[name])
    return twin


MAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), 0.05, momentum=0.9),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), 3e-3),
    "KFAC": lambda model: tnconv.optim.KFAC(model, lr=0.03, damping=1e-2),
    "Shampoo": lambda model: tnconv.optim.RFShampoo(model, lr=3e-3, batch_size=64),
}


def trained(name: str, seed: int, x: Tensor, y: Tensor, target: float) -> tuple[nn.Module, int]:
    """A network whose loss over all images is below a target, and the steps that it took."""
    torch.manual_seed(seed)
    model = network(8)
    optimizer = MAKERS[name](model)
    for step in range(1, 2001):
        at = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        LOSS(model(x[at]), y[at]).backward()
        optimizer.step()
        if step % 5 == 0:
            with torch.no_grad():
                if float(LOSS(model(x), y)) <= target:
                    return deepcopy(model), step
    raise RuntimeError(f"{name} has not reached {target} in 2000 steps")


def adams(model: nn.Module, batches: Batches) -> Metric:
    """What Adam's averages are after it has stood at one point for a while."""
    twin = deepcopy(model)
    optimizer = torch.optim.Adam(twin.parameters(), 0.0)
    for x, y in batches:
        optimizer.zero_grad()
        LOSS(twin(x), y).backward()
        optimizer.step()
    return adam_metric(optimizer, twin)


METRICS: dict[str, Callable[[nn.Module, Batches], Metric]] = {
    "identity": lambda model, batches: Euclidean(points_of(model)),
    "Adam's": adams,
    "KFAC's": lambda model, batches: kfac_metric(
        model, LOSS, batches, 1e-2 * Euclidean(points_of(model))
    ),
    "Shampoo's": lambda model, batches: shampoo_metric(
        shampoo_statistics(model, LOSS, batches, 1e-4), points_of(model), model
    ),
}


def optimizers(options: argparse.Namespace) -> list[Row]:
    """Sharpness of every optimizer's networks in every metric, by largest eigenvalue and trace."""
    x, y = data(512)
    batches = list(zip(x.split(64), y.split(64), strict=True))
    rows: list[Row] = []
    for name in MAKERS:
        for seed in range(options.seeds):
            model, steps = trained(name, seed, x, y, options.loss)
            for metric, make in METRICS.items():
                found = shape_operator(model, LOSS, [(x, y)], make(model, batches))
                row: Row = {"optimizer": name, "seed": seed, "steps": steps, "metric": metric}
                row["largest"] = float(found.max_eigenvalue(1e-3, _generator()))
                row["trace"] = float(found.trace(20, _generator()))
                rows.append(row)
    return rows


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Times(nn.Module):
    """A parametrization ``W = a w``."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, w: Tensor) -> Tensor:
        return self.factor * w

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / self.factor


def rewritten(model: nn.Module) -> nn.Module:
    """A network in the NTK parametrisation, which computes the same."""
    twin = deepcopy(model)
    for name, factor in parametrization_map(model, "ntk").factors.items():
        layer, key = twin.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        parametrize.register_parametrization(layer, key, Times(1 / float(factor)))
    return twin


def evidence(options: argparse.Namespace) -> list[Row]:
    """At modes for several priors: carried along, or the identity of the parameters anew."""
    x, y = data(60)
    rows: list[Row] = []
    for width in options.widths:
        torch.manual_seed(width)
        start = network(width)
        for precision in options.precisions:
            for prior in ("standard", "NTK"):
                row: Row = {"width": width, "precision": precision, "prior": prior}
                rows.append(row | _evidences(start, precision, prior, x, y))
    return rows


def _evidences(start: nn.Module, precision: float, prior: str, x: Tensor, y: Tensor) -> Row:
    """Of a prior whose precision is a multiple of the identity in one of both parametrisations."""
    ntk = parametrization_map(start, "ntk")

    def precisions(model: nn.Module) -> Metric:
        theta = points_of(model)
        if prior == "standard":
            return precision * Euclidean(theta)
        entries = {n: ntk.factors.get(n, torch.ones(())) ** 2 for n in theta}
        return precision * Diagonal(
            {n: f.to(theta[n]).expand_as(theta[n]) for n, f in entries.items()}
        )

    model = at_mode(start, precisions(start), x, y)
    twin = rewritten(model)
    here, theta = precisions(model), points_of(model)
    carried = here.pushforward(TorchParametrization(twin, bijective=True), theta)
    how: Any = {"curvature": "ggn", "estimate": Estimate(2, 40)}
    batches = [(x, y)]
    anew = precision * Euclidean(points_of(twin))
    return {
        "evidence": float(network_evidence(model, LOSS, batches, here)),
        "estimate": float(network_evidence(model, LOSS, batches, here, **how)),
        "estimate, carried": float(network_evidence(twin, LOSS, batches, carried, **how)),
        "estimate, anew": float(network_evidence(twin, LOSS, batches, anew, **how)),
    }


def at_mode(start: nn.Module, prior: Metric, x: Tensor, y: Tensor) -> nn.Module:
    """Where the posterior is largest, by L-BFGS."""
    model = deepcopy(start)
    named = dict(model.named_parameters())
    entries = prior.product(Vector({n: torch.ones_like(p) for n, p in points_of(model).items()}))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=150, line_search_fn="strong_wolfe")

    def energy() -> Tensor:
        optimizer.zero_grad()
        squares = [(entries.parts[name] * p**2).sum() for name, p in named.items()]
        found = len(x) * LOSS(model(x), y) + torch.stack(squares).sum() / 2
        found.backward()
        return found

    optimizer.step(energy)  # type: ignore[arg-type]
    return model


def folding(options: argparse.Namespace) -> list[Row]:
    """The first layer times a, and the factors of its BatchNorm over a, with the mean moved."""
    x, y = data(256)
    torch.manual_seed(0)
    model = network(8, norms=True)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(100):
        at = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        LOSS(model(x[at]), y[at]).backward()
        optimizer.step()
    model.eval()
    return [{"factor": a} | _folded(model, a, x, y) for a in options.factors]


def _folded(model: nn.Module, a: float, x: Tensor, y: Tensor) -> Row:
    twin = deepcopy(model)
    fold = BatchNormFold(twin, "0", "1")
    layer, norm = twin.get_submodule("0"), twin.get_submodule("1")
    assert (
        isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and layer.bias is not None
    )
    with torch.no_grad():
        norm.bias += (1 - 1 / a) * norm.weight / fold.spread * (layer.bias - fold.mean)
        layer.weight *= a
        norm.weight /= a
    assert torch.allclose(twin(x), model(x), atol=1e-9)
    single = folded(twin, fold)
    rows: Row = {}
    for name, net in (("unfolded, identity", twin), ("folded, identity", single)):
        rows[name] = _sharp(net, Euclidean(points_of(net)), x, y)
    damping = 1e-2 * Euclidean(points_of(single))
    rows["folded, KFAC"] = _sharp(single, kfac_metric(single, LOSS, [(x, y)], damping), x, y)
    return rows


def folded(model: nn.Module, fold: BatchNormFold) -> nn.Module:
    """The network without its first BatchNorm."""
    single = deepcopy(model)
    values = fold.inverse(points_of(model))
    single[1] = nn.Identity()  # type: ignore[operator]
    return loaded(single, values)


def _sharp(model: nn.Module, metric: Metric, x: Tensor, y: Tensor) -> float:
    found = shape_operator(model, LOSS, [(x, y)], metric)
    return float(found.max_eigenvalue(1e-4, _generator()))


def plot_optimizers(rows: list[Row], figure: Any) -> None:
    """The largest eigenvalue in each metric, over that of SGD's networks."""
    axis, names = figure.subplots(), list(MAKERS)
    for at, name in enumerate(names):
        heights = []
        for metric in METRICS:
            of = {n: _mean(rows, n, metric, "largest") for n in ("SGD", name)}
            heights.append(of[name] / of["SGD"])
        axis.bar([k + 0.2 * at for k in range(len(METRICS))], heights, 0.2, label=f"by {name}")
    axis.set_xticks([k + 0.3 for k in range(len(METRICS))], list(METRICS))
    axis.set(xlabel="metric", ylabel="largest eigenvalue over that of SGD's", yscale="log")
    axis.legend()


def _mean(rows: list[Row], optimizer: str, metric: str, key: str) -> float:
    found = [r[key] for r in rows if r["optimizer"] == optimizer and r["metric"] == metric]
    return mean(found)


def plot_evidence(rows: list[Row], figure: Any) -> None:
    """Against the prior's precision."""
    widths = sorted({row["width"] for row in rows})
    for axis, width in zip(figure.subplots(1, len(widths), squeeze=False)[0], widths, strict=True):
        for prior in ("standard", "NTK"):
            own = [row for row in rows if (row["width"], row["prior"]) == (width, prior)]
            at = [row["precision"] for row in own]
            axis.plot(at, [row["estimate"] for row in own], "o-", label=f"{prior} prior")
            if prior == "standard":
                axis.plot(
                    at, [r["estimate, carried"] for r in own], "k+", ms=12, label="carried along"
                )
                axis.plot(at, [r["estimate, anew"] for r in own], "x:", label="identity anew")
        axis.set(title=f"width {width}", xlabel="precision", ylabel="log evidence", xscale="log")
    figure.axes[0].legend(fontsize=8)


def plot_folding(rows: list[Row], figure: Any) -> None:
    """Against the factor."""
    axis = figure.subplots()
    for name in rows[0]:
        if name != "factor":
            axis.plot([r["factor"] for r in rows], [r[name] for r in rows], "o-", label=name)
    axis.set(xlabel="factor a", ylabel="largest eigenvalue", xscale="log", yscale="log")
    axis.legend()


STUDIES: dict[str, tuple[Callable[..., list[Row]], Callable[..., None]]] = {
    "optimizers": (optimizers, plot_optimizers),
    "evidence": (evidence, plot_evidence),
    "folding": (folding, plot_folding),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.geometry_studies")
    result.description = __doc__
    result.add_argument("--study", action="append", choices=STUDIES, help="repeatable")
    result.add_argument("--seeds", type=int, default=3, help="(optimizers)")
    result.add_argument("--loss", type=float, default=0.05, help="of training (optimizers)")
    result.add_argument("--widths", type=int, nargs="+", default=[4, 8], help="(evidence)")
    result.add_argument(
        "--precisions", type=float, nargs="+", default=[0.1, 0.3, 1.0, 3.0, 10.0], help="(evidence)"
    )
    result.add_argument(
        "--factors", type=float, nargs="+", default=[0.01, 0.1, 1.0, 10.0, 100.0], help="(folding)"
    )
    result.add_argument("--json", type=Path, help="write results into this folder")
    result.add_argument("--plot", type=Path, help="write pictures into this folder")
    return result


def main(arguments: Sequence[str]) -> None:
    """Run what the command line asks for."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    for name in options.study or STUDIES:
        run, draw = STUDIES[name]
        rows = run(options)
        for row in rows:
            print(row, flush=True)
        if options.json:
            measure.write_results(options.json / f"geometry-{name}-cpu.json", "cpu", rows)
        if options.plot:
            _save(draw, rows, options.plot / f"geometry-{name}.png")


def _save(draw: Callable[..., None], rows: list[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    draw(rows, figure)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
