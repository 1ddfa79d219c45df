"""The demo: KFAC beside SGD on handwritten digits, and what the compiler did for one layer."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from time import perf_counter

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tnconv import diagrams
from tnconv.codegen import compile
from tnconv.codegen.prices.timing import seconds_of
from tnconv.diagrams import Expression
from tnconv.diagrams.drawing import draw_steps
from tnconv.optim import KFAC
from tnconv.simplify import simplify

WORDS = """In these words: form N keeps the index patterns Π that torch's kernels know; form V reads
through views instead. A route is a way to compute a pattern: a native kernel, a window view, tap
sums, ... A plan is a form with a route for every pattern; the cheapest plan became the program."""
NEXT = """Next: python -m tnconv explain conv --input 8 3 32 32 --weight 16 3 3 3 --measure
      python -m tnconv explain my_module:my_model --input 8 3 32 32 --html report.html
      docs/start.md: your own diagram, KFAC in your loop, quantities of your model"""
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
Part = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Settings:
    """What is run; by default under a minute on two cores."""

    folder: Path = Path("demo-output")
    epochs: int = 3
    seeds: tuple[int, ...] = (0, 1, 2)
    grid: tuple[float, ...] = (0.003, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 1.0)
    batch: int = 64

    @property
    def quick(self) -> "Settings":
        """The same in seconds: too short to compare optimizers."""
        return replace(self, epochs=1, seeds=self.seeds[:1], grid=(0.03, 0.3))


@dataclass(frozen=True)
class Run:
    """One training: the mean loss of each epoch, accuracies at the end, and seconds."""

    losses: tuple[float, ...]
    validation: float
    test: float
    seconds: float


@dataclass(frozen=True)
class Task:
    """The split of the digits, the initial network and the batches that belong to a seed."""

    seed: int

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Images ``(n, 1, 8, 8)`` and labels: 1,000 to train, 297 to validate, 500 to test."""
        digits = load_digits()
        images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
        labels = torch.tensor(digits.target)
        order = torch.randperm(len(images), generator=self._generator)
        parts = torch.split(order, [1000, 297, 500])
        return tuple((images[part], labels[part]) for part in parts)

    @property
    def network(self) -> nn.Sequential:
        """A new small network with the seed's initial weights."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.seed)
            return nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(16, 32, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(32 * 4 * 4, 10),
            )

    @property
    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def train(self, make: MakeOptimizer, settings: Settings, advance: Callable[[], None]) -> Run:
        """Train on the seed's batches, the same ones for every optimizer."""
        (images, labels), validation, test = self.parts
        start, network, generator = perf_counter(), self.network, self._generator
        optimizer, losses = make(network), []
        for _ in range(settings.epochs):
            order = torch.randperm(len(images), generator=generator)
            batches = [(images[at], labels[at]) for at in torch.split(order, settings.batch)]
            sums = [_step(network, optimizer, batch) * len(batch[0]) for batch in batches]
            losses.append(sum(sums) / len(images))
            advance()
        scores = _accuracy(network, validation), _accuracy(network, test)
        return Run(tuple(losses), *scores, perf_counter() - start)


def run(settings: Settings) -> None:
    """Train, compare, explain and draw; every printed number is measured here."""
    console, threads = Console(), torch.get_num_threads()
    torch.set_num_threads(1)  # the layers are so small that threads would only wait for each other
    try:
        grid, kfac = _train_all(settings, console)
    finally:
        torch.set_num_threads(threads)
    best = max(grid, key=lambda lr: mean(run.validation for run in grid[lr]))
    console.print(_grid_table(grid, best))
    console.print(_comparison(settings, {f"SGD, lr {best:g}": grid[best], "KFAC": kfac}))
    defaults = {k: v for k, v in KFAC(nn.Linear(1, 1)).defaults.items() if k != "steps"}
    console.print("KFAC ran with its defaults:", ", ".join(f"{k}={v}" for k, v in defaults.items()))
    ahead = _percent(kfac) - _percent(grid[best])
    console.print(
        f"Mean test accuracy: KFAC {_percent(kfac):.2f} %, SGD at its best learning rate "
        f"{_percent(grid[best]):.2f} %, a difference of {ahead:+.2f} points."
    )
    _show_compiler(settings, console)


