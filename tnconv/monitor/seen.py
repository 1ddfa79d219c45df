"""What was seen of one step, for measurements to read."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import nan, sqrt
from typing import Any

import torch
from torch import Tensor

from tnconv.displays import Shown
from tnconv.monitor.needs import Activity, Diagonal, Spectrum

LARGE = 2**16  # entries from which on a tensor is worth a call of its own


@dataclass(repr=False)
class Seen(Shown):
    """One step: B ``samples`` with gradients g[n] of their own losses, and what came of them.

    An attribute holds what it says if some measurement needed it. Lists are by parameter, in the
    order of ``names``. With a subset of the samples, sums over samples are B times the subset's
    mean.

    Args:
        step: its number.
        names: of the parameters.
        time: seconds since the run began.
        samples: B, of all workers.
        loss: the mean over samples.
        rates: the learning rate of each parameter, where known.
        gradient_norms: of the gradient as the optimizer's user has it.
        before: parameters before the step.
        start: parameters at the reference point.
        gradients: g.
        updates: parameters after minus before.
        last_gradients: g of the step before.
        last_updates: updates of the step before.
        squared_norms: ``Σ_n |g[n]|²``, by parameter.
        normalisation: ``Σ_n |g[n]|²`` and ``|g|²`` in normalisation layers.
        inner: ``Σ_n`` and ``Σ_n ()²`` of ``g[n]·g``.
        along: mean and unbiased variance of ``g[n]·update``.
        ahead: the same for the update of the step before.
        losses: mean and unbiased variance of the samples' losses.
        squares: ``Σ_n g[n]²``.
        diagonals: of curvature, by need.
        spectra: ends of the Hessian's spectrum, by need.
        histograms: what each need counted.
        dead: fractions of units, by layer.
        saturated: fractions of units, by need and layer.
        largest_sample: ``max_n |g[n]|²``, of those measured.
        several: whether the loss had several terms, each of a call of its own.
        apart: whether g is not the mean of the samples' gradients.
        has: the needs that were met.
    """

    step: int
    names: Sequence[str] = ()
    time: float = 0.0
    samples: int = 0
    loss: float = nan
    rates: Sequence[float] = ()
    gradient_norms: Sequence[float] = ()
    before: Sequence[Tensor] = ()
    start: Sequence[Tensor] = ()
    gradients: Sequence[Tensor] = ()
    updates: Sequence[Tensor] = ()
    last_gradients: Sequence[Tensor] = ()
    last_updates: Sequence[Tensor] = ()
    squared_norms: Sequence[float] = ()
    normalisation: tuple[float, float] = (nan, nan)
    inner: tuple[float, float] = (nan, nan)
    along: tuple[float, float] = (nan, nan)
    ahead: tuple[float, float] = (nan, nan)
    losses: tuple[float, float] = (nan, nan)
    squares: Sequence[Tensor] = ()
    diagonals: Mapping[Diagonal, Sequence[Tensor]] = field(default_factory=dict)
    spectra: Mapping[Spectrum, tuple[float, float, float]] = field(default_factory=dict)
    histograms: Mapping[Hashable, Any] = field(default_factory=dict)
    dead: Mapping[str, float] = field(default_factory=dict)
    saturated: Mapping[Activity, Mapping[str, float]] = field(default_factory=dict)
    largest_sample: float = nan
    several: bool = False
    apart: bool = False
    has: set[Hashable] = field(default_factory=set)

    @cached_property
    def squared_norms_of_mean(self) -> Sequence[float]:
        """``|g|²`` by parameter."""
        return squared_norms(self.gradients)

    @property
    def squared_norm(self) -> float:
        """``|g|²``."""
        return sum(self.squared_norms_of_mean) if self.gradients else nan

    @property
    def total_squared_norms(self) -> float:
        """``Σ_n |g[n]|²`` over all parameters."""
        return sum(self.squared_norms) if self.squared_norms else nan

    @cached_property
    def update_sizes(self) -> Sequence[float]:
        """``|update|`` by parameter."""
        return [sqrt(square) for square in squared_norms(self.updates)]

    def kept(self, names: Iterable[str]) -> "Seen":
        """Some attributes alone, and what was computed of them already."""
        found = Seen(**{name: getattr(self, name) for name in names})
        if "update_sizes" in self.__dict__:
            found.update_sizes = self.update_sizes
        return found

    @property
    def update_size(self) -> float:
        """``|update|``."""
        return sqrt(sum(size**2 for size in self.update_sizes))


def squared_norms(tensors: Sequence[Tensor]) -> list[float]:
    """``|t|²`` of each, in float32 at least."""
    return [norm**2 for norm in numbers(norms(tensors))]


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """``|t|`` of each, in float32 at least: sixteen bits hold neither its digits nor its size."""
    wide = iter(torch._foreach_norm(found) if (found := [*filter(_is_wide, tensors)]) else ())
    narrow = torch.float32
    return [next(wide) if _is_wide(t) else torch.linalg.vector_norm(t, dtype=narrow)
            for t in tensors]  # fmt: skip


def _is_wide(tensor: Tensor) -> bool:
    return tensor.dtype.itemsize > 2


def distances(some: Sequence[Tensor], others: Sequence[Tensor]) -> list[float]:
    """``|a - b|`` of each pair, in float32 at least; those of large tensors share their memory."""
    norms: list[Tensor | None] = [None] * len(some)
    small = [at for at, a in enumerate(some) if a.numel() < LARGE and a.dtype.itemsize > 2]
    if small:
        least = torch._foreach_sub([some[at] for at in small], [others[at] for at in small])
        for at, norm in zip(small, torch._foreach_norm(least), strict=True):
            norms[at] = norm
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = defaultdict(list)
    for at, a in enumerate(some):
        if norms[at] is None:
            kinds[torch.promote_types(a.dtype, torch.float32), a.device].append(at)
    for (dtype, device), numbered in kinds.items():
        most = max(some[at].numel() for at in numbered)
        scratch = torch.empty(most, dtype=dtype, device=device)
        for at in numbered:
            own = scratch[: some[at].numel()].view(some[at].shape)
            if some[at].dtype == dtype:
                torch.sub(some[at], others[at], out=own)
            else:  # a difference of sixteen bits would be rounded before it is written
                own.copy_(some[at]).sub_(others[at])
            norms[at] = torch.linalg.vector_norm(own)
    return numbers([norm for norm in norms if norm is not None])


def numbers(scalars: Sequence[Tensor]) -> list[float]:
    """The values of tensors of one entry: of one kind at once."""
    if len({(each.dtype, each.device) for each in scalars}) == 1:
        found: list[float] = torch.stack([*scalars]).tolist()
        return found
    return [float(each) for each in scalars]
