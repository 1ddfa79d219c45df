"""Coded backward passes: what tells whose each row of a gradient is.

A backward pass is linear in its cotangent. Times a code for each sample, ``v[r] c[owner(r)]``, what
arrives at an entry of sample n is ``c[n]`` times as much as without codes, and no code's multiple
where several samples share it. Codes are powers of two: those scale exactly in floating point, so
that gradients that are nothing but rounding agree as well.

A gradient is compared by random sums over all its dimensions but one (a check in the manner of
Freivalds), so that no pass keeps more than rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from tnconv.models.sample_maps import (
    Owned,
    SampleMap,
    Shape,
    Shared,
    Silent,
    Unknown,
    along,
    candidates,
    owners,
)

LEVELS = 8
ENTRIES = 257  # of a gradient that no map explains, looked at one by one
MIXED = 0.98  # so many of them belong to no single sample where all samples share the tensor


@dataclass(frozen=True)
class Sketch:
    """Random sums of a gradient: along each dimension that can hold samples, and some entries."""

    shape: Shape
    rows: Mapping[int, Tensor]
    norms: Mapping[int, Tensor]
    entries: Tensor

    @classmethod
    def of(cls, gradient: Tensor, samples: int, norms: bool) -> "Sketch":
        """``norms`` are needed of the pass without codes."""
        g, shape = _wide(gradient), tuple(gradient.shape)
        rows, sizes = {}, {}
        for dim in dict.fromkeys(known.dim for known in candidates(shape, samples)):
            before, after = prod(shape[:dim]), prod(shape[dim + 1 :])
            parts = g.reshape(before, shape[dim], after)
            rows[dim] = _weights(before, g.device, g.dtype) @ (
                parts @ _weights(after, g.device, g.dtype)
            )
            if norms:
                sizes[dim] = torch.linalg.vector_norm(parts, dim=(0, 2))
        step = max(1, gradient.numel() // ENTRIES)
        return cls(shape, rows, sizes, g.reshape(-1)[::step])

    @property
    def is_zero(self) -> bool:
        """Whether nothing arrived."""
        return not any(bool(row.any()) for row in self.rows.values()) and not self.entries.any()


@dataclass(frozen=True)
class Codes:
    """A power of two for each sample, drawn anew for every check."""

    values: Tensor  # (n,)
    generator: torch.Generator

    @classmethod
    def drawn(cls, samples: int, seed: int, levels: int = LEVELS) -> "Codes":
        """Few samples have different codes; of many, equal ones hide no more than a swap of two."""
        generator = torch.Generator("cpu").manual_seed(seed)
        order = torch.randperm(samples, generator=generator, device="cpu")
        exponents = torch.randint(levels, (samples,), generator=generator, device="cpu")
        few = samples <= levels
        return cls(2.0 ** (order if few else exponents).double(), generator)

    def cotangent(self, like: Tensor) -> Tensor:
        """A random cotangent of a tensor's shape."""
        shape, precise = like.shape, torch.promote_types(like.dtype, torch.float32)
        return torch.randn(shape, generator=self.generator, dtype=precise, device="cpu").to(like)

    def rows(self, known: Owned, shape: Shape) -> Tensor:
        """The code of every row of a map's dimension."""
        return self.values[owners(known, shape, len(self.values))]

    def applied(self, cotangent: Tensor, known: Owned) -> Tensor:
        """A cotangent, each sample's part of it times its code."""
        shape = tuple(cotangent.shape)
        return cotangent * along(self.rows(known, shape).to(cotangent), known, shape)


@dataclass
class Seen:
    """What arrived at one place in a pass without and a pass with codes."""

    plain: list[Sketch] = field(default_factory=list)
    coded: list[Sketch] = field(default_factory=list)


def judged(plain: Sketch | None, coded: Sketch | None, codes: Codes) -> tuple[SampleMap, bool]:
    """The map that explains what codes did to a gradient; and whether that is evidence.

    It is none where nothing came, or only one sample's gradient, or so little of a gradient that
    several maps explain it. For that gradient they all mean the same; others can tell them apart.
    """
    if plain is None or coded is None or plain.is_zero:
        return Silent(), False
    if plain.shape != coded.shape:
        return Unknown("its shape changes from pass to pass"), True
    possible = list(candidates(plain.shape, len(codes.values)))
    fits = [known for known in possible if _agrees(plain, coded, known, codes)]
    if fits:
        return fits[0], len(fits) == 1 and _has_several(plain, fits[0], codes)
    live = plain.entries != 0
    ratio = torch.log2((coded.entries / plain.entries)[live].double())
    mixed = ~((2 ** (ratio - ratio.round()) - 1).abs() < 1e-4)
    if live.any() and mixed.double().mean() >= MIXED:
        return Shared(), True
    return Unknown(
        "its rows follow no dimension's order"
        if possible
        else f"no dimension of its output {plain.shape} holds them"
    ), True


def _has_several(plain: Sketch, known: Owned, codes: Codes) -> bool:
    """Whether rows of several samples have a gradient."""
    live = plain.norms[known.dim] > 0
    own = owners(known, plain.shape, len(codes.values)).to(live.device)[live]
    return bool((own != own[0]).any())


def _agrees(plain: Sketch, coded: Sketch, known: Owned, codes: Codes) -> bool:
    """Whether every row became its sample's code times as much."""
    base, norm = plain.rows[known.dim], plain.norms[known.dim]
    code = codes.rows(known, plain.shape).to(base)
    error = (coded.rows[known.dim] - code * base).abs()
    return bool((error <= _tolerance(base) * code * norm).all())


def _tolerance(values: Tensor) -> float:
    """Of what is exact but for the order in which a sum is taken."""
    return 1e-7 if values.dtype == torch.float64 else 1e-3


def _wide(gradient: Tensor) -> Tensor:
    g = gradient.detach()
    return g if g.dtype == torch.float64 else g.float()


@lru_cache(maxsize=1024)
def _weights(length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random weights of size about one."""
    generator = torch.Generator("cpu").manual_seed(length)
    return torch.randn(length, generator=generator, dtype=torch.float64, device="cpu").to(
        device, dtype
    )


def all_owned(maps: Sequence[SampleMap]) -> bool:
    """Whether each of several gradients tells the samples apart, but for those that are zero."""
    told = [known for known in maps if not isinstance(known, Silent)]
    return bool(told) and all(isinstance(known, Owned) for known in told)
