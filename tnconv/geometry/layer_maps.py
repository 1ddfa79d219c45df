"""Maps of neighbouring layers' channels, and of whole networks' parametrisations."""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tnconv.geometry.elementwise_maps import DiagonalScale, expect_names
from tnconv.geometry.points import Covector, Point, Vector
from tnconv.geometry.reparametrization import Reparametrization
from tnconv.models.computing import Inputs, arguments
from tnconv.models.layers import layout
from tnconv.ntk.parametrizations import Parametrization, parametrization_scales


def relu_rescale(
    model: nn.Module,
    previous: str,
    following: str,
    factor: float | Tensor,
    inputs: Inputs,
) -> DiagonalScale:
    """Outgoing channels of one layer times ``a > 0``, the next layer's incoming ones over a.

    The function of a network stays where everything between both layers is positively homogeneous,
    channel by channel, and nobody else reads it: that is checked on ``inputs``.

    Args:
        model: the network.
        previous: the name of the layer whose weight and bias are multiplied: linear or a
            convolution, of any kind and groups.
        following: the name of the next one, whose weight is divided; a linear layer can follow a
            convolution that was flattened.
        factor: a, one number or one for each channel ``(c,)``.
        inputs: of the model, on which its outputs must stay the same.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> relu_rescale(model, "0", "2", 10.0, torch.rand(5, 3)).factors["2.weight"].shape
    torch.Size([2, 4])

    Raises:
        ValueError: layers that do not fit, a factor that is not positive, or outputs that change.
    """
    count = _channels(model, previous, "outgoing")
    a = torch.as_tensor(factor, dtype=_weight(model, previous).dtype)
    a = a.to(_weight(model, previous).device).expand(count)
    if not bool((a > 0).all()):
        raise ValueError("factor has entries that are not positive; expected a > 0")
    found = DiagonalScale(_factors(model, previous, following, a))
    _expect_symmetry(model, found, inputs, f"{previous!r} and {following!r}")
    return found


def permuted_channels(
    model: nn.Module,
    previous: str,
    following: str,
    order: Sequence[int],
    inputs: Inputs,
) -> "Permutation":
    """Outgoing channels of one layer in another order, and the next layer's incoming ones.

    Args:
        model: the network.
        previous: the name of the layer whose outgoing channels are permuted.
        following: the name of the layer that reads them.
        order: channel ``order[c]`` becomes channel c.
        inputs: of the model, on which its outputs must stay the same.

    Raises:
        ValueError: no permutation, layers with groups, or outputs that change.
    """
    count = _channels(model, previous, "outgoing")
    if sorted(order) != list(range(count)):
        raise ValueError(f"order is no permutation of {count} channels")
    for name in (previous, following):
        if _layout(model, name)[0] > 1:
            raise ValueError(f"layer {name!r} has groups; expected none")
    at = torch.tensor(order)
    dims = {f"{previous}.weight": (_dim(model, previous, "outgoing"), at)}
    if getattr(model.get_submodule(previous), "bias", None) is not None:
        dims[f"{previous}.bias"] = 0, at
    repeats = _channels(model, following, "incoming") // count
    every = (at[:, None] * repeats + torch.arange(repeats)).flatten()
    dims[f"{following}.weight"] = _dim(model, following, "incoming"), every
    found = Permutation(dims)
    _expect_symmetry(model, found, inputs, f"{previous!r} and {following!r}")
    return found


def parametrization_map(model: nn.Module, parametrization: Parametrization) -> DiagonalScale:
    """``W = a w``: the NTK or mean-field parameters w of standard ones, ``ψ = θ / a``.

    >>> parametrization_map(nn.Linear(4, 2), "ntk").factors["weight"]
    tensor(2.)
    """
    scales = parametrization_scales(model, parametrization)
    return DiagonalScale({name: a2**-0.5 for name, a2 in scales.items() if a2 != 1})


class Permutation(Reparametrization):
    """Entries of parameters in another order along one dimension each: ``{name: (dim, order)}``.

    >>> flip = Permutation({"w": (0, torch.tensor([1, 0]))})
    >>> flip({"w": torch.tensor([1.0, 2.0])})["w"]
    tensor([2., 1.])
    """

    linear = True

    def __init__(self, orders: dict[str, tuple[int, Tensor]]) -> None:
        self.orders = orders
        self.back = {name: (dim, order.argsort()) for name, (dim, order) in orders.items()}

    def forward(self, theta: Point) -> Point:
        return _reordered(theta, self.orders)

    def inverse(self, psi: Point) -> Point:
        return _reordered(psi, self.back)

    def jvp(self, theta: Point, v: Vector) -> Vector:
        return Vector(self.forward(v.parts))

    def inverse_vjp(self, psi: Point, u: Covector) -> Covector:
        return Covector(self.forward(u.parts))

    def log_abs_det(self, theta: Point) -> Tensor:
        return next(iter(theta.values())).new_zeros(())


def _reordered(point: Point, orders: dict[str, tuple[int, Tensor]]) -> dict[str, Tensor]:
    expect_names(point, orders)
    return {
        name: part.index_select(orders[name][0], orders[name][1].to(part.device))
        if name in orders
        else part
        for name, part in point.items()
    }


