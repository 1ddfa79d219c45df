"""Whether theory of the kernel regime describes small networks: three studies on data at hand.

Run as ``python -m benchmarks.kernel_studies --json results.json --plot folder``; ``--help`` lists
the options. Extras ``demo`` (scikit-learn's digits and photographs) and ``plots``. All in double
precision; the notebooks in ``benchmarks/studies`` run it and say what it found.

* ``conditions``: the conditions for natural gradient descent (`tnconv.ntk.stable_jacobian`), the
  drift of the kernel and the gap to the linearised model after training, against width.
* ``bandit``: the regret of kernel UCB with theory's exploration, a constant, and the evidence's.
* ``forgetting``: what a network forgets of digits while it learns rotated ones, against width and
  epochs, and how the tasks' kernels overlap before training.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.images import digits, rotated
from tnconv import ntk
from tnconv.ntk.incremental import Exploration, IncrementalNTK, Theory

Rows = list[dict[str, object]]


def network(width: int, channels: int = 1, classes: int = 10) -> nn.Sequential:
    """Two convolutions and a linear layer for images of 8 pixels."""
    convs = (nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, 2))
    return nn.Sequential(*convs, nn.ReLU(), nn.Flatten(), nn.Linear(9 * width, classes))


def images_of(data: str, count: int) -> tuple[Tensor, Tensor]:
    """Digits and their labels, or patches of photographs and by how many right angles they turn."""
    if data == "digits":
        images, labels = digits()
    else:
        images, labels = rotated(count, 8, torch.Generator().manual_seed(0))
    return images[:count].double(), labels[:count]


def trained(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], steps: int, rate: float
) -> None:
    """Full-batch gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(x)).backward()
        optimizer.step()


def conditions(options: argparse.Namespace, plot: Path | None) -> Rows:
    """The stable-Jacobian condition, kernel drift and linearisation gap against width."""
    x, labels = images_of(options.data, 12)
    classes = 10 if options.data == "digits" else 4
    targets = nn.functional.one_hot(labels, classes).double()
    found: dict[int, dict[str, float]] = {}

    def measured(name: str, model: nn.Module) -> float:
        if id(model) not in found:
            start = deepcopy(model)
            theta = ntk.empirical_ntk(start, x)
            rate = 1 / float(ntk.spectrum(theta)[0])  # of the sum of squares over two
            trained(model, x, lambda y: (y - targets).square().sum() / 2, options.steps, rate)
            state = ntk.stable_jacobian(model, x, targets, start)
            found[id(model)] = {
                "smallest eigenvalue": state.smallest_eigenvalue,
                "constant C": state.constant,
                "distance / radius": state.distance / state.radius,
                "kernel drift": ntk.kernel_drift(ntk.empirical_ntk(model, x), theta),
                "linearisation gap": ntk.linearization_gap(model, start, x),
            }
        return found[id(model)][name]

    names = ("smallest eigenvalue", "constant C", "distance / radius", "kernel drift")
    probes = {name: partial(measured, name) for name in (*names, "linearisation gap")}
    kept: list[nn.Module] = []  # ids stay unique

    def factory(width: int) -> nn.Module:
        kept.append(network(width, x.shape[1], classes).double())
        return kept[-1]

    table = ntk.WidthSweep(factory, options.widths, range(options.seeds), probes).run()
    if plot is not None:
        table.plot(plot / f"kernel-conditions-{options.data}.png")
    slopes: Rows = []
    for name in probes:
        slope = table.slope(name)
        values = {w: mean(r.value for r in table if (r.probe, r.width) == (name, w))
                  for w in options.widths}  # fmt: skip
        row: dict[str, object] = {"study": "conditions", "data": options.data, "probe": name}
        row["means"] = values
        slopes.append(row | {"slope": slope.exponent, "interval": [slope.lower, slope.upper]})
    return slopes


GAMMAS: dict[str, Exploration] = {
    "greedy": 0.0,
    "constant 0.1": 0.1,
    "constant 1": 1.0,
    "theory": Theory(noise=0.1, failure=0.1, norm=1.0),
    "evidence": "evidence",
}


