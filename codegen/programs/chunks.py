"""Chunks: a network in pieces over one leg, computed in turn, where memory is limited."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

from tnconv.codegen.programs.parts import Window, narrowed, outermost, read_only_what_is_needed
from tnconv.codegen.programs.source import Function, function, returned
from tnconv.diagrams.affine import Leg
from tnconv.diagrams.expression import Expression
from tnconv.diagrams.network import TensorNetwork

if TYPE_CHECKING:
    from tnconv.codegen.programs.program import Program

MOST_PIECES = 64
Build = Callable[[Expression, int], "Program"]
"""Compile a network for a memory limit, or as lean as it can be."""


@dataclass(frozen=True)
class Piece:
    """One call of a part: where its result belongs, and what it reads of the operands."""

    part: int
    start: int
    stop: int
    windows: tuple[Window, ...]


@dataclass(frozen=True)
class Chunks:
    """Pieces of one network: placed along dimension ``dim`` of the result, or added (None).

    A network that needs no chunks is one piece.
    """

    leg: str
    dim: int | None
    shape: tuple[int, ...]
    parts: tuple["Program", ...]
    pieces: tuple[Piece, ...]

    def calls_of(self, part: int) -> int:
        return sum(piece.part == part for piece in self.pieces)

    @property
    def seconds(self) -> float:
        return sum(self.parts[piece.part].schedule.seconds for piece in self.pieces)

    def peak(self, item: int) -> tuple[int, int]:
        """The most bytes held at a time, and those of the result."""
        result = item * prod(self.shape)
        most = max(
            self.parts[piece.part].schedule.peak(item)
            + item * _copied(self.parts[piece.part].operands, piece.windows)
            for piece in self.pieces
        )
        if len(self.pieces) == 1:
            return most, result
        return result + (most if self.dim is not None else max(most, 2 * result)), result

    def __str__(self) -> str:
        if len(self.pieces) == 1:
            return "in one piece"
        how = "added" if self.dim is None else f"placed along dimension {self.dim}"
        return f"{len(self.pieces)} chunks over leg {self.leg}, {how}"


def _copied(operands: Mapping[str, tuple[int, ...]], windows: Sequence[Window]) -> int:
    """Entries of the parts of operands that are not contiguous: pieces read copies of them."""
    return sum(prod(operands[name]) for name in _apart(operands, windows))


def _apart(operands: Mapping[str, tuple[int, ...]], windows: Sequence[Window]) -> set[str]:
    """The operands whose parts are not contiguous, which pieces are planned for."""
    return {name for name, dim, *_ in windows if prod(operands[name][:dim]) > 1}


def whole(program: "Program") -> Chunks:
    """A network in one piece."""
    piece = Piece(0, 0, 0, ())
    return Chunks("", None, program.networks[0].shape, (program,), (piece,))


def chunked(network: Expression, limit: int, item: int, build: Build) -> Chunks:
    """The fastest chunks that stay below the limit, or the leanest.

    Legs are compared by a piece from the middle: only for the chosen one all pieces are compiled.
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
    """Result dimensions with the outermost leg there of each term, then summed legs (None)."""
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
    """To cut a network along a leg of each term; pieces may hold ``limit`` bytes."""

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
        """Numbers of pieces to try, few first."""
        most = min(self.size, MOST_PIECES)
        return [*(n for at in range(1, 10) if (n := 2**at) < most), most]

    def floor(self, count: int) -> int:
        """Bytes that pieces like the one in the middle hold at least."""
        part, windows = self._middle(count)
        result = prod(self.network.shape)
        own = prod(part.shape) + _copied(part.operands, windows)
        return self.item * (result + (own if self.dim is not None else max(own, 2 * result)))

    def leanest(self) -> tuple[int, int]:
        """The peak and number of the finest pieces, or of larger ones while those hold less.

        Kernels that pad few channels to whole vectors hold more the fewer there are.
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

    def sketch(self, count: int) -> Chunks:
        """All pieces as if they were like the one in the middle."""
        part, windows = self._middle(count)
        program = self._built(part, windows)
        pieces = (Piece(0, 0, 0, windows),) * count
        return Chunks(self.legs[0], self.dim, self.network.shape, (program,), pieces)

    def _middle(self, count: int) -> tuple[Expression, tuple[Window, ...]]:
        return self._part(*self._bounds(count)[count // 2])

    def chunks(self, count: int) -> Chunks:
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

    def _built(self, part: Expression, windows: Sequence[Window]) -> "Program":
        return self.build(part, self.limit - self.item * _copied(part.operands, windows))

    def _bounds(self, count: int) -> list[tuple[int, int]]:
        return list(pairwise(self.size * at // count for at in range(count + 1)))

    def _part(self, start: int, stop: int) -> tuple[Expression, tuple[Window, ...]]:
        terms = [
            narrowed(term, leg, start, stop - start, self.dim is not None)
            for term, leg in zip(self.network.terms, self.legs, strict=True)
        ]
        return read_only_what_is_needed(terms)


def functions(
    name: str, chunks: Sequence[Chunks], arguments: Mapping[str, str], several: bool
) -> list[Function]:
    """A function that runs the chunks of each network in turn, and those of its parts."""
    texts: list[Function] = []
    body: list[str] = []
    results = []
    for number, chunk in enumerate(chunks, 1):
        mark = f"_{number}" if len(chunks) > 1 else ""
        names: dict[int, str] = {}
        for part in chunk.parts:
            names[len(names)] = f"piece_{len(texts) + 1}"
            texts += part.functions(f"piece_{len(texts) + 1}")
        calls = [_call(chunk, piece, names[piece.part], arguments) for piece in chunk.pieces]
        body += _lines(chunk, calls, f"result{mark}")
        results.append(f"result{mark}")
    body.append(returned(results, several))
    return [*texts, Function(function(name, arguments.values(), body))]


def _call(chunk: Chunks, piece: Piece, name: str, arguments: Mapping[str, str]) -> str:
    codes = []
    operands = chunk.parts[piece.part].operands
    apart = _apart(operands, piece.windows)
    for operand in operands:
        windows = {dim: (a, b) for which, dim, a, b in piece.windows if which == operand}
        slices = [
            f"{windows[dim][0]}:{windows[dim][1]}" if dim in windows else ":"
            for dim in range(max(windows, default=-1) + 1)
        ]
        part = arguments[operand] + (f"[{', '.join(slices)}]" if slices else "")
        codes.append(f"{part}.contiguous()" if operand in apart else part)
    return f"{name}({', '.join(codes)})"


def _lines(chunk: Chunks, calls: Sequence[str], result: str) -> list[str]:
    first, *others = calls
    if not others:
        return [f"{result} = {first}"]
    if chunk.dim is None:
        return [f"{result} = {first}", *(f"{result} = {result} + {call}" for call in others)]
    before = ":, " * chunk.dim
    lines = [f"part = {first}", f"{result} = part.new_empty({chunk.shape})  # {chunk}"]
    lines += [
        f"{result}[{before}{piece.start}:{piece.stop}] = {call}"
        for piece, call in zip(chunk.pieces, ["part", *others], strict=True)
    ]
    lines.insert(3, "del part")
    return lines