def _train_all(settings: Settings, console: Console) -> tuple[dict[float, list[Run]], list[Run]]:
    """The runs of SGD for each learning rate, and those of KFAC, one for each seed."""
    tasks = [Task(seed) for seed in settings.seeds]
    total = (len(settings.grid) + 1) * len(tasks) * settings.epochs
    with Progress(console=console) as progress:
        bar = progress.add_task("training", total=total)

        def runs(name: str, make: MakeOptimizer) -> list[Run]:
            progress.update(bar, description=name)
            return [task.train(make, settings, partial(progress.advance, bar)) for task in tasks]

        grid = {lr: runs(f"SGD, lr {lr:g}", partial(_sgd, lr)) for lr in settings.grid}
        return grid, runs("KFAC", KFAC)


def _sgd(lr: float, network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, batch: Part) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(network(batch[0]), batch[1])
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.item()


@torch.no_grad()
def _accuracy(network: nn.Module, part: Part) -> float:
    images, labels = part
    correct: Tensor = network(images).argmax(1) == labels
    return correct.float().mean().item()


def _percent(runs: Sequence[Run]) -> float:
    """The mean test accuracy."""
    return 100 * mean(run.test for run in runs)


def _grid_table(grid: dict[float, list[Run]], best: float) -> Table:
    table = Table(title="SGD with momentum 0.9: the learning rate is chosen by validation accuracy")
    for name in ("lr", "last loss", "validation %", "test %", "chosen"):
        table.add_column(name, justify="right")
    for lr, runs in grid.items():
        loss = mean(run.losses[-1] for run in runs)
        validation = 100 * mean(run.validation for run in runs)
        numbers = (f"{lr:g}", f"{loss:.3f}", f"{validation:.2f}", f"{_percent(runs):.2f}")
        table.add_row(*numbers, "*" if lr == best else "")
    return table


def _comparison(settings: Settings, contestants: dict[str, list[Run]]) -> Table:
    """Losses, accuracies and seconds of each seed, and their means."""
    table = Table(title="Equal networks, batches and epochs: losses of the epochs, test accuracy")
    losses = [f"loss {epoch}" for epoch in range(1, settings.epochs + 1)]
    for name in ("seed", "optimizer", *losses, "test %", "seconds"):
        table.add_column(name, justify="left" if name == "optimizer" else "right")
    for at, seed in enumerate(settings.seeds):
        for name, runs in contestants.items():
            table.add_row(str(seed), name, *_row(runs[at : at + 1]))
        table.add_section()
    for name, runs in contestants.items():
        table.add_row("mean", name, *_row(runs))
    return table


def _row(runs: Sequence[Run]) -> Iterable[str]:
    losses = zip(*(run.losses for run in runs), strict=True)
    seconds = mean(run.seconds for run in runs)
    return *(f"{mean(loss):.3f}" for loss in losses), f"{_percent(runs):.2f}", f"{seconds:.2f}"


def _show_compiler(settings: Settings, console: Console) -> None:
    """Explain and draw the factor of the second convolution that KFAC computed at every step."""
    factor = diagrams.kfac_reduce((settings.batch, 16, 8, 8), (3, 3), stride=2, padding=1)
    (simplified,) = simplify(factor).views.terms
    console.rule("What the compiler did: the input factor of the second convolution")
    console.out(compile(factor).explain(), highlight=False)
    console.out(f"simplified, in form V\n  {simplified}", highlight=False)
    console.print(" ".join(WORDS.split()))
    _compare(factor, settings, console)
    settings.folder.mkdir(parents=True, exist_ok=True)
    steps = [("as written", factor.terms[0]), ("simplified, in form V", simplified)]
    for suffix in ("svg", "png"):
        console.out("wrote", factor.draw(settings.folder / f"factor.{suffix}"))
        console.out("wrote", draw_steps(steps, settings.folder / f"factor-simplified.{suffix}"))
    console.print(NEXT, soft_wrap=True)


def _compare(factor: Expression, settings: Settings, console: Console) -> None:
    """The chosen program beside torch's way, and einconv's where it is installed."""
    x = torch.rand(settings.batch, 16, 8, 8)
    program = compile(factor)

    def torchs() -> Tensor:
        mean = F.unfold(x, 3, stride=2, padding=1).mean(2)
        return mean.mT @ mean / len(x)

    ways = {"the program": lambda: program(x=x), "torch: unfold, mean, product": torchs}
    if find_spec("einconv") is not None:
        build = import_module("einconv.expressions.convNd_kfac_reduce").einsum_expression
        equation, operands, shape = build(x, (3, 3), stride=2, padding=1, simplify=True)
        ways["einconv"] = lambda: torch.einsum(equation, *operands).reshape(shape)
    taken = seconds_of(list(ways.values()), torch.device("cpu"), budget=0.3)
    for name, seconds in zip(ways, taken, strict=True):
        console.print(f"measured: {name} {1e6 * seconds:,.0f} us")
