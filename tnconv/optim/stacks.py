"""Parameters with equal families of matrices, whose products are computed together.

Of small layers, a call of a kernel takes longer than the kernel itself.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
MOST = 2**16
"""Tensors with more numbers are not joined: a copy would take longer than the calls it saves."""


def alike(items: Iterable[T], kind: Callable[[T], tuple[Hashable, int]]) -> list[list[T]]:
    """Items of equal kinds together, those apart whose largest tensor is too large to be joined.

    >>> alike(["a", "bb", "c"], lambda word: (len(word), 1))
    [['a', 'c'], ['bb']]
    """
    found: dict[Hashable, list[T]] = {}
    for at, item in enumerate(items):
        what, largest = kind(item)
        found.setdefault((what, at if largest > MOST else None), []).append(item)
    return list(found.values())


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors one after another in dimension 0; a single one is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
