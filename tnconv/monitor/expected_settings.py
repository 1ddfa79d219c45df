"""What the monitor's settings may be: checked before any work, and refused by name."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tnconv.monitor.measurement import Measurement
from tnconv.monitor.needs import CURVATURES
from tnconv.monitor.sinks import EventSink

Test = Callable[[Any], bool]


@dataclass(frozen=True)
class Expected:
    """In words, and as tests of a setting's kind and of its value."""

    words: str
    kind: Test
    value: Test = lambda given: True

    def expect(self, name: str, given: Any) -> None:
        """Check a setting.

        Raises:
            TypeError: another kind.
            ValueError: a value that is not allowed.
        """
        if not self.kind(given):
            kind = f"the class {given.__name__}" if _is_class(given) else f"a {_type(given)}"
            raise TypeError(f"{name} is {kind}; expected {self.words}")
        if not self.value(given):
            raise ValueError(f"{name} is {given!r}; expected {self.words}")


def expect_settings(**given: Any) -> None:
    """Check settings by name; those that are None are not given.

    Raises:
        TypeError: a setting of another kind.
        ValueError: a value that is not allowed.
    """
    for name, value in given.items():
        if value is not None:
            SETTINGS[name].expect(name, value)


def expect_plain_sgd(
    measurements: Iterable[Measurement], optimizer: torch.optim.Optimizer | None
) -> None:
    """Refuse measurements that are only defined for plain SGD, if the optimizer is another one.

    Raises:
        ValueError: there is such a measurement.
    """
    if optimizer is None or plain_sgd(optimizer):
        return
    for each in measurements:
        if each.plain_sgd:
            raise ValueError(
                f"{each.name} is derived for stochastic gradient descent without momentum; "
                f"got {type(optimizer).__name__}, expected plain torch.optim.SGD"
            )


def plain_sgd(optimizer: torch.optim.Optimizer) -> bool:
    """Whether steps are ``-η g``, and nothing else."""
    settings = ("momentum", "weight_decay", "maximize")
    return type(optimizer) is torch.optim.SGD and not any(
        group.get(name) for group in optimizer.param_groups for name in settings
    )


def _is_class(given: Any) -> bool:
    return isinstance(given, type)


def _type(given: Any) -> str:
    return type(given).__name__


def _whole(given: Any) -> bool:
    return isinstance(given, int) and not isinstance(given, bool)


def _function(given: Any) -> bool:
    return callable(given) and not _is_class(given)


def _sink(given: Any) -> bool:
    return not _is_class(given) and (callable(given) or isinstance(given, EventSink))


def _all(test: Test) -> Test:
    """Whether something is a sequence of what passes a test, and no string."""
    return lambda given: (
        isinstance(given, Sequence) and not isinstance(given, str) and all(map(test, given))
    )


SETTINGS: dict[str, Expected] = {
    "every": Expected(
        "a number of steps of at least 1, or a schedule",
        lambda given: _whole(given) or _function(given),
        lambda given: callable(given) or given >= 1,
    ),
    "sinks": Expected("a sequence of functions or sinks", _all(_sink)),
    "optimizer": Expected(
        "a torch.optim.Optimizer", lambda given: isinstance(given, torch.optim.Optimizer)
    ),
    "scaler": Expected("a torch.amp.GradScaler", lambda given: hasattr(given, "get_scale")),
    "folder": Expected("a path", lambda given: isinstance(given, str | Path)),
    "samples": Expected("a number of at least 1", _whole, lambda given: given >= 1),
    "curvature": Expected(
        f"one of {', '.join(map(repr, CURVATURES))}",
        lambda given: isinstance(given, str),
        lambda given: given in CURVATURES,
    ),
    "products": Expected("a number of at least 1", _whole, lambda given: given >= 1),
    "alerts": Expected("a sequence of functions", _all(_function)),
    "batch_dim": Expected("a dimension, counted from 0", _whole, lambda given: given >= 0),
    "seed": Expected("a whole number", _whole),
    "budget": Expected(
        "a positive fraction of a step",
        lambda given: isinstance(given, int | float) and not isinstance(given, bool),
        lambda given: given > 0,
    ),
}
