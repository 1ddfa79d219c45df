"""Where events go: any function of ``(dict, step)``, and small adapters for loggers.

A logger that is not installed is asked for when its sink is made. Sinks never end a run: one that
raises is left out from then on, with a warning.
"""

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from tnconv.diagrams.notices import warn
from tnconv.monitor.events import Event

Function = Callable[[dict[str, float], int], object]


@runtime_checkable
class EventSink(Protocol):
    """What takes whole events."""

    def event(self, event: Event) -> None:
        """Take an event."""


Sink = Function | EventSink


class TensorBoard:
    """Scalars, histograms and alerts, as text, of a ``SummaryWriter``, or of a folder's.

    Args:
        writer: one of ``torch.utils.tensorboard``, or the folder that one is made for.
        prefix: before all tags.
    """

    def __init__(self, writer: Any, prefix: str = "") -> None:
        if not hasattr(writer, "add_scalar"):
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(writer))
        self.writer, self.prefix = writer, prefix

    def event(self, event: Event) -> None:
        for name, value in event.scalars.items():
            self.writer.add_scalar(self.prefix + name, value, event.step)
        for name, (counts, edges) in event.histograms.items():
            if counts.sum():
                self._histogram(self.prefix + name, counts, edges, event.step)
        for alert in event.alerts:
            self.writer.add_text(f"{self.prefix}alerts/{alert.title}", alert.text, event.step)

    def _histogram(self, name: str, counts: Any, edges: Any, step: int) -> None:
        middle = (edges[1:] + edges[:-1]) / 2
        self.writer.add_histogram_raw(
            name,
            min=float(edges[0]),
            max=float(edges[-1]),
            num=int(counts.sum()),
            sum=float((counts * middle).sum()),
            sum_squares=float((counts * middle**2).sum()),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )


class WandB:
    """A run of Weights & Biases; its own steps may only grow, so the step is a metric, too."""

    def __init__(self, run: Any) -> None:
        self.run, self._histogram = run, import_module("wandb").Histogram
        run.define_metric("monitor/step")
        run.define_metric("monitor/*", step_metric="monitor/step")

    def event(self, event: Event) -> None:
        found: dict[str, Any] = {f"monitor/{k}": v for k, v in event.scalars.items()}
        for name, histogram in event.histograms.items():
            found[f"monitor/{name}"] = self._histogram(np_histogram=histogram)
        if found:
            self.run.log({**found, "monitor/step": event.step})
        levels = {"info": "INFO", "warning": "WARN", "error": "ERROR"}
        for alert in event.alerts:
            self.run.alert(alert.title, alert.text, level=levels[alert.level])


class Trackio:
    """The run of trackio that is going on: ``trackio.init`` comes before."""

    def __init__(self, module: Any = None) -> None:
        self.module = import_module("trackio") if module is None else module

    def event(self, event: Event) -> None:
        found: dict[str, Any] = dict(event.scalars)
        for name, histogram in event.histograms.items():
            found[name] = self.module.Histogram(np_histogram=histogram)
        if found:
            self.module.log(found, step=event.step)
        levels = {"info": "INFO", "warning": "WARN", "error": "ERROR"}
        for alert in event.alerts:
            level = getattr(self.module.AlertLevel, levels[alert.level])
            self.module.alert(title=alert.title, text=alert.text, level=level)


class MLflow:
    """Scalars of the active run of MLflow; alerts are tags."""

    def __init__(self, module: Any = None) -> None:
        self.module = import_module("mlflow") if module is None else module

    def event(self, event: Event) -> None:
        if event.scalars:
            clean = {self._name(name): value for name, value in event.scalars.items()}
            self.module.log_metrics(clean, step=event.step)
        for alert in event.alerts:
            self.module.set_tag(self._name(f"alert.{event.step}.{alert.title}"), alert.text[:5000])

    @staticmethod
    def _name(name: str) -> str:
        """Of the characters that MLflow allows, of paths that it takes for normal ones."""
        parts = re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII).split("/")
        return "/".join(part for part in parts if part.strip("."))[:250] or "_"


def deliver(sinks: Sequence[Sink], event: Event) -> list[Sink]:
    """Hand an event to all sinks; those that raised, with a warning for each."""
    failed: list[Sink] = []
    for sink in sinks:
        try:
            if isinstance(sink, EventSink):
                sink.event(event)
            elif event.scalars:
                sink(event.flat, event.step)
        except Exception as error:
            failed.append(sink)
            name = getattr(sink, "__name__", type(sink).__name__)
            warn(f"sink {name} raised and is left out: {error!r}")
    return failed
