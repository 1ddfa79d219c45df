"""Pairs of taps of one dimension, and which of them multiply the same pairs of positions."""

from dataclasses import dataclass
from itertools import product

from tnconv.diagrams.affine import Leg


@dataclass(frozen=True)
class Dimension:
    """``i = s·o + d·k - p`` in two halves, which share o: the patterns, their legs and numbers."""

    at: tuple[int, int]
    i: tuple[Leg, Leg]
    k: tuple[Leg, Leg]
    outputs: int
    taps: int
    stride: int
    dilation: int
    padding: int

    @property
    def span(self) -> int:
        """How many padded inputs the windows span: from where they start, i = s·o + d·k."""
        return (self.outputs - 1) * self.stride + (self.taps - 1) * self.dilation + 1

    @property
    def furthest(self) -> int:
        """How many positions of a phase the last tap's window is after the first one's."""
        return self.dilation * (self.taps - 1) // self.stride

    def pairs(self, symmetric: bool) -> list["Shared"]:
        """All pairs (k, k'), of two equal halves those with k <= k', by what they share.

        With d·k = s·u + r, tap k reads position o + u of phase r, that is of every s-th input from
        the r-th on. So pairs of equal phases and equal difference u' - u share their products.
        """
        found: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
        for k, other in product(range(self.taps), repeat=2):
            if k <= other or not symmetric:
                (u, r), (v, q) = (divmod(self.dilation * tap, self.stride) for tap in (k, other))
                found.setdefault((r, q, v - u), []).append((k, other))
        shared = []
        for (r, q, shift), pairs in found.items():
            starts = [self.dilation * k // self.stride for k, _ in pairs]
            if starts[-1] - starts[0] < self.outputs:
                shared.append(Shared((r, q), shift, self.outputs, tuple(pairs), tuple(starts)))
            else:
                shared += [
                    Shared((r, q), shift, self.outputs, (pair,), (start,))
                    for pair, start in zip(pairs, starts, strict=True)
                ]
        return shared


@dataclass(frozen=True)
class Shared:
    """Pairs that multiply position t of one phase by position t + shift of another.

    Their windows of ``outputs`` positions begin at ``starts``, which ascend.
    """

    phases: tuple[int, int]
    shift: int
    outputs: int
    pairs: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]

    @property
    def core(self) -> tuple[int, int]:
        """Start and length of what all windows have in common."""
        return self.starts[-1], self.starts[0] + self.outputs - self.starts[-1]

    @property
    def strips(self) -> list[tuple[int, int]]:
        """Start and length of what each window has before and after the core; as much for each."""
        first, length = self.core
        parts = [
            part
            for start in self.starts
            for part in ((start, first - start), (first + length, start - self.starts[0]))
        ]
        return [(start, length) for start, length in parts if length]

    @property
    def others(self) -> list[tuple[int, int]]:
        """Start and length of what some windows have and each has not, as `strips`."""
        first, last = self.starts[0], self.starts[-1]
        parts = [
            part
            for start in self.starts
            for part in ((first, start - first), (start + self.outputs, last - start))
        ]
        return [(start, length) for start, length in parts if length]
