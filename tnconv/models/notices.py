"""Warnings that point at the line of the user's that led to them."""

import sys
import warnings
from pathlib import Path

import torch

_HERE = str(Path(__file__).parents[1])
_INSIDE = tuple(
    str(path)
    for path in (
        *(_HERE, Path(_HERE).resolve(), Path(torch.__file__).parent),
        *(Path(warnings.__file__).with_name("contextlib.py"),),
    )
)


def warn(message: str) -> None:
    """A `UserWarning` for the innermost caller outside of this library, torch and contextlib."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
