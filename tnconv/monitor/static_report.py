"""A report as a picture, by matplotlib's figures alone: no window, no global state."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tnconv.monitor.panels import LAYERWISE, Curve, Panel, histograms, layer_map, present
from tnconv.monitor.run_folder import Run

COLUMNS = ("step size", "gradients", "curvature", "training")
WIDTH, HEIGHT = 5.0, 2.6  # inches of a panel
FORMATS = (".png", ".pdf", ".svg")


def static_report(runs: Run | Sequence[Run], path: str | Path) -> Path:
    """Draw runs into a .png, .pdf or .svg file, side by side in every panel.

    Columns are step size, gradients and curvature, then training; histograms of gradients and maps
    of layers over steps are below, of the first run.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: another ending, or nothing recorded.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"path is {str(path)!r}; expected one that ends in {', '.join(FORMATS)}")
    runs = [runs] if isinstance(runs, Run) else list(runs)
    figure = drawn(runs)
    figure.savefig(path, dpi=75)
    return path


def drawn(runs: Sequence[Run]) -> Any:
    """The figure.

    Raises:
        ValueError: nothing recorded.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {panel for run in runs for panel, _ in present(run)}
    extra = _extras(runs[0]) if runs else []
    if not panels and not extra:
        kind = "finite values" if any(run.records for run in runs) else "records"
        raise ValueError(f"the runs have no {kind}; expected at least one")
    columns = [[p for p in _ordered(panels, runs) if p.column == name] for name in COLUMNS]
    columns = [each for each in columns if each]
    across = max(1, len(columns))
    cells = sum(map(len, columns)) + len(extra)
    rows = max(*map(len, columns), -(-cells // across), 1)
    figure = Figure((WIDTH * across, HEIGHT * rows))
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, across, squeeze=False)
    inches = {"left": 0.7, "right": -0.2, "top": -0.45, "bottom": 0.3}
    size = {"left": WIDTH * across, "right": WIDTH * across}
    figure.subplots_adjust(
        **{k: v / size.get(k, HEIGHT * rows) % 1 for k, v in inches.items()},
        wspace=0.2,
        hspace=0.4,
    )
    used = set()
    for at, column in enumerate(columns):
        for row, panel in enumerate(column):
            _draw(axes[row, at], panel, runs)
            used.add((row, at))
        axes[0, at].set_title(f"{column[0].column.upper()}\n{_words(column[0].title)}", fontsize=9)
    free = [p for p in np.ndindex(rows, across) if p not in used]
    for place, (draw, name) in zip(free, extra, strict=False):
        draw(axes[place], runs[0], name)
        used.add(place)
    for place in set(free) - used:
        cell: Any = axes[place]
        cell.axis("off")
    return figure


def _ordered(panels: set[Panel], runs: Sequence[Run]) -> list[Panel]:
    return list(dict.fromkeys(p for run in runs for p, _ in present(run) if p in panels))


def _draw(axes: Any, panel: Panel, runs: Sequence[Run]) -> None:
    """All curves of a panel, thin, and their moving averages over them."""
    several, values = len(runs) > 1, list[float]()
    for run in runs:
        for curve in dict((p, c) for p, c in present(run)).get(panel, ()):
            values += curve.values
            _draw_curve(axes, curve, f"{run.label}: {curve.label}" if several else curve.label)
    if (ends := panel.range_of(values)) is not None:
        axes.set_ylim(*ends)
    for limit in panel.limits:
        axes.axhline(limit, color="0.6", linewidth=0.8, linestyle=":")
    if panel.scale == "log":
        axes.set_yscale("log")
    axes.set_title(_words(panel.title), fontsize=9)
    axes.tick_params(labelsize=7, which="both")
    axes.legend(fontsize=6, frameon=False)
    axes.grid(alpha=0.2)


def _draw_curve(axes: Any, curve: Curve, label: str) -> None:
    (line,) = axes.plot(curve.steps, curve.values, linewidth=0.6, alpha=0.45)
    axes.plot(curve.steps, curve.smooth, linewidth=1.6, color=line.get_color(), label=_words(label))


def _words(text: str) -> str:
    """As it is: matplotlib reads formulas between dollars, and hides labels that begin with "_"."""
    return text.replace("$", r"\$").lstrip("_")


def _extras(run: Run) -> list[tuple[Any, str]]:
    """What is drawn below: histograms, and maps of layers."""
    found: list[tuple[Any, str]] = [
        (_draw_histogram, n) for n in run.recorded if histograms(run, n)[:1]
    ] if run.records else []  # fmt: skip
    return found + [(_draw_layers, name) for name in LAYERWISE if layer_map(run, name) is not None]


def _draw_histogram(axes: Any, run: Run, name: str) -> None:
    """The last recording, of one variable or of two."""
    step, counts, edges = histograms(run, name)[-1]
    if counts.ndim == 2:
        grid = np.log10(1 + counts.T)
        axes.pcolormesh(edges[0], edges[1], grid, cmap="viridis", rasterized=True)
        axes.set_xlabel("gradient", fontsize=7)
        axes.set_ylabel("parameter", fontsize=7)
    else:
        axes.stairs(counts, edges, fill=True)
        axes.set_yscale("log")
    axes.set_title(_words(f"{name} at step {step}"), fontsize=9)
    axes.tick_params(labelsize=7)


def _draw_layers(axes: Any, run: Run, name: str) -> None:
    """A map of parameters over steps, in logarithms of magnitudes."""
    found = layer_map(run, name)
    assert found is not None
    steps, rows = found
    values = np.abs(np.array(rows, dtype=float))
    with np.errstate(divide="ignore", invalid="ignore"):
        grid = np.where(values > 0, np.log10(values), np.nan)
    shown = axes.pcolormesh(steps, range(len(rows)), grid, shading="nearest", rasterized=True)
    axes.figure.colorbar(shown, ax=axes).ax.tick_params(labelsize=6)
    few = len(rows) <= 16
    names = [_words(name) for name in run.names] if few else []
    axes.set_yticks(range(len(rows)) if few else [], names, fontsize=5)
    axes.invert_yaxis()
    axes.set_title(_words(f"log10 {name} by parameter"), fontsize=9)
    axes.tick_params(axis="x", labelsize=7)
