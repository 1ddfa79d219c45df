"""Programs in memory: one bounded table for all who look compiled programs up."""

from collections.abc import Callable, Hashable
from functools import lru_cache

import torch

from tnconv.codegen.programs.program import Program

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
    if not isinstance(array, torch.Tensor) or array.is_cpu or array.is_meta:
        return "cpu"
    return str(array.device)


cache_info = cached.cache_info
cache_clear = cached.cache_clear
