"""Points and tangent objects: tensors by parameter name, and their types.

A vector v changes with ``J v`` under ``ψ = φ(θ)``, J = ∂ψ/∂θ, a covector u (a gradient) with
``J⁻ᵀ u``: a vector and a covector have a pairing ``uᵀ v``, but no sum.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor

from tnconv.displays import line_of, matrix_over

Point = Mapping[str, Tensor]
"""Parameters by name."""


@dataclass(frozen=True, repr=False)
class Tangent:
    """What vectors and covectors share: tensors by name, sums, and factors."""

    parts: Point

    def __repr__(self) -> str:
        return line_of(type(self).__name__, [*self.parts.items()])

    def __add__(self, other: Self) -> Self:
        self._expect(other)
        return self._each(lambda name, a: a + other.parts[name])

    def __sub__(self, other: Self) -> Self:
        self._expect(other)
        return self._each(lambda name, a: a - other.parts[name])

    def __mul__(self, factor: float | Tensor) -> Self:
        return self._each(lambda name, a: factor * a)

    __rmul__ = __mul__

    def __neg__(self) -> Self:
        return self * -1.0

    def flat(self, like: Point | None = None) -> Tensor:
        """All entries, one parameter after the other: in its own order of names, or another's."""
        parts = self.parts if like is None else self.ordered(like)
        return torch.cat([part.reshape(-1) for part in parts.values()])

    def ordered(self, like: Point) -> dict[str, Tensor]:
        """The tensors in the order of names that a point has; `torch.func` wants it so."""
        return {name: self.parts[name] for name in like}

    def _each(self, function: Callable[[str, Tensor], Tensor]) -> Self:
        return type(self)({name: function(name, part) for name, part in self.parts.items()})

    def _expect(self, other: object) -> None:
        own, given = type(self).__name__.lower(), type(other).__name__.lower()
        if type(other) is not type(self):
            raise TypeError(
                f"a {own} and a {given} have no sum; expected two {own}s: a metric makes vectors "
                "of covectors (inverse_product) and covectors of vectors (product)"
            )
        if other.parts.keys() != self.parts.keys():
            names = ", ".join(sorted(self.parts.keys() ^ other.parts.keys()))
            raise ValueError(f"two {own}s of different parameters; only one has {names}")


@dataclass(frozen=True, repr=False)
class Vector(Tangent):
    """A direction in parameters: a step, a velocity, an eigenvector of a shape operator.

    >>> step, slope = Vector({"w": torch.ones(2)}), Covector({"w": torch.ones(2)})
    >>> slope @ step
    tensor(2.)
    >>> step + slope
    Traceback (most recent call last):
    TypeError: a vector and a covector have no sum; expected two vectors: a metric makes vectors ...
    """

    def __matmul__(self, other: "Covector") -> Tensor:
        return paired(other, self)


@dataclass(frozen=True, repr=False)
class Covector(Tangent):
    """A linear function of vectors: a gradient."""

    def __matmul__(self, other: Vector) -> Tensor:
        return paired(self, other)


def paired(covector: Covector, vector: Vector) -> Tensor:
    """``Σ_i u_i v_i``.

    Raises:
        TypeError: not one of each.
    """
    if not (isinstance(covector, Covector) and isinstance(vector, Vector)):
        kinds = f"a {type(covector).__name__} and a {type(vector).__name__}"
        raise TypeError(f"{kinds} have no pairing; expected a Covector and a Vector")
    pairs = [(covector.parts[name] * part).sum() for name, part in vector.parts.items()]
    return torch.stack(pairs).sum()


