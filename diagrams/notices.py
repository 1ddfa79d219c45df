"""Warnings that point at the line of the user's that led to them."""

import sys
import warnings

INSIDE = ("tnconv", "torch", "contextlib")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning for the innermost caller outside of this library, torch and contextlib."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package(frame.f_globals) in INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _package(names: dict[str, object]) -> str:
    return str(names.get("__name__", "")).partition(".")[0]
