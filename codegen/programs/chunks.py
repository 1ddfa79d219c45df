"""Chunks: a network in pieces over one leg, computed in turn, where memory is limited."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from tnconv.codegen.programs.parts import Window, narrowed, outermost, read_only_what_is_needed
from tnconv.codegen.programs.pieces import Chunks, Piece, copied
from tnconv.codegen.programs.program import Program
from tnconv.diagrams.affine import Leg
from tnconv.diagrams.expression import Expression
from tnconv.diagrams.network import TensorNetwork

MOST_PIECES = 64  # of one network (0023)
Build = Callable[[Expression, int], Program]
"""From a network and a memory limit to its program, as lean as it can be if it does not fit."""


def whole(program: Program) -> Chunks[Program]:
    """A network as a single piece."""
    piece = Piece(0, 0, 0, ())
    return Chunks("", None, program.networks[0].shape, (program,), (piece,))


def chunked(network: Expression, limit: int, item: int, build: Build) -> Chunks[Program]:
    """The fastest chunks that stay below the limit, or the leanest.

    Legs are compared by the program of one piece, from the middle; the others are compiled for the
    chosen leg only.

    Args:
        network: The network.
        limit: The bytes that a call may hold.
        item: Bytes of an entry.
        build: The planner.
    """
    left = limit - item * prod(network.shape)
    ways = [_Way(network, dim, legs, left, item, build) for dim, legs in _legs(network)]
    ways.sort(key=lambda way: way.floor(way.counts[-1]))
    leanest: list[tuple[int, int, _Way]] = []
    for way in ways:
        bound = min((peak for peak, *_ in leanest), default=None)
        if bound is not None and way.floor(way.counts[-1]) > max(limit, bound):
            break
        leanest.append((*way.leanest(), way))
    fitting = [
        (way.sketch(count).seconds, count, most, way)
        for peak, most, way in leanest
        if peak <= limit
        for count in [way.fewest(limit, most)]
    ]
    for _, count, most, way in sorted(fitting, key=lambda found: found[0]):
        for number in dict.fromkeys((count, most)):
            if (chunks := way.chunks(number)).peak(item)[0] <= limit:
                return chunks
    if not leanest:
        return whole(build(network, limit))
    _, most, way = min(leanest, key=lambda found: found[0])
    return way.chunks(most)


def _legs(network: Expression) -> Iterator[tuple[int | None, tuple[Leg, ...]]]:
    """The ways to cut: a result dimension and its leg in each term; None and a summed leg."""
    for dim in range(len(network.shape)):
        found = [outermost(term.result, dim) for term in network.terms]
        legs = tuple(
            leg
            for term, axis in zip(network.terms, found, strict=True)
            if axis is not None and (leg := term.result.axes[axis].plain(term.sizes))
            if sum(leg == held for a in term.result.axes for held, _ in a.terms) == 1
        )
        sizes = {term.sizes[leg] for term, leg in zip(network.terms, legs, strict=False)}
        if len(legs) == len(network.terms) and len(sizes) == 1 and min(sizes) > 1:
            yield dim, legs
    if len(network.terms) == 1:
        (term,) = network.terms
        yield from ((None, (leg,)) for leg in term.sizes if _summed(term, leg))


def _summed(term: TensorNetwork, leg: Leg) -> bool:
    return leg not in term.open_legs and term.sizes[leg] > 1 and bool(term.holders[leg])


@dataclass(frozen=True)
class _Way:
    """A way to cut a network: along one leg in each term, into pieces of at most ``limit`` bytes.

    ``dim`` is the dimension of the result that is cut, None if the leg is summed.
    """

    network: Expression
    dim: int | None
    legs: tuple[Leg, ...]
    limit: int
    item: int
    build: Build

    @property
    def size(self) -> int:
        return self.network.terms[0].sizes[self.legs[0]]

    @property
    def counts(self) -> list[int]:
        """The numbers of pieces to try, in ascending order."""
        most = min(self.size, MOST_PIECES)
        return [*(n for at in range(1, 10) if (n := 2**at) < most), most]

    def floor(self, count: int) -> int:
        """A lower bound of the bytes that ``count`` pieces hold: results, and copied operands."""
        part, windows = self._middle(count)
        result = prod(self.network.shape)
        own = prod(part.shape) + copied(part.operands, windows)
        return self.item * (result + (own if self.dim is not None else max(own, 2 * result)))

    def leanest(self) -> tuple[int, int]:
        """The least peak, and its number of pieces: usually the finest.

        Coarser pieces can hold less, since kernels round few channels up to whole SIMD vectors.
        """
        finest, *others = reversed(self.counts)
        best = (self.sketch(finest).peak(self.item)[0], finest)
        for count in others:
            if self.floor(count) >= best[0]:
                break
            if (peak := self.sketch(count).peak(self.item)[0]) >= best[0]:
                break
            best = peak, count
        return best

    def fewest(self, limit: int, most: int) -> int:
        """The smallest number of pieces that stays below the limit, if ``most`` does."""
        return next(
            count
            for count in self.counts
            if count == most
            or (self.floor(count) <= limit and self.sketch(count).peak(self.item)[0] <= limit)
        )

    def sketch(self, count: int) -> Chunks[Program]:
        """The chunks as if all pieces were like the one in the middle."""
        part, windows = self._middle(count)
        program = self._built(part, windows)
        pieces = (Piece(0, 0, 0, windows),) * count
        return Chunks(self.legs[0], self.dim, self.network.shape, (program,), pieces)

    def _middle(self, count: int) -> tuple[Expression, tuple[Window, ...]]:
        return self._part(*self._bounds(count)[count // 2])

    def chunks(self, count: int) -> Chunks[Program]:
        unit = 1 if self.dim is None else self.network.shape[self.dim] // self.size
        parts: dict[Expression, Program] = {}
        pieces = []
        for start, stop in self._bounds(count):
            part, windows = self._part(start, stop)
            if part not in parts:
                parts[part] = self._built(part, windows)
            number = list(parts).index(part)
            pieces.append(Piece(number, unit * start, unit * stop, windows))
        programs = tuple(parts.values())
        return Chunks(self.legs[0], self.dim, self.network.shape, programs, tuple(pieces))

    def _built(self, part: Expression, windows: Sequence[Window]) -> Program:
        return self.build(part, self.limit - self.item * copied(part.operands, windows))

    def _bounds(self, count: int) -> list[tuple[int, int]]:
        return list(pairwise(self.size * at // count for at in range(count + 1)))

    def _part(self, start: int, stop: int) -> tuple[Expression, tuple[Window, ...]]:
        terms = [
            narrowed(term, leg, start, stop - start, self.dim is not None)
            for term, leg in zip(self.network.terms, self.legs, strict=True)
        ]
        return read_only_what_is_needed(terms)
