"""Whose each row of a tensor is: maps from one dimension of it to the samples of a batch.

A layer sees the batch where the model puts it: at any dimension, folded with time or windows, in
another order, or not at all. `tnconv.models.coded` finds the map of every call.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

Order = Literal["nt", "tn"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Row n of a dimension is sample n's."""

    dim: int


@dataclass(frozen=True)
class Fold:
    """A dimension holds ``t`` rows of every sample: of one after the other ("nt"), or in turns."""

    dim: int
    t: int
    order: Order


@dataclass(frozen=True)
class Shared:
    """Every entry belongs to all samples: tables, positions, what is made of parameters alone."""


@dataclass(frozen=True)
class Silent:
    """No gradient came: no evidence, and nothing to attribute."""


@dataclass(frozen=True)
class Unknown:
    """No dimension tells the samples apart, and why."""

    why: str


Owned = Batch | Fold
SampleMap = Batch | Fold | Shared | Silent | Unknown
Maps = tuple[SampleMap, ...]
"""Of the gradients after an operation's outputs."""


def candidates(shape: Shape, samples: int) -> Iterator[Owned]:
    """The maps that a shape allows."""
    for dim, size in enumerate(shape):
        if size == samples:
            yield Batch(dim)
    for dim, size in enumerate(shape):
        if size > samples and not size % samples:
            yield Fold(dim, size // samples, "nt")
            yield Fold(dim, size // samples, "tn")


def whole(shape: Shape, samples: int) -> SampleMap:
    """The map where there is one sample, which owns everything, or none at all."""
    if not shape:
        return Unknown("it has no dimension")
    if shape[0] == samples:
        return Batch(0)
    return Fold(0, shape[0], "nt") if samples else Shared()


def resized(known: SampleMap, shape: Shape, samples: int) -> SampleMap | None:
    """A map for a tensor of another size, or None where that contradicts it."""
    if not isinstance(known, Owned):
        return known
    if known.dim >= len(shape):
        return None
    size = shape[known.dim]
    if isinstance(known, Batch):
        return known if size == samples else None
    if not samples:
        return None if size else known
    if size % samples or not size:
        return None
    return Fold(known.dim, size // samples, known.order)


def owners(known: Owned, shape: Shape, samples: int, device: torch.device | None = None) -> Tensor:
    """The sample of every row of the map's dimension."""
    at = torch.arange(shape[known.dim], device=device)
    if isinstance(known, Batch):
        return at
    return at // known.t if known.order == "nt" else at % samples


def along(rows: Tensor, known: Owned, shape: Shape) -> Tensor:
    """One value for each row, in a shape that multiplies a tensor of the map's."""
    return rows.reshape([-1 if dim == known.dim else 1 for dim in range(len(shape))])


def unfolded(tensor: Tensor, known: Owned, samples: int, lead: int = 0) -> Tensor:
    """``(n, ...)`` after ``lead`` other dimensions, where the map's dimension was t rows of each.

    What a batch of one sample would have: t rows for a `Fold`, one for a `Batch`.
    """
    dim = known.dim + lead
    if isinstance(known, Batch):
        return tensor.unsqueeze(dim + 1).movedim(dim, lead)
    if known.order == "nt":
        return torch.unflatten(tensor, dim, (samples, known.t)).movedim(dim, lead)
    return torch.unflatten(tensor, dim, (known.t, samples)).movedim(dim + 1, lead)


def front(tensor: Tensor, known: Owned, samples: int, lead: int = 0) -> Tensor:
    """As `unfolded`, without the dimension of size 1 that a `Batch` leaves."""
    if isinstance(known, Batch):
        return tensor.movedim(known.dim + lead, lead)
    return unfolded(tensor, known, samples, lead)


def folded(tensor: Tensor, known: Owned, samples: int, lead: int = 0) -> Tensor:
    """Dimension 0 as ``(t, n)`` after ``lead`` other dimensions: t calls on one batch each."""
    assert isinstance(known, Fold) and known.dim == 0
    if known.order == "tn":
        return torch.unflatten(tensor, lead, (known.t, samples))
    return torch.unflatten(tensor, lead, (samples, known.t)).transpose(lead, lead + 1)


def places(
    known: Owned, shape: Shape, samples: int, device: torch.device | None = None
) -> Tensor:  # (n, features)
    """Where each sample's entries are in a flat tensor of a shape."""
    every = torch.arange(prod(shape), device=device).reshape(shape)
    return unfolded(every, known, samples).flatten(1)


def is_fast(known: SampleMap) -> bool:
    """Whether samples are where layers have them: row n of dimension 0."""
    return known == Batch(0)
