"""Coded backward passes: what tells whose each row of a gradient is.

A backward pass is linear in its cotangent. Times a code for each sample, ``v[r] c[owner(r)]``, what
arrives at an entry of sample n is ``c[n]`` times as much as without codes, and no code's multiple
where several samples share it. Codes are powers of two: those scale exactly in floating point, so
that gradients that are nothing but rounding agree as well, and to the last bit where a kernel adds
up in the same order in every pass.

Small gradients are kept, and compared entry by entry. Large ones are compared by random sums over
all their dimensions but one (a check in the manner of Freivalds), so that no pass keeps more than
rows of those.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tnconv.models.sample_maps import (
    Owned,
    SampleMap,
    Shape,
    Shared,
    Silent,
    Unknown,
    candidates,
    owners,
)

LEVELS = 8
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, Steele et al. 2014
SMALL = 1 << 17  # entries of a gradient that is kept whole
ENTRIES = 257  # of a gradient, looked at one by one
Array = NDArray[np.float64] | NDArray[np.float32]
MIXED = 0.98  # so many of them belong to no single sample where all samples share the tensor


@dataclass(frozen=True)
class Sketch:
    """Random sums of a gradient along dimensions that can hold samples, and some entries.

    The first such dimension is enough where one map explains all to the last bit. Otherwise sums
    along ``all_dims`` are compared, but for rounding, with the norms of rows in the plain pass.
    """

    shape: Shape
    rows: Mapping[int, Tensor]
    entries: Tensor
    norms: Mapping[int, Tensor]

    @classmethod
    def of(cls, gradient: Tensor, samples: int, all_dims: bool, first: int | None) -> "Sketch":
        g, shape = _wide(gradient), tuple(gradient.shape)
        rows, sizes = {}, {}
        dims = tuple(dict.fromkeys(known.dim for known in _table(shape, samples)[0]))
        for dim in dims if all_dims else (first,) if first in dims else dims[:1]:
            before, after = prod(shape[:dim]), prod(shape[dim + 1 :])
            parts = g.reshape(before, shape[dim], after)
            rows[dim] = _sums(parts)
            if all_dims:
                sizes[dim] = torch.linalg.vector_norm(parts, dim=(0, 2))
        return cls(shape, rows, g.reshape(-1)[:: _step(gradient.numel())].clone(), sizes)

    @cached_property
    def sample(self) -> Array:
        """The entries."""
        return _array(self.entries)

    def is_multiple(self, plain: "Sketch | Whole", codes: "Codes", known: Owned) -> bool:
        """Whether codes explain all rows, to the last bit."""
        assert isinstance(plain, Sketch)
        before, after = (_array(each.rows[known.dim]) for each in (plain, self))
        return bool((before * codes.along(known, self.shape).ravel() == after).all())

    @property
    def is_zero(self) -> bool:
        """Whether nothing arrived."""
        return not any(bool(row.any()) for row in self.rows.values()) and not self.entries.any()


class Whole:
    """A gradient that is kept, and some of its entries.

    A few operations on few numbers take numpy a fraction of torch's time.
    """

    __slots__ = ("array", "gradient", "shape")

    def __init__(self, gradient: Tensor) -> None:
        self.gradient, self.array = gradient, _array(gradient)
        self.shape: Shape = self.array.shape

    @property
    def sample(self) -> Array:
        """Some entries."""
        return self.array.reshape(-1)[:: _step(self.array.size)]

    @property
    def is_zero(self) -> bool:
        """Whether nothing arrived."""
        return not self.array.any()

    def is_multiple(self, plain: "Sketch | Whole", codes: "Codes", known: Owned) -> bool:
        """Whether codes explain all entries, to the last bit."""
        assert isinstance(plain, Whole)
        return bool((plain.array * codes.along(known, self.shape) == self.array).all())

    def sketch(self, samples: int) -> Sketch:
        """All that can be compared but for rounding."""
        return Sketch.of(self.gradient, samples, True, None)


Arrived = Whole | Sketch
"""What is kept of a gradient."""


def is_small(shape: Shape) -> bool:
    """Whether a gradient of a shape is kept."""
    return prod(shape) <= SMALL


def arrived(
    gradient: Tensor, samples: int, all_dims: bool = False, first: int | None = None
) -> Arrived:
    """Keep a gradient, or sums of it."""
    if gradient.numel() <= SMALL:
        return Whole(gradient)
    return Sketch.of(gradient, samples, all_dims, first)


@dataclass(frozen=True)
class Codes:
    """A power of two for each sample, drawn anew for every check; they are exact in any dtype."""

    array: NDArray[np.float32]  # (n,)
    seed: int
    _entries: dict[Shape, NDArray[np.float32]] = field(default_factory=dict)
    _rows: dict[tuple[Owned, int], NDArray[np.float32]] = field(default_factory=dict)
    _hidden: dict[Shape, NDArray[np.bool_]] = field(default_factory=dict)

    @classmethod
    def drawn(cls, samples: int, seed: int, levels: int = LEVELS, hiding: bool = False) -> "Codes":
        """Few samples have different codes; of many, equal ones hide no more than a swap of two.

        If ``hiding``, the lowest code is zero, and some sample has it.
        """
        drawn = _mixed(seed, samples)
        order = drawn.argsort().argsort()
        exponents = order if samples <= levels else drawn % np.uint64(levels)
        values = np.exp2(exponents.astype(np.float32))
        if hiding:
            values[(exponents == 0) | (order == 0)] = 0
        return cls(values, seed)

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(self.array)

    @cached_property
    def generator(self) -> torch.Generator:
        """Where cotangents are drawn."""
        return torch.Generator("cpu").manual_seed(self.seed)

    def cotangent(self, like: Tensor) -> Tensor:
        """A random cotangent of a tensor's shape."""
        shape, precise = like.shape, torch.promote_types(like.dtype, torch.float32)
        return torch.randn(shape, generator=self.generator, dtype=precise, device="cpu").to(like)

    def rows(self, known: Owned, shape: Shape) -> Tensor:
        """The code of every row of a map's dimension."""
        return torch.from_numpy(self.along(known, shape)).reshape(-1)

    def applied(self, cotangent: Tensor, known: Owned) -> Tensor:
        """A cotangent, each sample's part of it times its code."""
        return cotangent * torch.from_numpy(self.along(known, tuple(cotangent.shape))).to(cotangent)

    def entries(self, shape: Shape) -> NDArray[np.float32]:  # (maps, entries)
        """The codes of some of a tensor's entries, for each map that its shape allows."""
        if shape not in self._entries:
            self._entries[shape] = self.array[_table(shape, self.samples)[1]]
        return self._entries[shape]

    def hidden(self, shape: Shape) -> NDArray[np.bool_]:  # (maps, entries)
        """Which of those entries belong to a sample of code zero."""
        if shape not in self._hidden:
            self._hidden[shape] = self.entries(shape) == 0
        return self._hidden[shape]

    def along(self, known: Owned, shape: Shape) -> NDArray[np.float32]:
        """The codes of a map's rows, in a shape that multiplies a tensor of the map's."""
        key = known, shape[known.dim]
        if key not in self._rows:
            self._rows[key] = self.array[_owners(*key, self.samples)]
        return self._rows[key].reshape((-1, *(1,) * (len(shape) - 1 - known.dim)))


