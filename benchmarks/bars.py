"""What tnconv has to reach on convolutions: one table, and what a run's rows say about it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import geometric_mean
from typing import Any

from benchmarks.cases import Layer
from benchmarks.contestants import PEERS
from benchmarks.layers import OURS, OURS_TUNED, Row, layer_of

Test = Callable[[Layer], bool]
BEST = "the best of them"


def every(_: Layer) -> bool:
    return True


def pointwise(h: Layer) -> bool:
    return max(h.kernel_size) == 1


def larger(h: Layer) -> bool:
    return max(h.kernel_size) > 1


def plain(h: Layer) -> bool:
    return larger(h) and max(h.stride) == 1 and h.groups == 1


@dataclass(frozen=True)
class Bar:
    """Ratios of ``ours`` to one contestant, or the best, on some layers; least mean and least one.

    Of times a contestant's over ours; of ``memory`` ours over a contestant's, which has to be less.
    """

    name: str
    operations: tuple[str, ...]
    peer: str
    mean: float | None = None
    worst: float | None = None
    on: Test = every
    ours: str = OURS
    memory: bool = False

    def ratio(self, row: Row) -> float | None:
        """The ratio of a row, if it is of this bar's and both were measured."""
        layer = layer_of(row)
        if row.operation not in self.operations or layer is None or not self.on(layer):
            return None
        times = row.memory if self.memory else row.median
        names = [name for name in PEERS if name in times] if self.peer == BEST else [self.peer]
        if self.ours not in times or not names or names[0] not in times:
            return None
        peer = min(times[name] for name in names)
        return times[self.ours] / peer if self.memory else peer / times[self.ours]


def _vjp(name: str, operation: str) -> Bar:
    return Bar(name, (operation,), "torch", 0.98, 0.9)


_EXPAND, _REDUCE = ("kfac_expand",), ("kfac_reduce",)
_SAMPLES, _NORMS = ("per_sample_weight_grad",), ("gradient_norms",)
BARS = (
    _vjp("forward", "forward"),
    _vjp("weight VJP", "weight_vjp"),
    _vjp("input VJP", "input_vjp"),
    Bar("input VJP, 1x1", ("input_vjp",), "torch", 1.03, on=pointwise),
    Bar("KFAC-reduce", _REDUCE, "torch", 7.5, 1.2),
    Bar("KFAC-reduce", _REDUCE, "einconv", 4, 1.2),
    Bar("KFAC-expand, larger than 1x1", _EXPAND, "torch", 1.9, 1.0, larger),
    Bar("KFAC-expand, these with stride 1, ungrouped", _EXPAND, "torch", 2.8, 1.0, plain),
    Bar("KFAC-expand, 1x1", _EXPAND, "torch", 1.5, 1.0, pointwise),
    Bar("KFAC-expand", _EXPAND, "einconv", 3, 1.0),
    Bar("per-sample gradients", _SAMPLES, "vmap", 2.4),
    Bar("per-sample gradients", _SAMPLES, "unfold", 1.75),
    Bar("per-sample gradients", _SAMPLES, "grouped", 1.08),
    Bar("per-sample gradients", _SAMPLES, "torch", 1.05),
    Bar("per-sample gradients", _SAMPLES, BEST, worst=0.5),
    Bar("per-sample gradients, tuned", _SAMPLES, BEST, worst=0.9, ours=OURS_TUNED),
    Bar("per-sample gradient norms", _NORMS, "opacus", 3.5, 1.0),
    Bar("per-sample gradient norms", _NORMS, BEST),
    Bar("per-sample gradient norms, tuned", _NORMS, BEST, ours=OURS_TUNED),
    Bar("KFAC-expand, tuned", _EXPAND, "torch", ours=OURS_TUNED),
    Bar(
        "peak memory of both factors, larger than 1x1",
        (*_EXPAND, *_REDUCE),
        "torch",
        0.4,
        on=larger,
        memory=True,
    ),
)


AS_RUN = (
    *(Bar(bar.name, bar.operations, "torch", 0.98, 0.85) for bar in BARS[:3]),
    Bar("KFAC-reduce", _REDUCE, "torch", worst=1.3),
    Bar("KFAC-expand", _EXPAND, "torch", worst=1.3),
)
"""In another dtype or memory format, against torch in the same one."""


def _on_threads(bar: Bar) -> Bar:
    """The same mean; the worst row may be slower, and more so where nothing was measured."""
    if bar.memory:
        return bar
    return replace(bar, worst=0.6 if bar.peer == BEST and bar.ours == OURS else 0.85)


def of_run(saved: Mapping[str, Any]) -> Sequence[Bar]:
    """The bars for a results file, by the settings that it names."""
    if saved.get("dtype", "float32") != "float32" or saved.get("channels_last"):
        return AS_RUN
    return BARS if saved["environment"]["threads"] == 1 else [*map(_on_threads, BARS)]


def lines(found: Sequence[Row], asked: Sequence[Bar] = BARS) -> Iterator[str]:
    """A table in Markdown: one line for each bar of which there are rows; nothing without any."""
    rows = {
        bar: [(ratio, row.shapes) for row in found if (ratio := bar.ratio(row)) is not None]
        for bar in asked
    }
    if any(rows.values()):
        yield "| bar | against | layers | asked | geometric mean | asked | worst | at |"
        yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for bar, some in rows.items():
        if not some:
            continue
        mean = geometric_mean(ratio for ratio, _ in some)
        worst, at = max(some) if bar.memory else min(some)
        cells = _cells(mean, bar.mean, bar.memory), _cells(worst, bar.worst, bar.memory)
        numbers = " | ".join(cell for pair in cells for cell in pair)
        yield f"| {bar.name} | {bar.peer} | {len(some)} | {numbers} | {at} |"


def _cells(value: float, asked: float | None, most: bool) -> tuple[str, str]:
    """What is asked and what is there, marked where it is missed."""
    if asked is None:
        return "", f"{value:.2f}"
    met = value <= asked if most else value >= asked
    return f"{'≤' if most else '≥'} {asked}", f"{value:.2f}" if met else f"**{value:.2f}**"