def bandit(options: argparse.Namespace, plot: Path | None) -> Rows:
    """Four arms a round, contexts on the sphere, the reward ``cos(3 a·x)`` with noise 0.1."""
    curves: dict[str, list[Tensor]] = {name: [] for name in GAMMAS}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        pool = nn.functional.normalize(torch.randn(200, 6, dtype=torch.float64), dim=1)
        means = torch.cos(3 * pool @ nn.functional.normalize(torch.randn(6).double(), dim=0))
        model = nn.Sequential(nn.Linear(6, 128), nn.ReLU(), nn.Linear(128, 1)).double()
        theta = ntk.empirical_ntk(model, pool, reduce="trace", scales="ntk")
        theta = theta / theta.diagonal().mean()
        rounds = torch.randint(len(pool), (options.rounds, 4))
        noise = 0.1 * torch.randn(options.rounds, dtype=torch.float64)
        for name, gamma in GAMMAS.items():
            curves[name].append(regret(theta, means, rounds, noise, gamma))
    found = {name: torch.stack(each) for name, each in curves.items()}
    if plot is not None:
        _plot_curves(plot / "kernel-bandit.png", {n: each.mean(0) for n, each in found.items()})
    return [
        {
            "study": "bandit",
            "exploration": name,
            "regret": float(each[:, -1].mean()),
            "spread": float(each[:, -1].std()),
        }
        for name, each in found.items()
    ]


def regret(
    theta: Tensor, means: Tensor, rounds: Tensor, noise: Tensor, gamma: Exploration
) -> Tensor:
    """The sum of what was lost up to every round; points are positions in the pool."""

    def kernel(at: Tensor, other: Tensor | None = None) -> Tensor:
        return theta[at][:, at if other is None else other]

    held, lost = IncrementalNTK(kernel, 0.01), []
    for arms, error in zip(rounds, noise, strict=True):
        if len(held):
            chosen = arms[held.ucb(arms, gamma).argmax()]
        else:
            chosen = arms[0]
        lost.append(means[arms].max() - means[chosen])
        held.append(chosen[None], (means[chosen] + error)[None])
    return torch.stack(lost).cumsum(0)


def forgetting(options: argparse.Namespace, plot: Path | None) -> Rows:
    """Digits, then digits turned by 90 and 180 degrees, in one network."""
    images, labels = digits()
    images = images.double()
    tasks = [torch.rot90(images, turn, (2, 3)) for turn in range(3)]
    rows: Rows = []
    for width in options.widths:
        for steps in options.epochs:
            found = []
            for seed in range(options.seeds):
                torch.manual_seed(seed)
                model = network(width).double()
                loss = partial(nn.functional.cross_entropy, target=labels[:200])
                train = [partial(trained, model, t[:200], loss, steps, 0.3) for t in tasks]
                tests = [(t[1000:1300], labels[1000:1300]) for t in tasks]
                overlap = ntk.kernel_overlap(model, [t[:8] for t in tasks], outputs="sum")
                accuracies = ntk.accuracy_matrix(model, train, tests)
                own = mean(float(accuracies[i + 1, i]) for i in range(3))
                found.append((ntk.forgetting(accuracies), own, float(overlap[0, 1])))
            each = [mean(values) for values in zip(*found, strict=True)]
            names = ("forgetting", "accuracy after training", "kernel overlap")
            row: dict[str, object] = {"study": "forgetting", "width": width, "steps": steps}
            rows.append(row | dict(zip(names, each, strict=True)))
    if plot is not None:
        lines = {}
        for steps in options.epochs:
            own = [float(str(row["forgetting"])) for row in rows if row["steps"] == steps]
            lines[f"{steps} steps"] = torch.tensor(own)
        _plot_curves(plot / "kernel-forgetting.png", lines, options.widths)
    return rows


def _plot_curves(path: Path, lines: dict[str, Tensor], x: Sequence[int] | None = None) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.4))
    for name, y in lines.items():
        axis.plot(range(len(y)) if x is None else x, y.tolist(), label=name)
    axis.set(xlabel="round" if x is None else "width")
    axis.set(ylabel="regret" if x is None else "forgetting")
    axis.set_xscale("linear" if x is None else "log")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


STUDIES = {"conditions": conditions, "bandit": bandit, "forgetting": forgetting}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.kernel_studies")
    result.description = __doc__
    result.add_argument("--study", action="append", choices=STUDIES, help="repeatable")
    words = ("digits", "photographs")
    result.add_argument("--data", choices=words, default="digits", help="(conditions)")
    result.add_argument("--widths", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    result.add_argument("--seeds", type=int, default=3)
    result.add_argument("--steps", type=int, default=100, help="of gradient descent (conditions)")
    result.add_argument("--epochs", type=int, nargs="+", default=[5, 50], help="(forgetting)")
    result.add_argument("--rounds", type=int, default=150, help="(bandit)")
    result.add_argument("--json", type=Path, help="write results to this file")
    result.add_argument("--plot", type=Path, help="write pictures into this folder")
    return result


def main(arguments: Sequence[str]) -> None:
    """Run what the command line asks for."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    if options.plot:
        options.plot.mkdir(parents=True, exist_ok=True)
    rows: Rows = []
    for name in options.study or STUDIES:
        for row in STUDIES[name](options, options.plot):
            rows.append(row)
            print(row, flush=True)
        if options.json:
            measure.write_results(options.json, "cpu", rows)


if __name__ == "__main__":
    main(sys.argv[1:])
