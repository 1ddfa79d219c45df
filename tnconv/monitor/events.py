"""What sinks get: one event a step, of scalars, histograms and alerts, in no logger's terms."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, sqrt
from typing import TYPE_CHECKING, Any, Literal, get_args

from tnconv.displays import Shown

if TYPE_CHECKING:
    import numpy as np

Level = Literal["info", "warning", "error"]
NORMS = ("GradNorm", "Distance", "UpdateSize")
"""Lists by parameter whose total is the root of the sum of squares."""
SUMS = ("HessTrace",)
"""Lists by parameter whose total is the sum."""
MOST_BINS = 512  # that loggers take


@dataclass(frozen=True)
class Alert:
    """Something that somebody should look at: what, where, and what can be done about it.

    Args:
        level: "info", "warning" or "error".
        title: a few words.
        text: what was seen, and what can be done about it.
        rule: the name of the rule that raised it.
    """

    level: Level
    title: str
    text: str
    rule: str = ""

    def __post_init__(self) -> None:
        if self.level not in get_args(Level):
            known = ", ".join(map(repr, get_args(Level)))
            raise ValueError(f"level is {self.level!r}; expected one of {known}")


@dataclass(repr=False)
class Event(Shown):
    """What is new at a step. Histograms are counts and edges.

    Args:
        step: its number.
        scalars: numbers by name.
        histograms: counts and edges by name.
        alerts: those that the step raised.
    """

    step: int
    scalars: dict[str, float] = field(default_factory=dict)
    histograms: "dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]" = field(
        default_factory=dict
    )
    alerts: list[Alert] = field(default_factory=list)

    @property
    def flat(self) -> dict[str, float]:
        """The scalars, for loggers that know nothing else."""
        return dict(self.scalars)


def event_of(step: int, values: Mapping[str, Any], names: Sequence[str]) -> Event:
    """Values of a record as an event: lists by parameter have one scalar each, and a total.

    >>> event_of(3, {"Loss": 0.5, "GradNorm": [3.0, 4.0]}, ["weight", "bias"]).scalars
    {'Loss': 0.5, 'GradNorm/weight': 3.0, 'GradNorm/bias': 4.0, 'GradNorm/total': 5.0}
    """
    event = Event(step)
    for name, value in values.items():
        if isinstance(value, Mapping) and "hist" in value:
            event.histograms |= dict(_histograms(name, value, names))
        elif name != "step":
            event.scalars |= dict(_scalars(name, value, names))
    return event


def total(name: str, value: Any) -> float | None:
    """One number for a value: the value itself, or the total of a list by parameter."""
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, list) and value and all(isinstance(x, int | float) for x in value):
        if name in NORMS:
            return sqrt(sum(x * x for x in value))
        if name in SUMS:
            return float(sum(value))
    return None


def _scalars(name: str, value: Any, names: Sequence[str]) -> Iterator[tuple[str, float]]:
    if isinstance(value, int | float):
        yield name, float(value)
    elif isinstance(value, Mapping):
        yield from ((f"{name}/{k}", float(v)) for k, v in value.items() if _is_number(v))
    elif isinstance(value, list) and len(value) == len(names) and all(map(_is_number, value)):
        yield from ((f"{name}/{key}", float(x)) for key, x in zip(names, value, strict=True))
        if (whole := total(name, value)) is not None:
            yield f"{name}/total", whole


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _histograms(name: str, value: Mapping[str, Any], names: Sequence[str]) -> Iterator[Any]:
    """Histograms of one variable; of two, that of the first."""
    for key, found in (("", value), *((k, v) for k, v in value.items() if k[:6] == "param_")):
        counts, edges = found["hist"], found["edges"]
        if counts.ndim == 2:
            counts, edges = counts.sum(1), edges[0]
        if len(counts) <= MOST_BINS:
            yield (f"{name}/{names[int(key[6:])]}" if key else name), (counts, edges)


def finite(value: float | None) -> bool:
    """Whether there is a number."""
    return value is not None and isfinite(value)
