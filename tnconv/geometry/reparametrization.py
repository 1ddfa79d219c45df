"""Maps of parameters, with the derivatives that carry vectors, covectors and metrics along."""

from abc import ABC, abstractmethod
from typing import TypeVar

import torch
from torch import Tensor

from tnconv.displays import Shown
from tnconv.geometry.points import Bilinear, Covector, Endomorphism, Point, Vector, basis, size_of

T = TypeVar("T", Vector, Covector, Bilinear, Endomorphism)
LARGEST_DETERMINANT = 4096  # entries, of a map without a formula for it


class Reparametrization(Shown, ABC):
    """``ψ = φ(θ)`` on named parameters; those that it does not name stay.

    ``linear`` and ``diagonal`` say what the Jacobian J = ∂ψ/∂θ is like. Where ``bijective`` is
    false, ``inverse`` is a submersion (several ψ are one θ, as with weight norm), ``forward`` picks
    one of them, and only what goes with the inverse's Jacobian exists.
    """

    linear: bool = False
    diagonal: bool = False
    bijective: bool = True

    @abstractmethod
    def forward(self, theta: Point) -> Point:
        """``φ(θ)``."""

    @abstractmethod
    def inverse(self, psi: Point) -> Point:
        """``φ⁻¹(ψ)``."""

    def __call__(self, theta: Point) -> Point:
        return self.forward(theta)

    def jvp(self, theta: Point, v: Vector) -> Vector:
        """``J v``."""
        self.expect_bijective("J")
        return Vector(torch.func.jvp(self.forward, (dict(theta),), (v.ordered(theta),))[1])

    def vjp(self, theta: Point, u: Covector) -> Covector:
        """``Jᵀ u``."""
        self.expect_bijective("J")
        psi, pull, *_ = torch.func.vjp(self.forward, dict(theta))
        return Covector(pull(u.ordered(psi))[0])

    def inverse_jvp(self, psi: Point, v: Vector) -> Vector:
        """``J⁻¹ v``, or ∂θ/∂ψ v for a submersion."""
        return Vector(torch.func.jvp(self.inverse, (dict(psi),), (v.ordered(psi),))[1])

    def inverse_vjp(self, psi: Point, u: Covector) -> Covector:
        """``J⁻ᵀ u``."""
        theta, pull, *_ = torch.func.vjp(self.inverse, dict(psi))
        return Covector(pull(u.ordered(theta))[0])

    def log_abs_det(self, theta: Point) -> Tensor:
        """``log |det J|``: of a diagonal map the sum of logarithms, else by the dense Jacobian.

        Raises:
            ValueError: a map that is no bijection, or a large one without a formula.
        """
        self.expect_bijective("log |det J|")
        if self.diagonal:
            ones = Vector({name: torch.ones_like(part) for name, part in theta.items()})
            return self.jvp(theta, ones).flat().abs().log().sum()
        if size_of(theta) > LARGEST_DETERMINANT:
            raise ValueError(
                f"the parameters have {size_of(theta)} entries; expected at most "
                f"{LARGEST_DETERMINANT} for a map without a formula of its determinant"
            )
        columns = [self.jvp(theta, Vector(v)).flat() for v in basis(theta)]
        found: Tensor = torch.linalg.slogdet(torch.stack(columns, 1)).logabsdet
        return found

    def transport(self, theta: Point, what: T) -> T:
        """A vector, covector, bilinear form or endomorphism at θ as the same object at ``φ(θ)``.

        Raises:
            ValueError: a vector or endomorphism, for a map that is no bijection.
        """
        if isinstance(what, Vector):
            return self.jvp(theta, what)
        psi = self.forward(theta)
        if isinstance(what, Covector):
            return self.inverse_vjp(psi, what)
        if isinstance(what, Endomorphism):
            self.expect_bijective("J, which endomorphisms need")
            inner = what
            return Endomorphism(lambda v: self.jvp(theta, inner(self.inverse_jvp(psi, v))), psi)

        def product(v: Vector) -> Covector:
            return self.inverse_vjp(psi, what(self.inverse_jvp(psi, v)))

        return Bilinear(product, psi, what.batched)

    def __matmul__(self, first: "Reparametrization") -> "Reparametrization":
        """``self ∘ first``."""
        return Composition(first, self)

    def inverted(self) -> "Reparametrization":
        """φ⁻¹ as a map of its own."""
        return Inverted(self)

    def expect_bijective(self, what: str) -> None:
        """Raise unless the map is one to one.

        Raises:
            ValueError: it is not.
        """
        if not self.bijective:
            raise ValueError(
                f"{type(self).__name__} is no bijection and has no {what}; expected what goes with "
                "its inverse's Jacobian: covectors, bilinear forms, products with a metric"
            )


class Composition(Reparametrization):
    """``ψ = second(first(θ))``.

    >>> from tnconv.geometry import DiagonalScale, Elementwise
    >>> both = Elementwise("exp") @ DiagonalScale({"w": 2.0})
    >>> both({"w": torch.zeros(2)})["w"], both.diagonal, both.linear
    (tensor([1., 1.]), True, False)
    """

    def __init__(self, first: Reparametrization, second: Reparametrization) -> None:
        self.first, self.second = first, second
        self.linear = first.linear and second.linear
        self.diagonal = first.diagonal and second.diagonal
        self.bijective = first.bijective and second.bijective

    def forward(self, theta: Point) -> Point:
        return self.second.forward(self.first.forward(theta))

    def inverse(self, psi: Point) -> Point:
        return self.first.inverse(self.second.inverse(psi))

    def log_abs_det(self, theta: Point) -> Tensor:
        between = self.first.forward(theta)
        return self.first.log_abs_det(theta) + self.second.log_abs_det(between)


class Inverted(Reparametrization):
    """``ψ = φ⁻¹(θ)``."""

    def __init__(self, other: Reparametrization) -> None:
        other.expect_bijective("inverse as a map")
        self.other, self.linear, self.diagonal = other, other.linear, other.diagonal

    def forward(self, theta: Point) -> Point:
        return self.other.inverse(theta)

    def inverse(self, psi: Point) -> Point:
        return self.other.forward(psi)

    def log_abs_det(self, theta: Point) -> Tensor:
        return -self.other.log_abs_det(self.other.inverse(theta))

    def inverted(self) -> Reparametrization:
        return self.other
