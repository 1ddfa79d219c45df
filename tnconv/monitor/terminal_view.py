"""The run in a terminal, live or once: gauges, sparklines, a histogram, alerts; or plain lines."""

import sys
import time
from collections.abc import Sequence
from importlib import import_module
from math import isfinite
from typing import Any

from tnconv.monitor.events import Event, finite
from tnconv.monitor.panels import Curve, histograms, present
from tnconv.monitor.run_folder import Run

BLOCKS = "▁▂▃▄▅▆▇█"
GAUGE = 31  # characters of the gauge of alpha


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The last values as blocks; what is not finite is a dot.

    >>> sparkline([0.0, 1.0, 2.0, float("nan")])
    '▁▄█·'
    """
    shown = list(values)[-width:]
    known = [v for v in shown if isfinite(v)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(BLOCKS) - 1) / (high / 2 - low / 2) if high > low else 0.0
    return "".join(
        BLOCKS[int((v / 2 - low / 2) * scale + 0.5 - 1e-9)] if isfinite(v) else "·" for v in shown
    )


def gauge(alpha: float | None) -> str:
    """Where a step ended, between -1 and 1 and a little beyond.

    >>> gauge(0.0)
    '[.......|.......●.......|......]'
    """
    line = ["."] * GAUGE
    for mark in (-1.0, 1.0):
        line[_place(mark)] = "|"
    if finite(alpha) and alpha is not None:
        line[_place(alpha)] = "●"
    return f"[{''.join(line)}]"


def _place(alpha: float) -> int:
    return min(GAUGE - 1, max(0, round((min(2.0, max(-2.0, alpha)) + 2) / 4 * (GAUGE - 1))))


def rendered(run: Run) -> Any:
    """What rich shows of a run.

    Raises:
        ModuleNotFoundError: rich is not installed.
    """
    text = import_module("rich.text").Text  # what is in brackets is no markup
    title = text(run.label) if run.label else None
    table = import_module("rich.table").Table(title=title, expand=True)
    for name in ("", "quantity", "last", "over steps"):
        table.add_column(name, no_wrap=name != "over steps")
    column = ""
    for panel, each in present(run):
        for curve in each:
            head = panel.column if panel.column != column else ""
            column = panel.column
            cells = head, curve.label, f"{curve.values[-1]:.4g}", _line(curve)
            table.add_row(*map(text, cells))
    for name in run.recorded:
        for step, counts, edges in histograms(run, name)[-1:]:
            flat = counts if counts.ndim == 1 else counts.sum(1)
            ends = edges if counts.ndim == 1 else edges[0]
            logs = [float(v) for v in import_module("numpy").log10(1 + flat)]
            line = f"{ends[0]:.2g} {sparkline(logs, 100)} {ends[-1]:.2g}"
            table.add_row(*map(text, ("histogram", name, f"step {step}", line)))
    group = import_module("rich.console").Group
    styles = {"info": "cyan", "warning": "yellow", "error": "bold red"}
    alerts = [text(alert_line(a), style=styles.get(a["level"], "")) for a in run.alerts[-8:]]
    return group(table, *alerts)


def _line(curve: Curve) -> str:
    if curve.label == "Alpha":
        return f"{gauge(curve.smooth[-1])} {sparkline(curve.values, 24)}"
    return sparkline(curve.values)


def alert_line(alert: dict[str, Any]) -> str:
    """An alert in a line."""
    return f"step {alert['step']} {alert['level']}: {alert['title']}: {alert['text']}"


def plain(run: Run) -> str:
    """A run in lines, for what is no terminal."""
    lines = [run.label] if run.label else []
    for panel, each in present(run):
        lines += [f"{panel.column:10} {c.label:28} {c.values[-1]:.4g}" for c in each]
    if not run.recorded:
        lines.append("nothing is recorded yet")
    return "\n".join([*lines, *(alert_line(a) for a in run.alerts)])


class TerminalView:
    """A sink that shows the run while it is going on, at most so often a second.

    Without a terminal it prints a line now and then.

    Args:
        every: seconds between two lines, where there is no terminal.
        console: of rich; a new one by default.
    """

    def __init__(self, every: float = 30.0, console: Any = None) -> None:
        self.run, self.every, self._told = Run(), every, 0.0
        self.console = console or import_module("rich.console").Console()
        self.live: Any = None
        if self.console.is_terminal:
            live = import_module("rich.live").Live
            self.live = live(console=self.console, refresh_per_second=4)
            self.live.start()

    def event(self, event: Event) -> None:
        record = {"step": event.step, **_grouped(event)}
        if self.run.records and self.run.records[-1]["step"] == event.step:
            self.run.records[-1].update(record)
        else:
            self.run.records.append(record)
        del self.run.records[:-1000]
        self.run.alerts += [{"step": event.step, **vars(alert)} for alert in event.alerts]
        if self.live is not None:
            self.live.update(rendered(self.run))
        elif event.alerts or time.monotonic() - self._told > self.every:
            self._told = time.monotonic()
            shown = {k: v for k, v in event.scalars.items() if "/" not in k or k.endswith("total")}
            text = " ".join(f"{name}={value:.4g}" for name, value in shown.items())
            self._print(f"step {event.step} {text}")
            for alert in self.run.alerts[-len(event.alerts) or len(self.run.alerts) :]:
                self._print(alert_line(alert))

    def _print(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Leave the terminal as it is."""
        if self.live is not None:
            self.live.stop()


def _grouped(event: Event) -> dict[str, Any]:
    """Scalars, of lists by parameter their total alone, and histograms."""
    found: dict[str, Any] = {}
    for name, value in event.scalars.items():
        base, _, key = name.partition("/")
        if not key or key == "total":
            found[base] = value
    for name, (counts, edges) in event.histograms.items():
        found[name] = {"hist": counts, "edges": edges}
    return found


def show(run: Run, console: Any = None) -> None:
    """Print a run once."""
    if console is None and not sys.stdout.isatty():
        print(plain(run))
        return
    (console or import_module("rich.console").Console()).print(rendered(run))
