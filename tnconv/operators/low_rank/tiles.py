"""Gram networks in tiles over the samples of both sides.

Of a symmetric Gram matrix only tiles on and above the diagonal are computed. Small tiles hold
little at a time: intermediate results of an order that relates all samples grow with both sides.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from torch import Tensor

from tnconv.codegen import Program
from tnconv.codegen.programs.parts import Window, read_only_what_is_needed
from tnconv.codegen.programs.pieces import copied
from tnconv.diagrams import Expression, TensorNetwork

Span = tuple[int, int]
OTHER = "other_"


@dataclass(frozen=True)
class Tile:
    """Samples of the rows and of the columns, and what their products read of the operands."""

    program: int
    rows: Span
    columns: Span
    windows: tuple[Window, ...]


@dataclass(frozen=True)
class Tiled:
    """A Gram matrix ``(m, n, m', n')`` or ``(n, n')``, tile by tile.

    Args:
        operands: The operands' shapes, in the order of a call.
        shape: The result's.
        mirrored: Both sides are one batch: operands of the other side are those of the first.
        programs: What the tiles are computed by; many have the same.
        tiles: Which samples they are of.
    """

    operands: Mapping[str, tuple[int, ...]]
    shape: tuple[int, ...]
    mirrored: bool
    programs: tuple[Program, ...]
    tiles: tuple[Tile, ...]

    @property
    def seconds(self) -> float:
        return sum(self.programs[tile.program].seconds for tile in self.tiles)

    def peak(self, item: int) -> int:
        """Bytes of items of a size that are held at most, with the result."""
        parts = ((self.programs[tile.program], tile.windows) for tile in self.tiles)
        most = max(p.schedule.peak(item) + item * copied(p.operands, w) for p, w in parts)
        return item * prod(self.shape) + most

    def run(self, *given: Tensor) -> Tensor:
        """The Gram matrix, from the operands by position."""
        named = dict(zip(self.operands, given, strict=True))
        result = given[0].new_empty(self.shape)
        for tile in self.tiles:
            program = self.programs[tile.program]
            part = program.run(*[self._read(named, tile, name) for name in program.operands])
            self._put(result, part, tile)
        return result

    def _read(self, named: Mapping[str, Tensor], tile: Tile, name: str) -> Tensor:
        array = named[name.removeprefix(OTHER) if self.mirrored else name]
        for which, dim, start, stop in tile.windows:
            if which == name:
                array = array.narrow(dim, start, stop - start)
        return array.contiguous()

    def _put(self, result: Tensor, part: Tensor, tile: Tile) -> None:
        half = len(self.shape) // 2
        stop, (first, last) = tile.rows[1], tile.columns
        _block(result, half, tile.rows, tile.columns).copy_(part)
        if self.mirrored and last > stop:
            rest = part.narrow(-1, max(0, stop - first), last - max(first, stop))
            turned = rest.permute(*range(half, 2 * half), *range(half))
            _block(result, half, (max(first, stop), last), tile.rows).copy_(turned)


def _block(result: Tensor, half: int, rows: Span, columns: Span) -> Tensor:
    part = result.narrow(half - 1, rows[0], rows[1] - rows[0])
    return part.narrow(-1, columns[0], columns[1] - columns[0])


def tiled(
    network: TensorNetwork,
    mirrored: bool,
    spans: Sequence[tuple[Span, Span]],
    build: Callable[[Expression], Program],
) -> Tiled:
    """The tiles of a Gram network between two batches, or of one with itself.

    Args:
        network: `tnconv.diagrams.ntk_block`; of one batch if it is mirrored.
        mirrored: Whether both sides are that one batch.
        spans: The samples of each tile's rows and columns.
        build: A compiler.
    """
    programs: dict[Expression, Program] = {}
    tiles = []
    for rows, columns in spans:
        part, windows = _part(network, rows, columns)
        if part not in programs:
            programs[part] = build(part)
        tiles.append(Tile(list(programs).index(part), rows, columns, windows))
    given = network.operands.items()
    own = {name: shape for name, shape in given if not (mirrored and name.startswith(OTHER))}
    return Tiled(own, network.shape, mirrored, tuple(programs.values()), tuple(tiles))


def _part(
    network: TensorNetwork, rows: Span, columns: Span
) -> tuple[Expression, tuple[Window, ...]]:
    half = len(network.shape) // 2
    legs = [axis.plain(network.sizes) for axis in network.result.axes]
    for leg, (start, stop) in ((legs[half - 1], rows), (legs[-1], columns)):
        if leg is not None:  # one sample has none
            network = network.narrow(leg, start, stop - start)
    return read_only_what_is_needed([network])


def samples_of(network: TensorNetwork) -> tuple[int, int]:
    """How many there are on both sides."""
    return network.shape[len(network.shape) // 2 - 1], network.shape[-1]


def block_rows(samples: int, count: int) -> list[tuple[Span, Span]]:
    """The upper triangle in so many block rows, each up to the last column."""
    return [(rows, (rows[0], samples)) for rows in _spans(samples, count)]


def squares(rows: int, columns: int, count: int, mirrored: bool) -> list[tuple[Span, Span]]:
    """So many tiles along each side; of a mirrored matrix those from the diagonal on."""
    return [
        (a, b)
        for a in _spans(rows, count)
        for b in _spans(columns, count)
        if not mirrored or b[0] >= a[0]
    ]


def _spans(samples: int, count: int) -> Iterator[Span]:
    count = min(samples, count)
    return pairwise(samples * at // count for at in range(count + 1))
