"""Which family a factor's matrices are of: by name, by a class, or by a rule of the size."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from tnconv.optim.structures.grids import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Hierarchical,
    RankTriangular,
)
from tnconv.optim.structures.structure import Structure
from tnconv.optim.structures.toeplitz import TriangularToeplitz
from tnconv.optim.structures.triangles import Triangular

Choice = str | Callable[[int], "Structure | str"]
"""A name of `STRUCTURES`, or a function of the number of rows, such as a class, to one of both."""

STRUCTURES: Mapping[str, Callable[[int], Structure]] = {
    "dense": Dense,
    "diagonal": Diagonal,
    "block_diagonal": BlockDiagonal,
    "hierarchical": Hierarchical,
    "lower_triangular": Triangular,
    "upper_triangular": partial(Triangular, upper=True),
    "triangular_top_left": RankTriangular,
    "triangular_bottom_right": partial(RankTriangular, diagonal="bottom_right"),
    "upper_triangular_top_left": partial(RankTriangular, upper=True),
    "upper_triangular_bottom_right": partial(RankTriangular, diagonal="bottom_right", upper=True),
    "triangular_toeplitz": TriangularToeplitz,
    "upper_triangular_toeplitz": partial(TriangularToeplitz, upper=True),
}


def structure(choice: Choice, size: int) -> Structure:
    """The family that is chosen for matrices of a size.

    >>> structure("diagonal", 3)
    Diagonal(size=3)
    >>> structure(lambda size: "dense" if size <= 512 else "hierarchical", 513).count
    16641

    Raises:
        ValueError: a name that there is not.
        TypeError: something else than a family of matrices of this size.
    """
    found: Any = choice
    while not isinstance(found, Structure):
        if isinstance(found, str):
            if found not in STRUCTURES:
                raise ValueError(f"structure is {found!r}; expected one of {', '.join(STRUCTURES)}")
            found = STRUCTURES[found]
        elif not callable(found):
            kind = type(found).__name__
            raise TypeError(f"a structure is a {kind}; expected a name, or a function of the size")
        found = found(size)
    if found.size != size:
        raise TypeError(f"a structure has size {found.size}; expected one of size {size}")
    return found
