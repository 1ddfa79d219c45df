"""A callback for the Trainer of transformers: `Monitor` on its model, found by its optimizer."""

from importlib import import_module
from typing import Any

from tnconv.monitor.training_monitor import Monitor


def transformers_callback(prefix: str = "monitor/", **options: Any) -> Any:
    """A ``transformers.TrainerCallback`` whose ``monitor`` watches the run, and adds to its logs.

    Models that are given labels return their loss, which the monitor takes. Gradient norms are
    measured when backward passes end: unscaled and before clipping, unlike the trainer's own.

    Args:
        prefix: before the names in logs.
        options: of `Monitor`; ``loss_fn`` where the loss is a module of its own.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    base: Any = import_module("transformers").TrainerCallback

    class MonitorCallback(base):  # type: ignore[misc]
        """Attaches the monitor when training begins."""

        def __init__(self) -> None:
            self.monitor: Monitor | None = None
            self._fresh: dict[str, float] = {}

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            def note(scalars: dict[str, float], step: int) -> None:
                self._fresh.update({prefix + name: value for name, value in scalars.items()})

            sinks = [*options.get("sinks", ()), note]
            more = {name: value for name, value in options.items() if name != "sinks"}
            self.monitor = Monitor(given["model"], sinks=sinks, **more)
            optimizer = given["optimizer"]
            self.monitor.attach(getattr(optimizer, "optimizer", optimizer))

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any
        ) -> None:
            if logs is not None:
                logs.update(self._fresh)
                self._fresh = {}

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if self.monitor is not None:
                self.monitor.detach()

    return MonitorCallback()
