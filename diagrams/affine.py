"""Legs, affine views of arrays, and patterns: the vocabulary of every diagram.

A *leg* is a named index. Linear forms ``Σ a·leg`` over legs describe two things: where an array is
read (`Axis`, `View`) and which leg values meet (`Pattern`).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import gcd, prod

Leg = str
Sizes = Mapping[Leg, int]
Terms = tuple[tuple[Leg, int], ...]


def linear(terms: Mapping[Leg, int] | Iterable[tuple[Leg, int]]) -> Terms:
    """The linear form ``Σ a·leg`` in normal form: sorted by leg, equal legs added, no zeros.

    >>> linear([("o", 2), ("k", 1), ("o", -2)])
    (('k', 1),)
    """
    total: dict[Leg, int] = {}
    for leg, a in terms.items() if isinstance(terms, Mapping) else terms:
        total[leg] = total.get(leg, 0) + a
    return tuple(sorted([term for term in total.items() if term[1]]))


def replace(terms: Terms, leg: Leg, by: Terms) -> Terms:
    """``terms`` with ``leg`` replaced by the linear form ``by``."""
    factor = dict(terms)[leg]
    return linear([*(t for t in terms if t[0] != leg), *((other, factor * a) for other, a in by)])


def reach(terms: Terms, sizes: Sizes) -> tuple[int, int]:
    """The least and the greatest value of ``Σ a·leg`` over ``0 <= leg < max(1, size)``."""
    low = high = 0
    for leg, a in terms:
        end = a * (sizes[leg] - 1) if sizes[leg] else 0
        if end < 0:
            low += end
        else:
            high += end
    return low, high


def divisor(terms: Terms) -> int:
    """The greatest common divisor of the coefficients; 0 for the empty form."""
    return gcd(*(a for _, a in terms))


def injective(terms: Terms, sizes: Sizes) -> bool:
    """Whether ``legs -> Σ a·leg`` takes different values at different points (sufficient test).

    Two legs (s·o + d·k, g = gcd(s, d)): exactly when s/g >= K or d/g >= O. More legs: when each
    coefficient exceeds what all smaller ones can reach together.
    """
    g = divisor(terms)
    if len(terms) == 2:
        (o, s), (k, d) = terms
        return abs(s) // g >= sizes[k] or abs(d) // g >= sizes[o]
    span = 0
    for leg, a in sorted(terms, key=lambda t: abs(t[1])):
        if abs(a) <= span:
            return False
        span += abs(a) * (sizes[leg] - 1)
    return True


@dataclass(frozen=True)
class Axis:
    """One array dimension of ``size``, read at ``offset + Σ a·leg``; zero outside ``[0, size)``."""

    size: int
    offset: int = 0
    terms: Terms = ()

    def __post_init__(self) -> None:
        if len(self.terms) > 1 or (self.terms and not self.terms[0][1]):
            object.__setattr__(self, "terms", linear(self.terms))

    def substitute(self, leg: Leg, offset: int, by: Terms) -> "Axis":
        """With ``offset`` plus the form ``by`` in the place of a leg."""
        factor = dict(self.terms).get(leg)
        if factor is None:
            return self
        return Axis(self.size, self.offset + factor * offset, replace(self.terms, leg, by))

    def plain(self, sizes: Sizes) -> Leg | None:
        """The leg that this axis *is*, position for position, if there is one."""
        if len(self.terms) == 1 and self.offset == 0:
            leg, a = self.terms[0]
            if a == 1 and sizes[leg] == self.size:
                return leg
        return None

    def overhang(self, sizes: Sizes) -> tuple[int, int]:
        """How far reading reaches below 0 and above ``size - 1``: the padding that it needs."""
        low, high = reach(self.terms, sizes)
        return max(0, -(self.offset + low)), max(0, self.offset + high - self.size + 1)


@dataclass(frozen=True)
class View:
    """``array.reshape(axis sizes)`` read through its axes, for an array of ``shape``.

    As the view of a result it means the adjoint: values are added into zeros where the axes point.
    Legs may repeat (diagonal).
    """

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]

    def __post_init__(self) -> None:
        if prod(self.shape) != prod([a.size for a in self.axes]):
            sizes = tuple(a.size for a in self.axes)
            raise ValueError(f"a view of shape {self.shape} cannot have axes of sizes {sizes}")

    @classmethod
    def of(cls, sizes: Sizes, *groups: Leg | tuple[Leg, ...]) -> "View":
        """A plain view: one array dimension per group of legs, the legs of a group flattened.

        >>> View.of({"n": 2, "g": 3, "c": 4}, "n", ("g", "c")).shape
        (2, 12)
        """
        legs = [(group,) if isinstance(group, str) else group for group in groups]
        return cls(
            tuple(prod(sizes[leg] for leg in group) for group in legs),
            tuple(Axis(sizes[leg], 0, ((leg, 1),)) for group in legs for leg in group),
        )

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.shape, self.axes))  # the planner looks views up over and over

    def __reduce__(self) -> tuple[object, ...]:
        return View, (self.shape, self.axes)  # hashes differ between processes

    @cached_property
    def legs(self) -> tuple[Leg, ...]:
        """The legs in order of first appearance."""
        return tuple(dict.fromkeys([leg for axis in self.axes for leg, _ in axis.terms]))

    def substitute(self, leg: Leg, offset: int, by: Terms) -> "View":
        """With ``offset`` plus the form ``by`` in the place of a leg."""
        if leg not in self.legs:
            return self
        return View(self.shape, tuple(axis.substitute(leg, offset, by) for axis in self.axes))

    def prepend(self, sizes: Sizes, legs: Iterable[Leg]) -> "View":
        """The view with one plain array dimension per leg in front."""
        front = View.of(sizes, *legs)
        return View(front.shape + self.shape, front.axes + self.axes)


@dataclass(frozen=True)
class Tensor:
    """A node: the operand ``name``, read through ``view``."""

    name: str
    view: View

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the operand."""
        return self.view.shape

    @property
    def legs(self) -> tuple[Leg, ...]:
        return self.view.legs

    def substitute(self, leg: Leg, offset: int, by: Terms) -> "Tensor":
        """With ``offset`` plus the form ``by`` in the place of a leg."""
        return self.read_through(self.view.substitute(leg, offset, by))

    def read_through(self, view: View) -> "Tensor":
        """The same operand, read through another view."""
        return self if view is self.view else dataclasses.replace(self, view=view)


