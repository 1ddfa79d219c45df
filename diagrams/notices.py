"""Warnings that point at the line of the user's that led to them, and are shown there once."""

import sys
import warnings
from typing import Any

INSIDE = (
    *("tnconv", "torch", "contextlib", "functools"),
    *("lightning", "pytorch_lightning", "accelerate", "transformers"),
)
REPEATED = ("always", "all", "error")
"""Actions of filters that ask for every warning, also for one that was shown before."""
_shown: set[tuple[str, type[Warning], str, int]] = set()


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning for the innermost caller outside of this library, torch and training loops.

    Every warning of the library comes this way, which a test keeps. Python forgets what it has
    shown whenever a filter changes, as `warnings.catch_warnings` in any library does between two
    steps of a training loop; so this module remembers.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _name(frame.f_globals).partition(".")[0] in INSIDE:
        frame, level = frame.f_back, level + 1
    line = frame.f_lineno
    key = (message, category, frame.f_code.co_filename, line)
    if key in _shown and _action(message, category, _name(frame.f_globals), line) not in REPEATED:
        return
    _shown.add(key)
    warnings.warn(message, category, stacklevel=level)


def _name(names: dict[str, object]) -> str:
    return str(names.get("__name__", ""))


def _action(message: str, category: type[Warning], module: str, line: int) -> str:
    """What the filters in use ask for."""
    for action, text, kind, where, at in warnings.filters:
        fits = _matches(text, message) and _matches(where, module) and at in (0, line)
        if fits and issubclass(category, kind):
            return str(action)
    return "default"


def _matches(pattern: Any, text: str) -> bool:
    """Filters hold compiled patterns, Python's first ones plain strings."""
    if pattern is None or isinstance(pattern, str):
        return pattern in (None, text)
    return pattern.match(text) is not None
