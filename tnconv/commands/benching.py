"""Times of layers beside torch's and those of other libraries, with a bar that shows progress."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp, isfinite, log
from typing import Protocol

from tnconv.codegen import compile
from tnconv.commands.accounts import measured
from tnconv.commands.contestants import Way
from tnconv.diagrams import Expression


class Asked(Protocol):
    """A layer that is timed."""

    @property
    def title(self) -> str: ...
    @property
    def network(self) -> Expression | None: ...
    @property
    def ways(self) -> Mapping[str, Way]: ...


@dataclass(frozen=True)
class Timed:
    """Seconds of one layer's operation, by contestant."""

    title: str
    seconds: dict[str, float]

    @property
    def ratios(self) -> dict[str, float]:
        """How many times as long as tnconv each of the others takes."""
        own = self.seconds["tnconv"]
        return {name: taken / own for name, taken in self.seconds.items() if name != "tnconv"}


def timed(layers: Sequence[Asked], tune: bool) -> list[Timed]:
    """Compile and time each layer, with progress on the standard error stream."""
    found = []
    with progress(len(layers)) as at:
        for layer in layers:
            at(layer.title)
            if layer.network is not None:
                program = compile(layer.network, tune=tune)
                found.append(Timed(layer.title, measured(program, layer.ways)))
            at(None)
    return found


@contextmanager
def progress(total: int) -> Iterator[Callable[[str | None], None]]:
    """A bar where rich is installed and somebody watches; else nothing.

    What it gives is called with a title at the beginning of each part, and with None at its end.
    """
    try:
        if not sys.stderr.isatty():
            raise ModuleNotFoundError(name="rich")
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError:
        yield lambda title: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        def advance(title: str | None) -> None:
            bar.update(task, description=title or "", advance=int(title is None))

        yield advance


def table(found: Sequence[Timed]) -> str:
    """Microseconds of every contestant, and how long the others take beside tnconv."""
    names = list(dict.fromkeys(name for row in found for name in row.seconds))
    width = max([len("layer"), *(len(row.title) for row in found)])
    lines = [f"{'layer':<{width}}" + "".join(f"{f'{name} us':>14}" for name in names)]
    for row in found:
        cells = (_cell(1e6 * row.seconds[n]) if n in row.seconds else "-" for n in names)
        lines.append(f"{row.title:<{width}}" + "".join(f"{cell:>14}" for cell in cells))
    for name in names[1:]:
        ratios = [row.ratios[name] for row in found if isfinite(row.ratios.get(name, float("inf")))]
        if ratios:
            mean = exp(sum(map(log, ratios)) / len(ratios))
            what = "" if len(found) == 1 else " (geometric mean)"
            lines.append(f"{name} takes {mean:.2f} times as long{what}")
    return "\n".join(lines)


def _cell(microseconds: float) -> str:
    return f"{microseconds:,.1f}" if isfinite(microseconds) else "failed"
