"""Triangular matrices, stored without their zeros.

The two triangles of a triangular matrix that is cut in the middle share one rectangle, as in
LAPACK's rectangular full packed format (Gustavson et al. 2010): with ``m = ⌈d/2⌉`` columns, and
``e = 1`` for even d, else 0, the rectangle has ``d + e`` rows, of which entry (r, c) is
``L[r - e, c]`` where ``r - e >= c``, and ``L[m + c - 1 + e, m + r]`` elsewhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tnconv import diagrams
from tnconv.diagrams import Axis, Sum, TensorNetwork, View
from tnconv.optim.structures.grids import Grid, Place
from tnconv.optim.structures.structure import Structure


@dataclass(frozen=True)
class Halves(Grid):
    """Matrices of 2 x 2 blocks, one of them zero."""

    upper: bool = False

    @property
    def intervals(self) -> tuple[int, ...]:
        return (self.size + 1) // 2, self.size // 2

    @property
    def pieces(self) -> Mapping[Place, int]:
        return {(0, 0): 1, (0, 1) if self.upper else (1, 0): 1, (1, 1): 1}


@dataclass(frozen=True)
class Triangular(Structure):
    """Lower triangular matrices, or ``upper`` ones.

    >>> Triangular(5).count
    15
    """

    upper: bool = False

    @cached_property
    def count(self) -> int:
        """The number of parameters."""
        return self.size * (self.size + 1) // 2

    @property
    def sufficient(self) -> bool:
        """A symmetric matrix is known from one triangle."""
        return True

    def diagram(self) -> Sum:
        """Two terms, one for each side of the rectangle's diagonal."""
        d, m, even = self.size, self._columns_kept, self._even
        sizes = {"r": d + even, "c": m}
        node = diagrams.Tensor("parameters", View.of(sizes, ("r", "c")))
        below = diagrams.mask({"r": 1, "c": -1}, -even, d)  # 0 <= r - e - c
        above = diagrams.mask({"c": 1, "r": -1}, even - 1, d)  # 0 <= c - r + e - 1
        places = (
            (Axis(d, -even, (("r", 1),)), Axis(d, 0, (("c", 1),))),
            (Axis(d, m - 1 + even, (("c", 1),)), Axis(d, m, (("r", 1),))),
        )
        terms = []
        for side, (row, column) in zip((below, above), places, strict=True):
            axes = (column, row) if self.upper else (row, column)
            terms.append(TensorNetwork((node, side), View((d, d), axes), sizes))
        return Sum(tuple(terms))

    def matmat(self, member: Tensor, x: Tensor) -> Tensor:
        """``S X`` for x of shape (..., size, columns)."""
        return self._halves.matmat(self._whole(member), x)

    def rmatmat(self, member: Tensor, x: Tensor) -> Tensor:
        """``Sᵀ X`` for x of shape (..., size, columns)."""
        return self._halves.rmatmat(self._whole(member), x)

    def inner_products(self, y: Tensor, z: Tensor | None = None) -> Tensor:
        """``⟨Y Zᵀ, E[e]⟩`` for Y and Z of shape (..., size, columns), Z = Y by default."""
        return self._packed(self._halves.inner_products(y, z))

    def taken(self, matrix: Tensor) -> Tensor:
        """``⟨M, E[e]⟩`` of a matrix (..., size, size)."""
        return self._packed(self._halves.taken(matrix))

    def product(self, first: Tensor, second: Tensor) -> Tensor:
        """The member ``S T``."""
        return self._packed(self._halves.product(self._whole(first), self._whole(second)))

    def inner(self, member: Tensor, x: Tensor | None = None) -> Tensor:
        """``Π(Sᵀ X Xᵀ S)`` for x of shape (..., size, columns), or ``Π(Sᵀ S)``."""
        if x is not None:
            return self.inner_products(self.rmatmat(member, x)) / self.weights(member)
        return self._projected(self._halves.inner(self._whole(member)), member)

    def congruence(self, member: Tensor, entries: Tensor) -> Tensor:
        """``Π(Sᵀ M S)`` of a symmetric matrix M, from its inner products ``⟨M, E[e]⟩``."""
        blocks = self._halves.blocks(self._whole(entries))
        for i in (0, 1):
            if (i, i) in blocks:
                half = blocks[i, i]
                diagonal = half.diagonal(dim1=-2, dim2=-1)
                blocks[i, i] = half + half.mT - torch.diag_embed(diagonal)
        given = self._halves.member(blocks)
        return self._projected(self._halves.congruence(self._whole(member), given), member)

    @property
    def _even(self) -> int:
        return 1 - self.size % 2

    @property
    def _columns_kept(self) -> int:
        return (self.size + 1) // 2

    @cached_property
    def _halves(self) -> Halves:
        return Halves(self.size, self.upper)

    def constants(self) -> dict[str, Tensor]:
        halves = self._halves
        ones = torch.ones(halves.count, dtype=torch.float64)
        found = {"identity": self._packed(halves.identity(ones))}
        weights = (found["identity"] + 1) / 2
        return found | {"weights": weights, "multiplicities": torch.ones_like(weights)}

    def _projected(self, halves: Tensor, like: Tensor) -> Tensor:
        """Blocks that are divided by the weights of `Halves`, divided by our own instead."""
        own = self._packed(halves * self._halves.weights(halves))
        return own / self.weights(like)

    def _whole(self, member: Tensor) -> Tensor:
        """As a member of `Halves`."""
        e, m, rest = self._even, self._columns_kept, self.size // 2
        box = torch.unflatten(member, -1, (self.size + e, m))
        first = box[..., e : e + m, :].tril()
        blocks = {(0, 0): first, (1, 0): box[..., e + m :, :]}
        blocks[1, 1] = box[..., :rest, 1 - e :].triu().mT
        if self.upper:
            blocks = {(j, i): block.mT for (i, j), block in blocks.items()}
        return self._halves.member({at: block.unsqueeze(-3) for at, block in blocks.items()})

    def _packed(self, whole: Tensor) -> Tensor:
        """The triangles of a member of `Halves`."""
        e, m, rest = self._even, self._columns_kept, self.size // 2
        blocks = {at: b.squeeze(-3) for at, b in self._halves.blocks(whole).items()}
        if self.upper:
            blocks = {(j, i): block.mT for (i, j), block in blocks.items()}
        box = whole.new_zeros(*whole.shape[:-1], self.size + e, m)
        box[..., e : e + m, :] = blocks[0, 0].tril()
        if rest:
            box[..., e + m :, :] = blocks[1, 0]
            box[..., :rest, 1 - e :] += blocks[1, 1].mT.triu()
        return box.flatten(-2)