@dataclass(frozen=True, repr=False)
class Bilinear:
    """A symmetric form ``H(v, w)``, such as a Hessian, by its products ``v -> H v``.

    ``space`` are the parameters that it is over; where ``batched``, `torch.func.vmap` may run its
    products.
    """

    product: Callable[[Vector], Covector]
    space: Point
    batched: bool = False

    def __repr__(self) -> str:
        return matrix_over("Bilinear", self.space)

    def __call__(self, vector: Vector) -> Covector:
        """``H v``.

        Raises:
            TypeError: no vector.
        """
        return self.product(_expected_vector(vector))

    def __add__(self, other: "Bilinear") -> "Bilinear":
        if not isinstance(other, Bilinear):
            kind = type(other).__name__
            raise TypeError(f"a bilinear form and a {kind} have no sum; expected two forms")
        both = self.batched and other.batched
        return Bilinear(lambda v: self(v) + other(v), self.space, both)

    def dense(self) -> Tensor:
        """The matrix, column by column."""
        return _columns(self.product, self.space, self.batched)


@dataclass(frozen=True, repr=False)
class Endomorphism:
    """A linear map ``v -> E v`` of vectors to vectors, such as ``G⁻¹ H``: ``J E J⁻¹`` elsewhere.

    >>> double = Endomorphism(lambda v: 2.0 * v, {"w": torch.ones(2)})
    >>> (double @ double + double).dense()
    tensor([[6., 0.],
            [0., 6.]])
    """

    product: Callable[[Vector], Vector]
    space: Point

    def __repr__(self) -> str:
        return matrix_over("Endomorphism", self.space)

    def __call__(self, vector: Vector) -> Vector:
        """``E v``.

        Raises:
            TypeError: no vector.
        """
        return self.product(_expected_vector(vector))

    def __add__(self, other: "Endomorphism") -> "Endomorphism":
        self._expect(other, "sum")
        return Endomorphism(lambda v: self(v) + other(v), self.space)

    def __matmul__(self, other: "Endomorphism") -> "Endomorphism":
        """``v -> E F v``."""
        self._expect(other, "composition")
        return Endomorphism(lambda v: self(other(v)), self.space)

    def dense(self) -> Tensor:
        """The matrix, column by column."""
        return _columns(self.product, self.space)

    @staticmethod
    def _expect(other: object, what: str) -> None:
        if not isinstance(other, Endomorphism):
            kind = type(other).__name__
            raise TypeError(
                f"an endomorphism and a {kind} have no {what}; expected two endomorphisms: a "
                "metric makes them of bilinear forms (ShapeOperator)"
            )


def _expected_vector(given: object) -> Vector:
    if not isinstance(given, Vector):
        raise TypeError(f"the argument is a {type(given).__name__}; expected a Vector")
    return given


AT_A_TIME = 64  # columns that vmap runs together


def _columns(
    product: Callable[[Vector], Vector] | Callable[[Vector], Covector],
    space: Point,
    batched: bool = False,
) -> Tensor:
    """The matrix of a linear map, by its columns."""

    def column(row: Tensor) -> Tensor:
        return product(Vector(split(row, space))).flat(space)

    eye = identity(space)
    if batched:
        found: Tensor = torch.func.vmap(column, out_dims=1, chunk_size=AT_A_TIME)(eye)
        return found
    return torch.stack([column(row) for row in eye], 1)


def identity(space: Point) -> Tensor:
    """The identity matrix over all entries of some parameters."""
    first = next(iter(space.values()))
    return torch.eye(size_of(space), dtype=first.dtype, device=first.device)


def split(flat: Tensor, like: Point) -> dict[str, Tensor]:
    """A flat vector in the parameters' shapes."""
    parts = torch.split(flat, [part.numel() for part in like.values()])
    return {name: p.reshape(like[name].shape) for name, p in zip(like, parts, strict=True)}


def size_of(space: Point) -> int:
    """The number of entries."""
    return sum(part.numel() for part in space.values())


def basis(space: Point) -> Sequence[dict[str, Tensor]]:
    """The unit vectors, for matrices that are small."""
    return [split(row, space) for row in identity(space)]


def sampled(space: Point, generator: torch.Generator | None) -> Tensor:
    """Normal draws, flat, one per entry."""
    first = next(iter(space.values()))
    device = first.device if generator is None else generator.device
    draw: Any = torch.randn(size_of(space), generator=generator, device=device, dtype=first.dtype)
    return cast(Tensor, draw.to(first.device))
