"""Families of matrices that consist of blocks: rows and columns are cut into the same intervals.

A block is zero, full, or itself block diagonal (in as many pieces as it has rows: diagonal). Of
most, ``Π(Sᵀ M S)`` of a symmetric matrix M needs no more of M than their own blocks (`sufficient`).
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from tnconv import diagrams
from tnconv.diagrams import Axis, Sum, TensorNetwork, View
from tnconv.optim.structures.structure import Structure, wide

Place = tuple[int, int]
"""The interval of rows, and that of columns, of a block."""
Blocks = dict[Place, Tensor]
"""Blocks by place, each (..., pieces, rows, columns) of a piece."""


@dataclass(frozen=True)
class Grid(Structure):
    """Matrices of blocks: a subclass names the `intervals`, and the `pieces` of each block."""

    @property
    @abstractmethod
    def intervals(self) -> tuple[int, ...]:
        """The number of rows in each interval."""

    @property
    @abstractmethod
    def pieces(self) -> Mapping[Place, int]:
        """Of each block that is not zero, the number of equal blocks on its diagonal."""

    @cached_property
    def shapes(self) -> dict[Place, tuple[int, int, int]]:
        """``(pieces, rows, columns)`` of each block, without those that are empty."""
        sizes = self.intervals
        return {
            (i, j): (count, sizes[i] // count, sizes[j] // count)
            for (i, j), count in self.pieces.items()
            if sizes[i] and sizes[j]
        }

    @cached_property
    def count(self) -> int:
        """The number of parameters."""
        return sum(p * r * c for p, r, c in self.shapes.values())

    def diagram(self) -> Sum:
        """One term for each block, which reads its own part of the parameters."""
        starts = [0, *accumulate(self.intervals)]
        terms, at = [], 0
        for (i, j), (p, r, c) in self.shapes.items():
            sizes = {"p": p, "r": r, "c": c}
            read = Axis(self.count, at, (("p", r * c), ("r", c), ("c", 1)))
            rows = Axis(self.size, starts[i], (("p", r), ("r", 1)))
            columns = Axis(self.size, starts[j], (("p", c), ("c", 1)))
            node = diagrams.Tensor("parameters", View((self.count,), (read,)))
            result = View((self.size, self.size), (rows, columns))
            terms.append(TensorNetwork((node,), result, sizes))
            at += p * r * c
        return Sum(tuple(terms))

    @cached_property
    def sufficient(self) -> bool:
        """Whether no product meets a block of M that is not kept, or kept in pieces only."""
        kept = self.shapes.keys()
        return all(
            ((k, n) in kept or (n, k) in kept)
            and (self.shapes.get((k, n), (1,))[0] == 1 or i == j == k)
            for i, j in kept
            for k in (k for k, at in kept if at == i)
            for n in (n for n, at in kept if at == j)
        )

    def blocks(self, member: Tensor) -> Blocks:
        """The blocks of a member, views of it where that is contiguous."""
        if len(self.shapes) == 1:
            ((place, shape),) = self.shapes.items()
            return {place: torch.unflatten(member, -1, shape)}
        sizes = [p * r * c for p, r, c in self.shapes.values()]
        parts = torch.split(member, sizes, -1)
        return {
            place: torch.unflatten(part, -1, shape)
            for (place, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def member(self, blocks: Mapping[Place, Tensor]) -> Tensor:
        """The inverse of `blocks`."""
        flat = [blocks[place].flatten(-3) for place in self.shapes]
        return flat[0] if len(flat) == 1 else torch.cat(flat, -1)

    def trace(self, member: Tensor) -> Tensor:
        """``tr S``, (...)."""
        found = [
            block.diagonal(dim1=-2, dim2=-1).sum((-2, -1))
            for (i, j), block in self.blocks(member).items()
            if i == j
        ]
        return torch.stack(found).sum(0)

    def matmat(self, member: Tensor, x: Tensor) -> Tensor:
        """``S X`` for x of shape (..., size, columns)."""
        return self._applied(self.blocks(member.to(wide(member))), x).to(member.dtype)

    def rmatmat(self, member: Tensor, x: Tensor) -> Tensor:
        """``Sᵀ X`` for x of shape (..., size, columns)."""
        blocks = self.blocks(member.to(wide(member)))
        turned = {(j, i): block.mT for (i, j), block in blocks.items()}
        return self._applied(turned, x).to(member.dtype)

    def inner_products(self, y: Tensor, z: Tensor | None = None) -> Tensor:
        """``⟨Y Zᵀ, E[e]⟩`` for Y and Z of shape (..., size, columns), Z = Y by default."""
        given = [each.to(wide(each)) for each in ((y,) if z is None else (y, z))]
        rows, columns = (
            torch.split(each, list(self.intervals), -2) for each in (given[0], given[-1])
        )
        found = {
            (i, j): _restricted(rows[i].unsqueeze(-3), columns[j].unsqueeze(-3).mT, p)
            for (i, j), (p, _, _) in self.shapes.items()
        }
        return self.member(found).to(y.dtype)

    def taken(self, matrix: Tensor) -> Tensor:
        """``⟨M, E[e]⟩`` of a matrix (..., size, size)."""
        ends = [0, *accumulate(self.intervals)]
        found = {}
        for (i, j), (p, r, c) in self.shapes.items():
            block = matrix[..., ends[i] : ends[i + 1], ends[j] : ends[j + 1]]
            if p == 1:
                found[i, j] = block.unsqueeze(-3)
            else:
                cut = torch.unflatten(torch.unflatten(block, -1, (p, c)), -3, (p, r))
                found[i, j] = cut.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        return self.member(found)

    def product(self, first: Tensor, second: Tensor) -> Tensor:
        """The member ``S T``."""
        s, t = (self.blocks(each.to(wide(each))) for each in (first, second))
        found = {
            (i, j): _sum(_multiplied(s[i, k], t[k, j], p) for k in self._between(s, t, i, j))
            for (i, j), (p, _, _) in self.shapes.items()
        }
        return self.member(found).to(first.dtype)

    def inner(self, member: Tensor, x: Tensor | None = None) -> Tensor:
        """``Π(Sᵀ X Xᵀ S)`` for x of shape (..., size, columns), or ``Π(Sᵀ S)``."""
        if x is not None:
            return self.inner_products(self.rmatmat(member, x)) / self.weights(member)
        s = self.blocks(member.to(wide(member)))
        turned = {(j, i): block.mT for (i, j), block in s.items()}
        found = {
            (i, j): _sum(
                _multiplied(turned[i, k], s[k, j], p) for k in self._between(turned, s, i, j)
            )
            for (i, j), (p, _, _) in self.shapes.items()
        }
        return (self.member(found) / self.weights(member)).to(member.dtype)

    def congruence(self, member: Tensor, entries: Tensor) -> Tensor:
        """``Π(Sᵀ M S)`` of a symmetric matrix M, from its inner products ``⟨M, E[e]⟩``."""
        if not self.sufficient:
            return super().congruence(member, entries)
        s, half = (self.blocks(each.to(wide(each))) for each in (member, entries))
        turned = {(j, i): block.mT for (i, j), block in s.items()}
        m = {(j, i): block.mT for (i, j), block in half.items()} | half
        found = {}
        for (i, j), (p, _, _) in self.shapes.items():
            parts = []
            for k in (k for k in range(len(self.intervals)) if (i, k) in turned):
                inside = p if turned[i, k].shape[-3] == p else 1
                right = (_multiplied(m[k, n], s[n, j], inside) for n in self._between(m, s, k, j))
                parts.append(_multiplied(turned[i, k], _sum(right), p))
            found[i, j] = _sum(parts)
        return (self.member(found) / self.weights(member)).to(member.dtype)

    def constants(self) -> dict[str, Tensor]:
        """What `Structure` finds column by column, block by block: w is 1/2 off the diagonal."""
        names = ("identity", "weights")
        each: dict[str, list[Tensor]] = {name: [] for name in names}
        for (i, j), (p, r, c) in self.shapes.items():
            ones = torch.ones(p, r, c, dtype=torch.float64)
            alone = i != j and (j, i) not in self.shapes
            each["weights"].append((ones / 2 if alone else ones).flatten())
            each["identity"].append(
                (torch.eye(r).expand(p, r, c) if i == j else 0 * ones).flatten()
            )
        found = {name: torch.cat(each[name]).double() for name in names}
        return found | {"multiplicities": torch.ones_like(found["weights"])}

    def _between(
        self, s: Mapping[Place, Tensor], t: Mapping[Place, Tensor], i: int, j: int
    ) -> Iterator[int]:
        """The intervals over which a product of two matrices of blocks is summed."""
        return (k for k in range(len(self.intervals)) if (i, k) in s and (k, j) in t)

    def _applied(self, blocks: Mapping[Place, Tensor], x: Tensor) -> Tensor:
        if len(blocks) == 1 and len(self.shapes) == 1:
            return _times(next(iter(blocks.values())), x.to(wide(x)))
        parts = torch.split(x.to(wide(x)), list(self.intervals), -2)
        rows = []
        for i, part in enumerate(parts):
            own = [_times(b, parts[j]) for (at, j), b in blocks.items() if at == i]
            rows.append(_sum(own) if own else torch.zeros_like(part))
        return torch.cat(rows, -2)


def _times(
    block: Tensor,  # (..., p, r, c)
    x: Tensor,  # (..., p·c, q)
) -> Tensor:
    p, r, c = block.shape[-3:]
    if r == c == 1:
        return block.flatten(-3).unsqueeze(-1) * x
    if p == 1:
        return block.squeeze(-3) @ x
    return (block @ torch.unflatten(x, -2, (p, c))).flatten(-3, -2)


def _multiplied(
    left: Tensor,  # (..., p, r, c)
    right: Tensor,
    pieces: int,
) -> Tensor:
    """The product, or only so many pieces on its diagonal."""
    p, q = left.shape[-3], right.shape[-3]
    if p == q and p in (1, pieces):
        if pieces != p:
            return _restricted(left, right, pieces)
        return left * right if left.shape[-2:] == right.shape[-2:] == (1, 1) else left @ right
    if q == 1:
        return _times(left, right.squeeze(-3)).unsqueeze(-3)
    return _times(right.mT, left.squeeze(-3).mT).mT.unsqueeze(-3)


def _restricted(
    left: Tensor,  # (..., 1, p·r, q)
    right: Tensor,  # (..., 1, q, p·c)
    pieces: int,
) -> Tensor:
    """The blocks on the diagonal of a product: (..., p, r, c)."""
    if pieces == 1:
        return left @ right
    rows = torch.unflatten(left.squeeze(-3), -2, (pieces, -1))
    columns = torch.unflatten(right.squeeze(-3).mT, -2, (pieces, -1))
    if rows.shape[-2] == columns.shape[-2] == 1:
        return (rows * columns).sum(-1, keepdim=True)
    return rows @ columns.mT


def _sum(parts: Iterator[Tensor] | list[Tensor]) -> Tensor:
    first, *others = parts
    for other in others:
        first = first + other
    return first


@dataclass(frozen=True)
class Dense(Grid):
    """All matrices: Π is the identity.

    >>> Dense(4).count
    16
    """

    @property
    def intervals(self) -> tuple[int, ...]:
        return (self.size,)

    @property
    def pieces(self) -> Mapping[Place, int]:
        return {(0, 0): 1}

    def constants(self) -> dict[str, Tensor]:
        one = torch.ones(1, dtype=torch.float64)
        unit = torch.eye(self.size, dtype=torch.float64).flatten()
        return {"weights": one, "multiplicities": one, "identity": unit}


@dataclass(frozen=True)
class Diagonal(Grid):
    """Diagonal matrices.

    >>> Diagonal(4).count
    4
    """

    @property
    def intervals(self) -> tuple[int, ...]:
        return (self.size,)

    @property
    def pieces(self) -> Mapping[Place, int]:
        return {(0, 0): self.size}


@dataclass(frozen=True)
class BlockDiagonal(Grid):
    """Blocks of ``block`` rows on the diagonal, and a last one of the rows that are left.

    >>> BlockDiagonal(7, block=3).count
    19
    """

    block: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("block", self.block, 1)

    @property
    def intervals(self) -> tuple[int, ...]:
        rest = self.size % self.block
        return self.size - rest, rest

    @property
    def pieces(self) -> Mapping[Place, int]:
        return {(0, 0): max(1, self.size // self.block), (1, 1): 1}


@dataclass(frozen=True)
class Hierarchical(Grid):
    """``[[A, B, B'], [0, C, 0], [0, D, E]]`` with C diagonal: ``first`` rows A, ``last`` rows E.

    Where d is at most ``first + last``, there is no C.

    >>> Hierarchical(10, first=2, last=3).count
    49
    """

    first: int = 16
    last: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("first", self.first, 0)
        _at_least("last", self.last, 0)

    @property
    def intervals(self) -> tuple[int, ...]:
        first = min(self.first, self.size)
        last = min(self.last, self.size - first)
        return first, self.size - first - last, last

    @property
    def pieces(self) -> Mapping[Place, int]:
        middle = max(1, self.intervals[1])
        return {(0, 0): 1, (0, 1): 1, (0, 2): 1, (1, 1): middle, (2, 1): 1, (2, 2): 1}


@dataclass(frozen=True)
class RankTriangular(Grid):
    """A diagonal and ``rank`` rows or columns: ``[[D, 0], [B, A]]``, with D diagonal.

    >>> RankTriangular(10, rank=2).count
    28

    Args:
        size: the number of rows and columns, d.
        rank: the number of rows in A.
        diagonal: where D is, "top_left" or "bottom_right".
        upper: B is above the diagonal.
    """

    rank: int = 1
    diagonal: str = "top_left"
    upper: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("rank", self.rank, 0)
        if self.diagonal not in ("top_left", "bottom_right"):
            raise ValueError(
                f"diagonal is {self.diagonal!r}; expected 'top_left' or 'bottom_right'"
            )

    @property
    def intervals(self) -> tuple[int, ...]:
        rank = min(self.rank, self.size)
        parts = self.size - rank, rank
        return parts if self.diagonal == "top_left" else parts[::-1]

    @property
    def pieces(self) -> Mapping[Place, int]:
        at = 0 if self.diagonal == "top_left" else 1
        strip = (0, 1) if self.upper else (1, 0)
        return {(at, at): max(1, self.intervals[at]), strip: 1, (1 - at, 1 - at): 1}


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; expected at least {least}")
