"""Programs of the baseline compiler, for tests of what is made of programs, not of their search.

A search takes some ten times longer, and tests that draw geometries need new programs for each.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from unittest.mock import patch

from tnconv.codegen import tiers
from tnconv.codegen.baseline import baseline
from tnconv.functional import lookup


def _quick(network: Any, routes: Any = None, **options: Any) -> Any:
    return baseline(network, **options)


@lru_cache(maxsize=8192)
def _found(build: Callable[..., Any], *arguments: Hashable) -> Any:
    return build(_quick, *arguments)


@contextmanager
def quick_programs() -> Iterator[None]:
    """What is looked up comes from the baseline compiler, and is kept apart from what others use.

    It searches only where a memory limit asks for it.
    """
    with patch.object(tiers, "searched", _found), patch.object(lookup, "searched", _found):
        yield
