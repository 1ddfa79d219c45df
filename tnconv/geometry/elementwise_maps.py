"""Maps of every entry by itself."""

from collections.abc import Callable, Collection, Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tnconv.geometry.points import Covector, Point, Vector
from tnconv.geometry.reparametrization import Reparametrization

Function = Literal["exp", "softplus", "tanh", "sinh"]
Map = Callable[[Tensor], Tensor]


class DiagonalScale(Reparametrization):
    """``ψ = s ∘ θ``, with positive or negative factors s by name: numbers, or tensors that fit.

    >>> scale = DiagonalScale({"weight": 2.0})
    >>> scale.log_abs_det({"weight": torch.ones(3)})
    tensor(2.0794)

    Raises:
        ValueError: a factor that is zero or not finite.
    """

    linear = diagonal = True

    def __init__(self, factors: Mapping[str, float | Tensor]) -> None:
        self.factors = {name: torch.as_tensor(s).detach() for name, s in factors.items()}
        for name, s in self.factors.items():
            if not bool((s.isfinite() & (s != 0)).all()):
                raise ValueError(
                    f"the factor of {name!r} has entries that are zero or not finite; expected "
                    "numbers that can be divided by"
                )

    def forward(self, theta: Point) -> Point:
        return self._scaled(theta, lambda part, s: part * s)

    def inverse(self, psi: Point) -> Point:
        return self._scaled(psi, lambda part, s: part / s)

    def jvp(self, theta: Point, v: Vector) -> Vector:
        return Vector(self.forward(v.parts))

    def vjp(self, theta: Point, u: Covector) -> Covector:
        return Covector(self.forward(u.parts))

    def inverse_jvp(self, psi: Point, v: Vector) -> Vector:
        return Vector(self.inverse(v.parts))

    def inverse_vjp(self, psi: Point, u: Covector) -> Covector:
        return Covector(self.inverse(u.parts))

    def _scaled(self, point: Point, how: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
        expect_names(point, self.factors)
        return {
            name: how(part, self.factors[name].to(part)) if name in self.factors else part
            for name, part in point.items()
        }


class _Known(NamedTuple):
    forward: Map
    inverse: Map
    log_slope: Map  # log |f'|


KNOWN: Mapping[str, _Known] = {
    "exp": _Known(torch.exp, torch.log, lambda x: x),
    "softplus": _Known(
        lambda x: torch.logaddexp(x, torch.zeros_like(x)),
        lambda y: y + torch.log(-torch.expm1(-y)),
        lambda x: -torch.logaddexp(-x, torch.zeros_like(x)),
    ),
    "tanh": _Known(
        torch.tanh,
        torch.atanh,
        lambda x: 2 * (torch.log(torch.full_like(x, 2)) - x.abs() - _log1p_exp(-2 * x.abs())),
    ),
    "sinh": _Known(
        torch.sinh,
        torch.asinh,
        lambda x: x.abs() + _log1p_exp(-2 * x.abs()) - torch.log(torch.full_like(x, 2)),
    ),
}


class Elementwise(Reparametrization):
    """``ψ = f(θ)`` for every entry of some parameters, by default of all.

    ``Elementwise("sinh").inverted()`` is asinh.

    >>> Elementwise("exp", ["scale"])({"scale": torch.zeros(2), "bias": torch.zeros(1)})
    {'scale': tensor([1., 1.]), 'bias': tensor([0.])}

    Raises:
        ValueError: an unknown function.
    """

    diagonal = True

    def __init__(self, function: Function, names: Collection[str] | None = None) -> None:
        if function not in KNOWN:
            words = ", ".join(map(repr, get_args(Function)))
            raise ValueError(f"function is {function!r}; expected one of {words}")
        self.function, self.names = function, None if names is None else tuple(names)

    def forward(self, theta: Point) -> Point:
        return self._applied(theta, KNOWN[self.function].forward)

    def inverse(self, psi: Point) -> Point:
        return self._applied(psi, KNOWN[self.function].inverse)

    def log_abs_det(self, theta: Point) -> Tensor:
        names = theta if self.names is None else self.names
        slopes = [KNOWN[self.function].log_slope(theta[name]).sum() for name in names]
        return torch.stack(slopes).sum()

    def _applied(self, point: Point, f: Map) -> dict[str, Tensor]:
        expect_names(point, self.names or ())
        return {
            name: f(part) if self.names is None or name in self.names else part
            for name, part in point.items()
        }


def _log1p_exp(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x))


def expect_names(point: Point, names: Collection[str]) -> None:
    """Raise unless a point has some parameters.

    Raises:
        ValueError: it has not.
    """
    if missing := sorted(set(names) - set(point)):
        raise ValueError(
            f"the parameters have no {', '.join(missing)}; expected all that the map names"
        )
