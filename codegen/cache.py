"""Programs in memory: one bounded table for all who look compiled programs up."""

from collections.abc import Callable, Hashable
from functools import lru_cache

import torch

from tnconv.codegen.program import Program

MOST_PROGRAMS = 8192  # some 100 kB each at most


@lru_cache(maxsize=MOST_PROGRAMS)
def cached(build: Callable[..., Program], *arguments: Hashable) -> Program:
    """``build(*arguments)``, once; of many programs those that were used last are kept.

    Raises:
        TypeError: an argument that does not hash.
    """
    return build(*arguments)


def place(array: object) -> str:
    """The device for whose prices programs on a tensor are chosen."""
    device = array.device if isinstance(array, torch.Tensor) else None
    return "cpu" if device is None or device.type in ("cpu", "meta") else str(device)


cache_info = cached.cache_info
cache_clear = cached.cache_clear