@dataclass(frozen=True)
class Selection(Tensor):
    """A node ``S[r, i] = [index[r] = i]``: the positions of a leg that the operand ``name`` lists.

    The operand has shape ``(R,)`` and holds integers in ``[0, I)``. ``view`` reads the 0/1 matrix S
    of shape ``(R, I)`` that it stands for.

    >>> Selection.of("index", {"r": 2, "i": 5}, "r", "i").shape
    (2,)
    """

    @classmethod
    def of(cls, name: str, sizes: Sizes, r: Leg, i: Leg) -> "Selection":
        return cls(name, View.of(sizes, r, i))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view.shape[:1]


@dataclass(frozen=True)
class Pattern:
    """A node: 1 where ``Σ a·leg`` is one of ``values``, else 0.

    Kept in normal form: terms sorted, first coefficient positive, values ascending.
    """

    terms: Terms
    values: range

    def __post_init__(self) -> None:
        terms, values = linear(self.terms), self.values
        if values.step < 0:
            values = values[::-1]
        if terms and terms[0][1] < 0:
            terms = tuple((leg, -a) for leg, a in terms)
            values = range(-values[-1], 1 - values[0], values.step) if values else values
        object.__setattr__(self, "terms", terms)
        object.__setattr__(self, "values", values)

    @cached_property
    def legs(self) -> tuple[Leg, ...]:
        return tuple([leg for leg, _ in self.terms])

    @property
    def value(self) -> int | None:
        """The single value, if there is only one: then any leg is determined by the others."""
        return self.values[0] if len(self.values) == 1 else None

    def substitute(self, leg: Leg, offset: int, by: Terms) -> "Pattern":
        """With ``offset`` plus the form ``by`` in the place of a leg."""
        factor = dict(self.terms).get(leg)
        if factor is None:
            return self
        shift, v = -factor * offset, self.values
        values = range(v.start + shift, v.stop + shift, v.step)
        return Pattern(replace(self.terms, leg, by), values)


Node = Tensor | Pattern


def exactly(terms: Mapping[Leg, int] | Iterable[tuple[Leg, int]], value: int) -> Pattern:
    """``[Σ a·leg = value]``."""
    return Pattern(linear(terms), range(value, value + 1))


def index_pattern(k: Leg, o: Leg, i: Leg, stride: int, dilation: int, padding: int) -> Pattern:
    """``Π[k, o, i] = [i = s·o + d·k - p]``: which input a kernel tap touches at an output.

    Args:
        k: the leg of taps.
        o: the leg of outputs.
        i: the leg of inputs.
        stride: s.
        dilation: d.
        padding: p, on the left.
    """
    return exactly([(o, stride), (k, dilation), (i, -1)], padding)


def delta(i: Leg, j: Leg) -> Pattern:
    """``δ[i, j] = [i = j]``."""
    return exactly([(i, 1), (j, -1)], 0)


def mask(terms: Mapping[Leg, int] | Iterable[tuple[Leg, int]], offset: int, size: int) -> Pattern:
    """``[0 <= offset + Σ a·leg < size]``."""
    return Pattern(linear(terms), range(-offset, size - offset))


def fresh(leg: Leg, taken: Iterable[Leg]) -> Leg:
    """``leg`` with as many primes as it takes to be new.

    >>> fresh("k", {"k", "k'"})
    "k''"
    """
    taken = set(taken)
    while leg in taken:
        leg += "'"
    return leg
