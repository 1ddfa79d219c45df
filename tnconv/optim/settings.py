"""What the hyper-parameters of `KFAC` and its like may be, and when something is due."""

import sys
from collections.abc import Callable, Mapping
from math import inf
from typing import Any

from torch import nn

Schedule = int | Callable[[int], bool]
"""Every so many steps, or whether a step, counted from 0, is one at which something is due."""

GROUPED = ("lr", "momentum", "damping", "decay", "weight_decay", "decoupled", "kl_clip")
"""Hyper-parameters that groups of parameters can have for themselves."""

SCHEDULE = "an int, at least 1, or a callable"
ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda value: 0 <= value < inf, "a number, at least 0"),
    "momentum": (lambda value: 0 <= value < 1, "a number in [0, 1)"),
    "damping": (lambda value: 0 < value < inf, "a positive number"),
    "decay": (lambda value: 0 <= value < 1, "a number in [0, 1)"),
    "weight_decay": (lambda value: 0 <= value < inf, "a number, at least 0"),
    "decoupled": (lambda value: isinstance(value, bool), "a bool"),
    "kl_clip": (lambda value: value > 0, "a positive number"),
    "max_factor": (lambda value: value >= 1 and value % 1 == 0, "an int, at least 1"),
    "max_size": (lambda value: value >= 1 and value % 1 == 0, "an int, at least 1"),
    "merge": (lambda value: value >= 1 and value % 1 == 0, "an int, at least 1"),
    "kernels": (lambda value: value in ("tensor", "matrix"), "'tensor' or 'matrix'"),
    "process_group": (lambda value: not isinstance(value, str) or value == "local", "'local'"),
    "inverse": (
        lambda value: value in ("cholesky", "eigen", "ekfac"),
        "'cholesky', 'eigen' or 'ekfac'",
    ),
    "factor_lr": (
        lambda value: value is None or callable(value) or 0 < value < inf,
        "a positive number or a callable",
    ),
    "riemannian_momentum": (
        lambda value: value is None or 0 <= value < 1,
        "None or a number in [0, 1)",
    ),
    "update_factors_every": (lambda value: _is_schedule(value), SCHEDULE),
    "update_inverses_every": (lambda value: _is_schedule(value), SCHEDULE),
    "adapt_damping": (lambda value: value is None or 0 < value < 1, "None or a number in (0, 1)"),
}
"""Each hyper-parameter's test, and the test in words."""


def check(settings: Mapping[str, Any]) -> None:
    """Raise unless all settings are allowed, by themselves and together.

    Raises:
        TypeError: a class instead of a loss.
        ValueError: one that is not.
    """
    for name, value in settings.items():
        allowed, words = ALLOWED.get(name, (lambda value: True, ""))
        if not allowed(value):
            raise ValueError(f"{name} is {value!r}; expected {words}")
    fisher = settings.get("fisher")
    if isinstance(settings.get("loss_fn"), type):
        name = settings["loss_fn"].__name__
        raise TypeError(f"loss_fn is the class {name}; expected an instance, {name}()")
    if fisher in ("type-2", "mc") and settings["loss_fn"] is None:
        raise ValueError(f"fisher is {fisher!r}; expected a loss_fn with it")
    if settings.get("inverse") == "ekfac":
        if not settings["per_group"] or fisher == "forward-only":
            raise ValueError("inverse is 'ekfac'; expected factors per group, of gradients")


def refuse_sharded(model: nn.Module, optimizer: str) -> None:
    """Check that parameters are whole in every process.

    Raises:
        NotImplementedError: a DTensor (FSDP2, tensor parallelism), or what FSDP flattened.
    """
    tensors = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    flat = [m for m in model.modules() if type(m).__name__ == "FullyShardedDataParallel"]
    for name, parameter in model.named_parameters():
        if flat or (tensors is not None and isinstance(parameter, tensors)):
            raise NotImplementedError(
                f"parameter {name!r} is sharded (FSDP or DTensor), which {optimizer} does not "
                "support; expected whole parameters, as in DistributedDataParallel"
            )


def due(schedule: Schedule, step: int) -> bool:
    """Whether something is due at a step.

    >>> [due(3, step) for step in range(4)], due(lambda step: step > 1, 1)
    ([True, False, False, True], False)
    """
    return bool(schedule(step)) if callable(schedule) else step % schedule == 0


def _is_schedule(value: Any) -> bool:
    return callable(value) or (value >= 1 and value % 1 == 0)
