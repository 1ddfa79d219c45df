"""Which family a factor's matrices are of: by name, by a class, or by a rule of the size."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

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

Pair = Choice | tuple[Choice, Choice]
"""That of a layer's inputs and output gradients, or one for both."""
LayerChoice = Pair | Mapping[str | type[nn.Module], Pair]
"""For all layers, or by the names and types of layers, and ``"default"`` for all others."""

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


def chosen(choices: LayerChoice, name: str, layer: nn.Module) -> tuple[Choice, Choice]:
    """The choices for a layer: by its name, else by the nearest of its types.

    >>> chosen({nn.Module: "diagonal", "head": ("dense", "diagonal")}, "head", nn.Linear(2, 3))
    ('dense', 'diagonal')
    >>> chosen({nn.Module: "diagonal"}, "0", nn.Linear(2, 3))
    ('diagonal', 'diagonal')

    Raises:
        ValueError: no choice, or more than two for one layer.
    """
    found: Any = choices
    if isinstance(choices, Mapping):
        keys: list[Any] = [name, *type(layer).__mro__, "default"]
        key = next((each for each in keys if each in choices), None)
        if key is None:
            kind = type(layer).__name__
            raise ValueError(f"structures has no choice for layer {name!r} ({kind}); add 'default'")
        found = choices[key]
    pair = found if isinstance(found, tuple | list) else (found, found)
    if len(pair) != 2:
        raise ValueError(f"structures are {len(pair)} for layer {name!r}; expected one or two")
    return pair[0], pair[1]
