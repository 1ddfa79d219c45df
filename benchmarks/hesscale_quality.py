"""How near approximate Hessian diagonals are to the exact one, before and after training.

Run as ``python -m benchmarks.hesscale_quality --json results.json --plot results.png``. Per sample
(a batch of one), ``Σ |estimate - exact|`` over all parameters, over ``Σ |exact|``: means over
samples and seeds. Exact is `tnconv.hessian_diagonal`. Protocol after Elsayed & Mahmood 2022. The
further a network is trained on labels that it can learn, the worse every estimate becomes, so there
are several: "random" labels by a step size of 0.1, and "clusters" by two step sizes (`CASES`).
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import tnconv
from benchmarks import measure
from tnconv import quantities

LOSS = nn.CrossEntropyLoss()
Diagonal = dict[str, Tensor]
Estimate = Callable[[nn.Module, Tensor, Tensor], Mapping[str, Tensor]]


def mlp(act: type[nn.Module]) -> nn.Sequential:
    """Three hidden layers of 16."""
    layers: list[nn.Module] = []
    for inputs in (20, 16, 16):
        layers += [nn.Linear(inputs, 16), act()]
    return nn.Sequential(*layers, nn.Linear(16, 10))


def convolutional() -> nn.Sequential:
    """On images of 8 x 8."""
    features = nn.Conv2d(1, 4, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(4, 8, 2), nn.Tanh()
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *features, nn.Flatten(), nn.Linear(32, 10))


NETWORKS = {
    "tanh": (partial(mlp, nn.Tanh), 20),
    "ReLU": (partial(mlp, nn.ReLU), 20),
    "convolutional": (convolutional, 64),
}


def recursion(method: str, model: nn.Module, x: Tensor, y: Tensor) -> Diagonal:
    """By `tnconv.hesscale`."""
    return tnconv.hesscale(model, LOSS, x, y, method)  # type: ignore[arg-type]


def hutchinson(vectors: int, model: nn.Module, x: Tensor, y: Tensor) -> Diagonal:
    """``z ∘ H z`` for random signs z."""
    theta = {name: p.detach() for name, p in model.named_parameters()}

    def product(z: Diagonal) -> Diagonal:
        slope = grad(lambda theta: LOSS(functional_call(model, theta, (x,)), y))
        return {name: z[name] * u for name, u in jvp(slope, (theta,), (z,))[1].items()}

    signs = {n: torch.randint(2, (vectors, *p.shape)) * 2.0 - 1 for n, p in theta.items()}
    return {name: each.mean(0) for name, each in vmap(product)(signs).items()}


def gauss_newton(
    samples: int | None, model: nn.Module, x: Tensor, y: Tensor
) -> Mapping[str, Tensor]:
    """Exact, or by targets that are drawn."""
    found = quantities.GGNDiagonal() if samples is None else quantities.GGNDiagonal("mc", samples)
    return tnconv.compute(model, LOSS, x, y, [found])[found]


def kronecker(samples: int, model: nn.Module, x: Tensor, y: Tensor) -> Diagonal:
    """The diagonal of KFAC's factors."""
    kfac = quantities.KFAC("expand", "mc", samples, joint=False)
    found = tnconv.compute(model, LOSS, x, y, [kfac])[kfac]
    return {
        name: torch.outer(each.grad_output[0].diagonal(), each.input[0].diagonal()).reshape(p.shape)
        for name, p in model.named_parameters()
        if (each := found.get(name)) is not None
    }


def squares(model: nn.Module, x: Tensor, y: Tensor) -> Diagonal:
    """Of the gradient."""
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(LOSS(model(x), y), list(named.values()))
    return {name: g**2 for name, g in zip(named, grads, strict=True)}


CASES = (
    *(("tanh", "random", 0.1), ("tanh", "clusters", 0.01), ("tanh", "clusters", 0.05)),
    *(("ReLU", "random", 0.1), ("ReLU", "clusters", 0.01), ("ReLU", "clusters", 0.05)),
    *(("convolutional", "clusters", 0.01), ("convolutional", "clusters", 0.05)),
)
"""Networks, data and step sizes."""

