"""Pairs of taps of one dimension, and which of them multiply the same pairs of positions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
    inputs: int

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
        return self._ordered if symmetric else self._every

    @cached_property
    def _ordered(self) -> list["Shared"]:
        return self._shared(symmetric=True)

    @cached_property
    def _every(self) -> list["Shared"]:
        return self._shared(symmetric=False)

    def _shared(self, symmetric: bool) -> list["Shared"]:
        found: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
        for k, other in product(range(self.taps), repeat=2):
            if k <= other or not symmetric:
                (u, r), (v, q) = (divmod(self.dilation * tap, self.stride) for tap in (k, other))
                found.setdefault((r, q, v - u), []).append((k, other))
        shared = []
        for (r, q, shift), pairs in found.items():
            starts = [self.dilation * k // self.stride for k, _ in pairs]
            alike = (r, q), shift, self.outputs, self._filled(r, q, shift)
            if starts[-1] - starts[0] < self.outputs:
                shared.append(Shared(*alike, tuple(pairs), tuple(starts)))
            else:
                shared += [
                    Shared(*alike, (pair,), (start,))
                    for pair, start in zip(pairs, starts, strict=True)
                ]
        return shared

    def _filled(self, phase: int, other: int, shift: int) -> range:
        """The positions of one phase, and those of the other by a shift, that are no padding."""
        both = [
            range(-((r - low) // self.stride) - moved, -((r - high) // self.stride) - moved)
            for r, moved in ((phase, 0), (other, shift))
            for low, high in ((self.padding, self.padding + self.inputs),)
        ]
        return range(max(each.start for each in both), min(each.stop for each in both))


@dataclass(frozen=True)
class Shared:
    """Pairs that multiply position t of one phase by position t + shift of another.

    Their windows of ``outputs`` positions begin at ``starts``, which ascend. Other than at the
    ``filled`` positions one of both is zero.
    """

    phases: tuple[int, int]
    shift: int
    outputs: int
    filled: range
    pairs: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]

    @property
    def core(self) -> tuple[int, int]:
        """Start and length of what all windows have in common."""
        return self.starts[-1], self.starts[0] + self.outputs - self.starts[-1]

    @cached_property
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
    def whole(self) -> "Shared":
        """The one window that all windows together are."""
        every = range(self.starts[0], self.starts[-1] + self.outputs)
        some = range(max(every.start, self.filled.start), min(every.stop, self.filled.stop))
        window = some or every
        return replace(self, outputs=len(window), pairs=self.pairs[:1], starts=(window.start,))

    @cached_property
    def leaner(self) -> bool:
        """Whether windows have less that is not zero beside them than beyond the core."""
        return sum(length for _, length in self.others) < sum(length for _, length in self.strips)

    @cached_property
    def others(self) -> list[tuple[int, int]]:
        """Start and length of what some windows have and each has not, as `strips`.

        Of padding no more than makes it as much for each.
        """
        low, high = self.starts[0], self.starts[-1] + self.outputs
        missed = [[*range(low, start), *range(start + self.outputs, high)] for start in self.starts]
        most = max(sum(at in self.filled for at in some) for some in missed)
        kept = [sorted(some, key=lambda at: at not in self.filled)[:most] for some in missed]
        return [run for some in kept for run in _runs(sorted(some))]


def _runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Start and length of the runs of successive positions."""
    found: list[tuple[int, int]] = []
    for at in positions:
        start, length = found[-1] if found else (at, 0)
        if at == start + length:
            found[-1:] = [(start, length + 1)]
        else:
            found.append((at, 1))
    return found
