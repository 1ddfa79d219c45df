"""What a record can hold: numbers, words, lists and mappings of them, and arrays."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor


def recordable(value: Any) -> Any:
    """A value as records have it: numbers of torch and numpy are Python's, tensors are arrays.

    >>> recordable({"a": np.float32(0.5), "b": (1, None)})
    {'a': 0.5, 'b': [1, None]}

    Raises:
        TypeError: what no record can hold.
    """
    if isinstance(value, Tensor):
        given = value.detach().cpu()
        return given.item() if not given.dim() else _wide(given).numpy()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _edges(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [recordable(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str | np.ndarray):
        return value
    raise TypeError(
        f"a value is a {type(value).__name__}; expected numbers, words, arrays, or lists and "
        "mappings of them"
    )


def _edges(value: Any) -> Any:
    """A value of a mapping; a pair of arrays, as of a histogram's edges, stays one."""
    found = recordable(value)
    pair = isinstance(value, tuple) and all(isinstance(each, np.ndarray) for each in found)
    return tuple(found) if pair else found


def _wide(given: Tensor) -> Tensor:
    """As numpy has no bfloat16."""
    return given.float() if given.is_floating_point() and given.dtype.itemsize < 4 else given
