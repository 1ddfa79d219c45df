"""Structured matrices, linear in few parameters, that Kronecker factors are restricted to."""

from tnconv.optim.structures.choices import STRUCTURES, Choice, structure
from tnconv.optim.structures.grids import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Grid,
    Hierarchical,
    RankTriangular,
)
from tnconv.optim.structures.structure import Structure
from tnconv.optim.structures.toeplitz import TriangularToeplitz
from tnconv.optim.structures.triangles import Triangular

__all__ = [
    "STRUCTURES",
    "BlockDiagonal",
    "Choice",
    "Dense",
    "Diagonal",
    "Grid",
    "Hierarchical",
    "RankTriangular",
    "Structure",
    "Triangular",
    "TriangularToeplitz",
    "structure",
]