class KroneckerAffine(Reparametrization):
    """``ψ = Q W Pᵀ + B`` for one parameter as a matrix W ``(d, a)``: rows are its first dimension.

    >>> map = KroneckerAffine("weight", 2 * torch.eye(3), torch.eye(4))
    >>> map.log_abs_det({"weight": torch.rand(3, 4)})
    tensor(8.3178)

    Raises:
        ValueError: matrices that are not square.
    """

    linear = True

    def __init__(self, name: str, left: Tensor, right: Tensor, shift: Tensor | None = None) -> None:
        for word, matrix in (("left", left), ("right", right)):
            if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
                raise ValueError(f"{word} has shape {tuple(matrix.shape)}; expected a square")
        self.name, self.left, self.right, self.shift = name, left, right, shift

    def forward(self, theta: Point) -> Point:
        def apply(w: Tensor) -> Tensor:
            y = (self.left @ w.flatten(1) @ self.right.mT).reshape(w.shape)
            return y if self.shift is None else y + self.shift

        return self._changed(theta, apply)

    def inverse(self, psi: Point) -> Point:
        def apply(w: Tensor) -> Tensor:
            w = w if self.shift is None else w - self.shift
            once = torch.linalg.solve(self.left, w.flatten(1))
            found: Tensor = torch.linalg.solve(self.right, once.mT).mT.reshape(w.shape)
            return found

        return self._changed(psi, apply)

    def log_abs_det(self, theta: Point) -> Tensor:
        left, right = (torch.linalg.slogdet(m).logabsdet for m in (self.left, self.right))
        found: Tensor = len(self.right) * left + len(self.left) * right
        return found

    def _changed(self, point: Point, how: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        expect_names(point, [self.name])
        return {name: how(part) if name == self.name else part for name, part in point.items()}


def _factors(model: nn.Module, previous: str, following: str, a: Tensor) -> dict[str, Tensor]:
    """Of the weights and the bias between which the channels are."""
    weight, after = _weight(model, previous), _weight(model, following)
    count = _channels(model, following, "incoming")
    if count % len(a):
        raise ValueError(
            f"layer {following!r} reads {count} channels, {previous!r} writes {len(a)}; expected "
            "a multiple"
        )
    found = {f"{previous}.weight": _along(a, weight, *_layout(model, previous), outgoing=True)}
    if getattr(model.get_submodule(previous), "bias", None) is not None:
        found[f"{previous}.bias"] = a
    every = a.repeat_interleave(count // len(a))
    scale = _along(every, after, *_layout(model, following), outgoing=False)
    return found | {f"{following}.weight": 1 / scale}


def _along(a: Tensor, weight: Tensor, groups: int, inputs_first: bool, *, outgoing: bool) -> Tensor:
    """One factor per channel, in the shape of a weight but for its kernel's positions.

    The weight is ``(g·d, c, *k)``, or transposed ``(g·c, d, *k)``: its first dimension has the
    channels of all groups, its second those of one.
    """
    first, second, *kernel = weight.shape
    if outgoing != inputs_first:
        each = a.reshape(first, 1).expand(first, second)
    else:
        by_group = a.reshape(groups, 1, second)
        each = by_group.expand(groups, first // groups, second).reshape(first, second)
    return each.reshape(first, second, *[1] * len(kernel)).expand(weight.shape)


def _layout(model: nn.Module, name: str) -> tuple[int, bool]:
    found = layout(model.get_submodule(name), "weight")
    if found is None:
        kind = type(model.get_submodule(name)).__name__
        raise ValueError(f"layer {name!r} is a {kind}; expected a linear layer or a convolution")
    return found


def _weight(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(f"{name}.weight")


def _dim(model: nn.Module, name: str, side: str) -> int:
    return int((side == "outgoing") == _layout(model, name)[1])


def _channels(model: nn.Module, name: str, side: str) -> int:
    groups = _layout(model, name)[0]
    weight, dim = _weight(model, name), _dim(model, name, side)
    return weight.shape[dim] * (groups if dim == 1 else 1)


@torch.no_grad()
def _expect_symmetry(
    model: nn.Module, map: Reparametrization, inputs: Inputs, between: str
) -> None:
    """Raise unless the outputs stay the same up to rounding.

    Raises:
        ValueError: they change.
    """
    args, kwargs = arguments(inputs)
    theta = {name: p.detach() for name, p in model.named_parameters()}
    before = functional_call(model, theta, args, dict(kwargs))
    after = functional_call(model, dict(map(theta)), args, dict(kwargs))
    size, error = float(before.abs().max()), float((before - after).abs().max())
    rounding = 1e3 * torch.finfo(before.dtype).eps * max(1, prod(before.shape[1:])) ** 0.5
    if not error <= rounding * size:
        raise ValueError(
            f"the outputs change by {error / size if size else error:.1e} of their size: what is "
            f"between layers {between} is not positively homogeneous in every channel, or others "
            "read it"
        )