ESTIMATES: dict[str, Estimate] = {
    "HesScale": partial(recursion, "hesscale"),
    "HesScale+": partial(recursion, "hesscale+"),
    "BL89": partial(recursion, "bl89"),
    "GGN": partial(gauss_newton, None),
    "GN": partial(recursion, "gn"),
    "GGN-MC 50": partial(gauss_newton, 50),
    "KFAC 50": partial(kronecker, 50),
    "zero": lambda model, x, y: {},
    "GGN-MC 1": partial(gauss_newton, 1),
    "g²": squares,
    "Hutchinson 50": partial(hutchinson, 50),
    "Hutchinson 1": partial(hutchinson, 1),
}


def clusters(features: int, samples: int) -> tuple[Tensor, Tensor]:
    """Ten normal ones that overlap, each with a label of its own."""
    centres = torch.randn(10, features)
    labels = torch.randint(10, (samples,))
    return centres[labels] + torch.randn(samples, features), labels


def random_labels(features: int, samples: int) -> tuple[Tensor, Tensor]:
    """Normal inputs whose labels say nothing about them."""
    return torch.randn(samples, features), torch.randint(10, (samples,))


DATA = {"clusters": clusters, "random": random_labels}


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float) -> float:
    """Plain SGD on batches of 32; the loss afterwards."""
    optimizer = torch.optim.SGD(model.parameters(), lr)
    for _ in range(steps):
        at = torch.randint(len(x), (32,))
        optimizer.zero_grad()
        LOSS(model(x[at]), y[at]).backward()
        optimizer.step()
    return float(LOSS(model(x), y).detach())


def errors(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, list[float]]:
    """Of every estimate, for every sample."""
    found = defaultdict(list)
    for n in range(len(x)):
        one = x[n : n + 1], y[n : n + 1]
        exact = tnconv.hessian_diagonal(model, LOSS, *one)
        size = sum(float(h.abs().sum()) for h in exact.values())
        for name, estimate in ESTIMATES.items():
            given = estimate(model, *one)
            wrong = [h - given[key] if key in given else h for key, h in exact.items()]
            found[name].append(sum(float(w.detach().abs().sum()) for w in wrong) / size)
    return found


def row(network: str, data: str, lr: float, options: argparse.Namespace) -> dict[str, object]:
    """Means before and after training."""
    make, features = NETWORKS[network]
    found: dict[str, dict[str, list[float]]] = {
        when: defaultdict(list) for when in ("before", "after")
    }
    losses = []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        model, (x, y) = make(), DATA[data](features, 1000)
        for when in found:
            if when == "after":
                losses.append(train(model, x, y, options.steps, lr))
            for name, each in errors(model, x[: options.samples], y[: options.samples]).items():
                found[when][name] += each
    means = {
        when: {name: sum(each) / len(each) for name, each in of.items()}
        for when, of in found.items()
    }
    loss = sum(losses) / len(losses)
    how = {"network": network, "data": data, "lr": lr, "steps": options.steps}
    return how | {"loss after": loss, **means}


def plot(rows: Sequence[dict[str, object]], path: Path) -> None:
    """One panel per network."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(rows), 4))
    FigureCanvasAgg(figure)
    for at, each in enumerate(rows, 1):
        axes = figure.add_subplot(1, len(rows), at)
        for shift, when in ((-0.2, "before"), (0.2, "after")):
            means: dict[str, float] = each[when]  # type: ignore[assignment]
            places = [place + shift for place in range(len(means))]
            label = f"{when} training"
            axes.barh(places, [max(v, 1e-3) for v in means.values()], 0.4, label=label)
        axes.set_yticks(range(len(ESTIMATES)), list(ESTIMATES))
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.axvline(1, color="grey", linewidth=0.7)
        axes.set_title(f"{each['network']} network, {each['data']}, step size {each['lr']}")
        axes.set_xlabel("L1 error / L1 norm of the exact diagonal")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    name = "python -m benchmarks.hesscale_quality"
    parser = argparse.ArgumentParser(prog=name, description=__doc__)
    parser.add_argument("--network", action="append", choices=NETWORKS, help="repeatable")
    parser.add_argument("--data", action="append", choices=DATA, help="repeatable")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="write results to this file")
    parser.add_argument("--plot", type=Path, help="draw results into this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    found = []
    for network, data, lr in CASES:
        if network in (options.network or NETWORKS) and data in (options.data or DATA):
            found.append(row(network, data, lr, options))
            print(found[-1], flush=True)
            if options.json:
                measure.write_results(options.json, "cpu", found)
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
