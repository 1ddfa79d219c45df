"""Two tensors that index patterns join, as torch's convolutions take them."""

from dataclasses import dataclass, field, replace
from itertools import islice
from math import prod
from typing import Literal

from tnconv.codegen.lowering.covers import Cover
from tnconv.codegen.lowering.values import Value
from tnconv.diagrams.affine import Leg, Pattern, Terms

MOST_DIMENSIONS = 3
Role = Literal["i of a", "i open"]
"""``"i of a"``: a holds i, b holds k. ``"i open"``: a holds k, b holds o."""


@dataclass(frozen=True)
class Joint:
    """One dimension: ``i = s·o + d·k - p`` with its legs, whoever holds them."""

    at: int
    i: Leg
    o: Leg
    k: Leg
    stride: int
    dilation: int
    padding: int

    def swapped(self) -> "Joint":
        """The same pattern with the roles of kernel and output exchanged."""
        return Joint(self.at, self.i, self.k, self.o, self.dilation, self.stride, self.padding)

    def mirrored(self, taps: int) -> "Joint":
        """Of unit stride, and a kernel in reverse, with the roles of input and output exchanged."""
        reach = (taps - 1) * self.dilation
        return Joint(self.at, self.o, self.i, self.k, 1, self.dilation, reach - self.padding)


@dataclass(frozen=True)
class Match:
    """Tensors ``a`` and ``b`` joined by patterns, and the roles of their other legs."""

    cover: Cover
    a: int
    b: int
    joints: tuple[Joint, ...]
    _values: dict[bool, "tuple[Cover, Value, Value, Roles]"] = field(
        default_factory=dict, compare=False, repr=False
    )
    """What `values` has returned, also for the same tensors in swapped roles."""

    @property
    def covered(self) -> tuple[int, ...]:
        return (self.a, self.b, *(joint.at for joint in self.joints))

    def size(self, *legs: Leg) -> int:
        return prod(self.cover.network.sizes[leg] for leg in legs)

    def sizes(self, name: str) -> list[int]:
        """The sizes of all joints' legs of one name: i, o or k."""
        return [self.size(getattr(joint, name)) for joint in self.joints]

    @property
    def swapped(self) -> "Match":
        """With the roles of kernel and output exchanged."""
        return replace(self, joints=tuple(joint.swapped() for joint in self.joints))

    @property
    def full(self) -> list[int]:
        """How many padded inputs the windows span: (O - 1)·s + (K - 1)·d + 1 per dimension."""
        return [
            (o - 1) * joint.stride + (k - 1) * joint.dilation + 1
            for joint, o, k in zip(self.joints, self.sizes("o"), self.sizes("k"), strict=True)
        ]

    @property
    def native_padding(self) -> list[int] | None:
        """The paddings with which torch's own size formula gives every output size, if it does."""
        for joint, full, i in zip(self.joints, self.full, self.sizes("i"), strict=True):
            rest = i + 2 * joint.padding - full
            if joint.padding < 0 or not 0 <= rest < joint.stride:
                return None
        return [joint.padding for joint in self.joints]

    def values(self, apart: bool = False) -> tuple[Cover, Value, Value, "Roles"]:
        """Both tensors as dense values without legs that only they hold, and the legs' roles.

        If ``apart``, all shared legs are kept, those that are to be summed as well.
        """
        if apart not in self._values:
            self._values[apart] = self._read(apart)
        return self._values[apart]

    def _read(self, apart: bool) -> tuple[Cover, Value, Value, "Roles"]:
        cover, a = self.cover.value(self.a)
        cover, b = cover.value(self.b)
        spatial = {leg for joint in self.joints for leg in (joint.i, joint.o, joint.k)}
        writer, dense = cover.writer, []
        for own, other in ((a, b), (b, a)):
            alone = [
                dim
                for dim, leg in enumerate(own.legs)
                if leg not in {*spatial, *other.legs} and not cover.needed(leg, *self.covered)
            ]
            writer, array = writer.sum(own.array, alone)
            legs = tuple(leg for dim, leg in enumerate(own.legs) if dim not in alone)
            dense.append(Value(array, legs))
        first, second = ([leg for leg in v.legs if leg not in spatial] for v in dense)
        shared = [leg for leg in first if leg in second]
        needed = [leg for leg in shared if apart or cover.needed(leg, *self.covered)]
        roles = Roles(
            tuple(needed),
            tuple(leg for leg in shared if leg not in needed),
            tuple(leg for leg in first if leg not in shared),
            tuple(leg for leg in second if leg not in shared),
        )
        return cover.after(writer), dense[0], dense[1], roles


@dataclass(frozen=True)
class Roles:
    """Legs beside the spatial ones: shared and kept, shared and summed, of a only, of b only."""

    group: tuple[Leg, ...]
    summed: tuple[Leg, ...]
    a: tuple[Leg, ...]
    b: tuple[Leg, ...]


def matched(cover: Cover, a: int, b: int, role: Role) -> Match | None:
    """Two tensors that up to three patterns join, the first uncovered one among them."""
    if cover.pattern is None or _joint(cover, cover.pattern, a, b, role) is None:
        return None
    found = (_joint(cover, at, a, b, role) for at, _ in cover.network.patterns)
    return Match(cover, a, b, tuple(islice(filter(None, found), MOST_DIMENSIONS)))


def _joint(cover: Cover, at: int, a: int, b: int, role: Role) -> Joint | None:
    tn, pattern = cover.network, cover.network.nodes[at]
    assert isinstance(pattern, Pattern)
    if len(pattern.terms) != 3 or (value := pattern.value) is None:
        return None
    terms: Terms = pattern.terms
    negative = [leg for leg, x in terms if x < 0]
    if len(negative) == 2:
        terms, value = tuple((leg, -x) for leg, x in terms), -value
        negative = [leg for leg, x in terms if x < 0]
    if len(negative) != 1 or (steps := dict(terms))[negative[0]] != -1:
        return None
    held = {leg: [p for p in tn.holders[leg] if p != at] for leg in pattern.legs}
    closed = {leg: held[leg][0] for leg in held if len(held[leg]) == 1 and leg not in tn.open_legs}
    of_a, of_b = ([leg for leg, p in closed.items() if p == which] for which in (a, b))
    if len(of_a) != 1 or len(of_b) != 1:
        return None
    (third,) = (leg for leg in pattern.legs if leg not in (of_a[0], of_b[0]))
    if a in held[third] or b in held[third]:
        return None
    i = negative[0]
    o, k = (third, of_b[0]) if role == "i of a" else (of_b[0], of_a[0])
    if i != (of_a[0] if role == "i of a" else third):
        return None
    return Joint(at, i, o, k, steps[o], steps[k], value)
