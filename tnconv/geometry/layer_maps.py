"""Maps of neighbouring layers' channels, and of whole networks' parametrisations."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tnconv.geometry.channels import Channels
from tnconv.geometry.elementwise_maps import DiagonalScale, expect_names
from tnconv.geometry.points import Covector, Point, Vector
from tnconv.geometry.reparametrization import Reparametrization
from tnconv.models.computing import Inputs, arguments
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
    channels = Channels(model, previous, "outgoing")
    weight = channels.weight
    a = torch.as_tensor(factor, dtype=weight.dtype, device=weight.device).expand(channels.count)
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
        ValueError: no permutation, one that takes a channel out of its group, or outputs that
            change.
    """
    channels = Channels(model, previous, "outgoing")
    if sorted(order) != list(range(channels.count)):
        raise ValueError(f"order is no permutation of {channels.count} channels")
    at = torch.tensor(order)
    dims = {f"{previous}.weight": channels.ordered(at)}
    if channels.bias is not None:
        dims[f"{previous}.bias"] = 0, at
    readers = Channels(model, following, "incoming")
    repeats = _repeats(channels, readers)
    every = (at[:, None] * repeats + torch.arange(repeats)).flatten()
    dims[f"{following}.weight"] = readers.ordered(every)
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

    An order is one list of positions, or one for every place along the other dimensions.

    >>> flip = Permutation({"w": (0, torch.tensor([1, 0]))})
    >>> flip({"w": torch.tensor([1.0, 2.0])})["w"]
    tensor([2., 1.])
    """

    linear = True

    def __init__(self, orders: dict[str, tuple[int, Tensor]]) -> None:
        self.orders = orders
        self.back = {
            name: (dim, order.argsort(dim if order.dim() > 1 else 0))
            for name, (dim, order) in orders.items()
        }

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
        name: _along(part, *orders[name]) if name in orders else part
        for name, part in point.items()
    }


def _along(part: Tensor, dim: int, order: Tensor) -> Tensor:
    order = order.to(part.device)
    if order.dim() == 1:
        return part.index_select(dim, order)
    found: Tensor = torch.take_along_dim(part, order, dim)
    return found


def _factors(model: nn.Module, previous: str, following: str, a: Tensor) -> dict[str, Tensor]:
    """Of the weights and the bias between which the channels are."""
    writers, readers = Channels(model, previous, "outgoing"), Channels(model, following, "incoming")
    found = {f"{previous}.weight": writers.along(a)}
    if writers.bias is not None:
        found[f"{previous}.bias"] = a
    every = a.repeat_interleave(_repeats(writers, readers))
    return found | {f"{following}.weight": 1 / readers.along(every)}


def _repeats(writers: Channels, readers: Channels) -> int:
    """How many incoming channels stand for an outgoing one: more than one after a flattening.

    Raises:
        ValueError: no whole number.
    """
    if readers.count % writers.count:
        raise ValueError(
            f"layer {readers.layer!r} reads {readers.count} channels, {writers.layer!r} writes "
            f"{writers.count}; expected a multiple"
        )
    return readers.count // writers.count


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
