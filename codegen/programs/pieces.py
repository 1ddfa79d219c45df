"""Pieces: the parts of a network that a program computes in turn, where memory is limited."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Generic, Protocol, TypeVar

from tnconv.codegen.lowering.schedule import Schedule
from tnconv.codegen.programs.parts import Window
from tnconv.codegen.programs.source import Function, function, returned


class Part(Protocol):
    """What is called for a piece: a program."""

    @property
    def operands(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def schedule(self) -> Schedule: ...
    def functions(self, name: str) -> list[Function]: ...


P = TypeVar("P", bound=Part)


@dataclass(frozen=True)
class Piece:
    """One call of a part: where its result belongs, and what it reads of the operands."""

    part: int
    start: int
    stop: int
    windows: tuple[Window, ...]


@dataclass(frozen=True)
class Chunks(Generic[P]):
    """Pieces of one network: placed along dimension ``dim`` of the result, or added (None).

    A network that needs no chunks is one piece.
    """

    leg: str
    dim: int | None
    shape: tuple[int, ...]
    parts: tuple[P, ...]
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
            + item * copied(self.parts[piece.part].operands, piece.windows)
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


def copied(operands: Mapping[str, tuple[int, ...]], windows: Sequence[Window]) -> int:
    """Entries of the copies that pieces read where their parts of operands are not contiguous."""
    return sum(prod(operands[name]) for name in apart(operands, windows))


def apart(operands: Mapping[str, tuple[int, ...]], windows: Sequence[Window]) -> set[str]:
    """The operands whose parts are not contiguous, and are copied: plans assume contiguous ones."""
    return {name for name, dim, *_ in windows if prod(operands[name][:dim]) > 1}


def functions_of_chunks(
    name: str, chunks: Sequence[Chunks[P]], arguments: Mapping[str, str], several: bool
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


def _call(chunk: Chunks[P], piece: Piece, name: str, arguments: Mapping[str, str]) -> str:
    codes = []
    operands = chunk.parts[piece.part].operands
    scattered = apart(operands, piece.windows)
    for operand in operands:
        windows = {dim: (a, b) for which, dim, a, b in piece.windows if which == operand}
        slices = [
            f"{windows[dim][0]}:{windows[dim][1]}" if dim in windows else ":"
            for dim in range(max(windows, default=-1) + 1)
        ]
        part = arguments[operand] + (f"[{', '.join(slices)}]" if slices else "")
        codes.append(f"{part}.contiguous()" if operand in scattered else part)
    return f"{name}({', '.join(codes)})"


def _lines(chunk: Chunks[P], calls: Sequence[str], result: str) -> list[str]:
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
