"""What a report shows and where: the three columns of the published tool's screen, as data.

Both the static and the interactive report draw these panels, from a `Run` alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tnconv.monitor.events import finite, total
from tnconv.monitor.run_folder import Run

Column = Literal["step size", "gradients", "curvature", "training"]
LARGEST = 1e300  # magnitude that is drawn
SMOOTH = 0.8  # of the moving average that is drawn over every series


@dataclass(frozen=True)
class Panel:
    """A panel of curves over steps, by the names of quantities, in a column."""

    title: str
    column: Column
    names: tuple[str, ...]
    scale: Literal["linear", "log"] = "linear"
    limits: tuple[float, ...] = ()  # lines that divide good from bad
    shown: tuple[float, float] | None = None  # where the axis ends if values go further

    def range_of(self, values: Sequence[float]) -> tuple[float, float] | None:
        """Where the axis is cut off, so that a few values of a diverging run hide no others.

        >>> Panel("", "training", (), shown=(-2, 3)).range_of([0.5, 1e9])
        (-2, 3)
        """
        if self.shown is None or not values:
            return None
        low, high = self.shown
        return None if low <= min(values) and max(values) <= high else self.shown


PANELS: tuple[Panel, ...] = (
    Panel(
        "alpha: -1 no step, 0 minimum, 1 other side",
        "step size",
        ("Alpha",),
        limits=(0.0, 1.0),
        shown=(-2.0, 3.0),
    ),
    Panel("distance and update size", "step size", ("Distance", "UpdateSize"), "log"),
    Panel("gradient norm", "step size", ("GradNorm",), "log"),
    Panel(
        "noise over gradient",
        "gradients",
        ("NormTest", "InnerTest", "OrthoTest"),
        "log",
        limits=(1.0,),
    ),
    Panel("early stopping, GSNR", "gradients", ("EarlyStopping", "MeanGSNR")),
    Panel("batch sizes asked for", "gradients", ("CABS", "CriticalBatchSize"), "log"),
    Panel("largest eigenvalue", "curvature", ("HessMaxEV", "HessSpectrum")),
    Panel("trace of the curvature", "curvature", ("HessTrace",)),
    Panel("Takeuchi criterion", "curvature", ("TICDiag", "TICTrace"), "log"),
    Panel("loss", "training", ("Loss",)),
)
LAYERWISE = ("GradNorm", "UpdateRatio", "GradientRatio", "HessTrace", "UpdateSize", "Distance")
"""Lists by parameter that are shown as a map of layers over steps."""


@dataclass(frozen=True)
class Curve:
    """A series with its moving average."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]

    @property
    def smooth(self) -> list[float]:
        """The exponential moving average, corrected for its start."""
        mean = weight = 0.0
        found = []
        for value in self.values:
            mean, weight = SMOOTH * mean + (1 - SMOOTH) * value, SMOOTH * weight + 1 - SMOOTH
            found.append(mean / weight)
        return found


def curves(run: Run, name: str) -> list[Curve]:
    """What a quantity has to draw: its value or total over steps, or one curve for each key."""
    steps, values = run.series(name)
    if any(isinstance(v, dict) for v in values):
        keys = dict.fromkeys(k for v in values if isinstance(v, dict) for k in v if k != "products")
        both = [*zip(steps, values, strict=True)]
        pairs = {
            key: [(s, v[key]) for s, v in both if isinstance(v, dict) and key in v] for key in keys
        }
    else:
        pairs = {"": [(s, total(name, v)) for s, v in zip(steps, values, strict=True)]}
    found = []
    for key, series in pairs.items():
        known = [(s, float(v)) for s, v in series if _is_drawn(v)]
        if known:
            label = f"{name} {key}".strip()
            found.append(Curve(label, [s for s, _ in known], [v for _, v in known]))
    return found


def _is_drawn(value: Any) -> bool:
    """Whether there is a number whose differences to others are numbers, too."""
    return isinstance(value, float | int) and finite(value) and abs(value) < LARGEST


def present(run: Run) -> list[tuple[Panel, list[Curve]]]:
    """The panels for which something was recorded; what no panel has gets one of its own."""
    known = {name for panel in PANELS for name in panel.names}
    others = [
        Panel(name, "training", (name,))
        for name in run.recorded
        if name not in known and name not in ("Time", "Parameters") and curves(run, name)
    ]
    found = [(p, [c for n in p.names for c in curves(run, n)]) for p in (*PANELS, *others)]
    return [(panel, each) for panel, each in found if each]


def layer_map(run: Run, name: str) -> tuple[list[int], list[list[float]]] | None:
    """Steps, and by parameter the values at them, for a list by parameter.

    Where other parameters learned before, those steps are left out.
    """
    pairs = zip(*run.series(name), strict=True)
    fit = [(s, v) for s, v in pairs if isinstance(v, list) and len(v) == len(run.names)]
    if not fit or not run.names:
        return None
    steps, rows = [s for s, _ in fit], [v for _, v in fit]
    return steps, [[row[at] for row in rows] for at in range(len(run.names))]


def histograms(run: Run, name: str) -> list[tuple[int, Any, Any]]:
    """Steps, counts and edges of a histogram's recordings."""
    steps, values = run.series(name)
    pairs = zip(steps, values, strict=True)
    return [(s, v["hist"], v["edges"]) for s, v in pairs if isinstance(v, dict) and "hist" in v]
