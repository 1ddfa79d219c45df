"""A callback for Lightning: `Monitor` on a part of a LightningModule, found by its optimizer."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from tnconv.monitor.training_monitor import Monitor


def lightning_callback(
    model: str | Callable[[Any], nn.Module] | None = None,
    loss_fn: str | Callable[..., Any] | None = None,
    prefix: str = "monitor/",
    **options: Any,
) -> Any:
    """A ``lightning.pytorch.Callback`` whose ``monitor`` watches the run, and logs scalars.

    Gradient norms are unscaled and before clipping, whatever the trainer does afterwards. The
    monitor's state is part of checkpoints.

    Args:
        model: what ``training_step`` calls: an attribute's name, a function of the LightningModule,
            or by default the module itself.
        loss_fn: the loss, or the name of the attribute that is it.
        prefix: before the names in loggers.
        options: of `Monitor`.

    Raises:
        ModuleNotFoundError: Lightning is not installed.
    """
    base: Any = import_module("lightning.pytorch").Callback

    class MonitorCallback(_Hooks, base):  # type: ignore[misc]
        """The hooks as a callback of Lightning."""

    return MonitorCallback(model, loss_fn, prefix, options)


class _Hooks:
    """Attaches the monitor when training starts."""

    state_key = "tnconv.Monitor"

    def __init__(self, model: Any, loss_fn: Any, prefix: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.monitor: Monitor | None = None
        self._state: dict[str, Any] | None = None
        self._model, self._loss_fn, self._prefix, self._options = model, loss_fn, prefix, options

    def on_train_start(self, trainer: Any, module: Any) -> None:
        loss = self._loss_fn
        watched = module if self._model is None else _of(module, self._model)
        scaler = getattr(trainer.precision_plugin, "scaler", None)

        def log(scalars: dict[str, float], step: int) -> None:
            named = {self._prefix + name: value for name, value in scalars.items()}
            for logger in trainer.loggers:
                logger.log_metrics(named, step)

        more = {**self._options, "sinks": [*self._options.get("sinks", ()), log]}
        loss = _of(module, loss) if isinstance(loss, str) else loss
        self.monitor = Monitor(watched, loss, scaler=scaler, **more)
        if self._state is not None:
            self.monitor.load_state_dict(self._state)
        self.monitor.attach(trainer.optimizers[0])

    def on_train_end(self, trainer: Any, module: Any) -> None:
        if self.monitor is not None:
            self.monitor.detach()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.monitor is None else self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict or None


def _of(module: Any, which: str | Callable[[Any], Any]) -> Any:
    return getattr(module, which) if isinstance(which, str) else which(module)