@lru_cache(maxsize=1024)
def _owners(known: Owned, size: int, samples: int) -> NDArray[np.int64]:
    """For each position along the map's dimension, of ``size``, the sample that it belongs to."""
    found: NDArray[np.int64] = owners(known, (1,) * known.dim + (size,), samples).numpy()
    return found


@lru_cache(maxsize=1024)
def _table(shape: Shape, samples: int) -> tuple[Sequence[Owned], NDArray[np.int64]]:
    """The maps that a shape allows, and the owners of some entries by each: `_step`."""
    maps, entries = tuple(candidates(shape, samples)), prod(shape)
    places = np.arange(0, entries, _step(entries))
    own = [
        _owners(m, shape[m.dim], samples)[places // prod(shape[m.dim + 1 :]) % shape[m.dim]]
        for m in maps
    ]
    return maps, np.array(own, dtype=np.int64).reshape(len(maps), len(places))


Judgement = tuple[SampleMap, bool]
"""The map that explains what codes did to a gradient; and whether that is evidence.

It is none where nothing came, or only one sample's gradient, or so little of a gradient that
several maps explain it. For that gradient they all mean the same; others can tell them apart.
"""


def judged(plain: Arrived | None, coded: Arrived | None, codes: Codes) -> Judgement | None:
    """What a gradient without and with codes tells; None where all dimensions are needed."""
    if plain is None or coded is None:
        return Silent(), False
    exact = _exact(plain, coded, codes)
    if exact is not None:
        return exact, True
    if isinstance(plain, Sketch) and plain.rows and not plain.norms:
        return (Silent(), False) if plain.is_zero else None
    samples = codes.samples
    plain = plain.sketch(samples) if isinstance(plain, Whole) else plain
    coded = coded.sketch(samples) if isinstance(coded, Whole) else coded
    return _estimated(plain, coded, codes)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a gradient with codes looks like by itself.

    ``number`` is that of the map among those of its shape, if it is the only one that fits.
    """

    map: SampleMap
    number: int | None = None


def predicted(coded: Sequence[Arrived | None], codes: Codes) -> list[Prediction]:
    """For each gradient the first map by which all entries of hidden samples are zero."""
    found = [Prediction(Silent())] * len(coded)
    for at, each in enumerate(coded):
        if each is None or prod(each.shape) == 0:
            continue
        live = each.sample != 0
        if live.any() or not each.is_zero:
            fits = np.flatnonzero(~(codes.hidden(each.shape) & live).any(1)).tolist()
            known = _table(each.shape, codes.samples)[0][fits[0]] if fits else Shared()
            found[at] = Prediction(known, fits[0] if len(fits) == 1 else None)
    return found


def confirmed(
    guesses: Sequence[Prediction],
    plain: Sequence[Arrived | None],
    coded: Sequence[Arrived | None],
    codes: Codes,
) -> list[bool | None]:
    """Whether gradients without and with codes agree with maps; None where they say nothing."""
    every = zip(guesses, plain, coded, strict=True)
    return [_confirmed(*each, codes) for each in every]


def _confirmed(
    guess: Prediction, plain: Arrived | None, coded: Arrived | None, codes: Codes
) -> bool | None:
    """See `confirmed`. Codes tell nothing where hidden samples have no gradient without them."""
    whole = isinstance(plain, Whole) and isinstance(coded, Whole) and plain.shape == coded.shape
    if whole and guess.number is not None and plain is not None and coded is not None:
        assert isinstance(guess.map, Owned)
        told = plain.sample[codes.hidden(plain.shape)[guess.number]].any()
        if told and coded.is_multiple(plain, codes, guess.map):
            return True
    found = judged(plain, coded, codes)
    if found is None:
        return False
    return found[0] == guess.map if found[1] else None


def _exact(plain: Arrived, coded: Arrived, codes: Codes) -> SampleMap | None:
    """The only map that explains all to the last bit, of several samples, if there is one."""
    if plain.shape != coded.shape:
        return None
    before, after = plain.sample, coded.sample
    maps, own = _table(plain.shape, codes.samples)
    (fits,) = (before * codes.entries(plain.shape) == after).all(1).nonzero()
    if not len(fits):
        return Shared() if _is_mixed(before, after) else None
    live = own[fits[0]][before != 0]
    if len(fits) > 1 or not live.size or (live == live[0]).all():
        return None
    known = maps[fits[0]]
    if isinstance(plain, Sketch) and known.dim not in plain.rows:
        return None
    return known if coded.is_multiple(plain, codes, known) else None


def _is_mixed(before: Array, after: Array) -> bool:
    """Whether entries are no power of two times as much: several samples share them."""
    live = (before != 0) & np.isfinite(before) & np.isfinite(after)
    if not live.any():
        return False
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log2((after[live] / before[live]).astype(np.float64))
        mixed = ~(np.abs(2 ** (ratio - np.round(ratio)) - 1) < 1e-4)
    return bool(mixed.mean() >= MIXED)


def _estimated(plain: Sketch, coded: Sketch, codes: Codes) -> Judgement:
    if plain.is_zero:
        return Silent(), False
    if plain.shape != coded.shape:
        return Unknown("its shape changes from pass to pass"), True
    possible = list(candidates(plain.shape, codes.samples))
    fits = [known for known in possible if _agrees(plain, coded, known, codes)]
    if fits:
        return fits[0], len(fits) == 1 and _has_several(plain, fits[0], codes)
    if _is_mixed(plain.sample, coded.sample):
        return Shared(), True
    return Unknown(
        "its rows follow no dimension's order"
        if possible
        else f"no dimension of its output {plain.shape} holds them"
    ), True


def _has_several(plain: Sketch, known: Owned, codes: Codes) -> bool:
    """Whether rows of several samples have a gradient."""
    live = plain.norms[known.dim] > 0
    own = owners(known, plain.shape, codes.samples).to(live.device)[live]
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


def _mixed(seed: int, count: int) -> NDArray[np.uint64]:
    """Random numbers by SplitMix64, for which no generator has to be set up."""
    z = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed << 20)) * GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return found


def _step(entries: int) -> int:
    """Odd, so that a power of two in a shape hides no rows."""
    return max(1, entries // ENTRIES) | 1


def _sums(parts: Tensor) -> Tensor:
    """Random sums over dimensions 0 and 2 of three, the larger part of the work first."""
    before, size, after = parts.shape
    first, last = (random_weights(n, parts.device, parts.dtype) for n in (before, after))
    if after > 1:
        return first @ (parts.reshape(before * size, after) @ last).reshape(before, size)
    return last * (first @ parts.reshape(before, size))


def _array(tensor: Tensor) -> Array:
    if tensor.dtype == torch.float32 and tensor.is_cpu and not tensor.requires_grad:
        return tensor.numpy()
    found: Array = _wide(tensor).cpu().numpy()
    return found


def _wide(gradient: Tensor) -> Tensor:
    g = gradient.detach()
    return g if g.dtype == torch.float64 else g.float()


@lru_cache(maxsize=1024)
def random_weights(length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random weights of size about one."""
    generator = torch.Generator("cpu").manual_seed(length)
    return torch.randn(length, generator=generator, dtype=torch.float64, device="cpu").to(
        device, dtype
    )


def all_owned(maps: Sequence[SampleMap]) -> bool:
    """Whether each of several gradients tells the samples apart, but for those that are zero."""
    told = [known for known in maps if not isinstance(known, Silent)]
    return bool(told) and all(isinstance(known, Owned) for known in told)
