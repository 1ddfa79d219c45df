"""A report as one HTML file that needs nothing else: plotly inside, and a slider over steps."""

import html
import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tnconv.monitor.panels import histograms, present
from tnconv.monitor.run_folder import Run

PAGE = """<!DOCTYPE html>
<html><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 1.5em; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 1em; }}
.panel {{ height: 320px; }}
td, th {{ text-align: left; padding: 0.15em 1em 0.15em 0; }}
.error {{ color: #b00; }} .warning {{ color: #a60; }}
</style>
<script>{library}</script></head>
<body><h1>{title}</h1>
<h2>Alerts</h2><table id="alerts">{alerts}</table>
<div class="grid" id="panels">{panels}</div>
<h2>Histograms</h2>
<label>step <input type="range" id="slider" min="0" max="{last}" value="{last}">
<output id="step"></output></label>
<div class="grid">{histograms}</div>
<script>
const curves = {curves}, steps = {steps}, frames = {frames};
for (const [id, p] of Object.entries(curves)) Plotly.newPlot(id, p.data, p.layout);
function show() {{
  const at = steps[+document.getElementById("slider").value];
  document.getElementById("step").value = at;
  for (const [id, byStep] of Object.entries(frames)) {{
    const known = Object.keys(byStep).map(Number).filter(s => s <= at);
    if (!known.length) continue;
    const found = byStep[Math.max(...known)];
    Plotly.react(id, found.data, found.layout);
  }}
}}
document.getElementById("slider").addEventListener("input", show);
if (steps.length) show();
</script></body></html>
"""


def html_report(runs: Run | Sequence[Run], path: str | Path) -> Path:
    """Write runs into one HTML file, which works offline; histograms are the first run's.

    Raises:
        ModuleNotFoundError: plotly is not installed.
        ValueError: another ending, or nothing recorded.
    """
    path = Path(path)
    if path.suffix != ".html":
        raise ValueError(f"path is {str(path)!r}; expected one that ends in .html")
    runs = [runs] if isinstance(runs, Run) else list(runs)
    curves = _curves(runs)
    if not any(run.records for run in runs):
        raise ValueError("the runs have no records; expected at least one")
    steps, frames = _frames(runs[0])
    library = import_module("plotly.offline").get_plotlyjs()
    titles = ", ".join(run.label or "run" for run in runs)
    text = PAGE.format(
        title=html.escape(titles),
        library=library,
        alerts=_alerts(runs),
        panels="".join(f'<div class="panel" id="{each}"></div>' for each in curves),
        histograms="".join(f'<div class="panel" id="{each}"></div>' for each in frames),
        last=max(0, len(steps) - 1),
        curves=_script(curves),
        steps=_script(steps),
        frames=_script(frames),
    )
    path.write_text(text, encoding="utf-8")
    return path


def _curves(runs: Sequence[Run]) -> dict[str, Any]:
    """A figure for every panel, as plotly's data and layout."""
    found: dict[str, Any] = {}
    for run in runs:
        for panel, each in present(run):
            name = _id("panel", panel.title)
            if name not in found:
                layout = _layout(f"{panel.column}: {panel.title}")
                layout["yaxis"] = {"type": panel.scale}
                found[name] = {"data": [], "layout": layout}
            for curve in each:
                label = f"{run.label}: {curve.label}" if len(runs) > 1 else curve.label
                x, y = list(curve.steps), list(curve.values)
                if (ends := panel.range_of(y)) is not None:
                    found[name]["layout"]["yaxis"]["range"] = ends
                found[name]["data"] += [
                    {"x": x, "y": y, "mode": "lines", "opacity": 0.35, "showlegend": False},
                    {"x": x, "y": curve.smooth, "mode": "lines", "name": html.escape(label)},
                ]
    return found


def _frames(run: Run) -> tuple[list[int], dict[str, Any]]:
    """Steps with histograms, and for each of these a figure by step."""
    frames: dict[str, Any] = {}
    for name in run.recorded:
        for step, counts, edges in histograms(run, name):
            made = frames.setdefault(_id("histogram", name), {})
            made[step] = _histogram(f"{name} at step {step}", counts, edges)
    steps = sorted({step for by_step in frames.values() for step in by_step})
    return steps, frames


def _id(kind: str, name: str) -> str:
    """What names an element of the page."""
    return f"{kind}-" + "".join(c if c.isalnum() else "-" for c in name)


def _histogram(title: str, counts: Any, edges: Any) -> dict[str, Any]:
    layout = _layout(title)
    if counts.ndim == 2:
        x, y = (((e[1:] + e[:-1]) / 2).tolist() for e in edges)
        logs = [[float(v) for v in row] for row in _log(counts.T)]
        layout |= {"xaxis": {"title": "gradient"}, "yaxis": {"title": "parameter"}}
        return {"data": [{"type": "heatmap", "x": x, "y": y, "z": logs}], "layout": layout}
    layout |= {"yaxis": {"type": "log"}, "bargap": 0}
    middle = ((edges[1:] + edges[:-1]) / 2).tolist()
    data = [{"type": "bar", "x": middle, "y": counts.tolist()}]
    return {"data": data, "layout": layout}


def _log(counts: Any) -> Any:
    numpy = import_module("numpy")
    return numpy.log10(1 + counts)


def _layout(title: str) -> dict[str, Any]:
    margin = {"l": 50, "r": 10, "t": 40, "b": 40}
    return {"title": {"text": html.escape(title), "font": {"size": 13}}, "margin": margin}


def _alerts(runs: Sequence[Run]) -> str:
    rows = [
        f'<tr class="{html.escape(a["level"])}"><td>{html.escape(run.label)}</td>'
        f"<td>step {a['step']}</td><td>{html.escape(a['title'])}</td>"
        f"<td>{html.escape(a['text'])}</td></tr>"
        for run in runs
        for a in run.alerts
    ]
    return "".join(rows) or "<tr><td>none</td></tr>"


def _script(value: Any) -> str:
    """JSON that cannot end a script."""
    return json.dumps(value).replace("<", "\\u003c")
