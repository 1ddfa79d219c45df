"""A network's parameters, loss, gradient and curvature over all of its batches, as tangent objects.

Batches are pairs of inputs and targets that are taken as one batch; a `torch.utils.data.DataLoader`
is read anew for every product, one batch's graph at a time (`tnconv.GGNOperator`).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tnconv.geometry.points import Bilinear, Covector, Point
from tnconv.models.computing import Inputs, arguments, observe
from tnconv.models.propagation import LossFunction
from tnconv.operators.curvature_operators import CurvatureOperator, HessianOperator
from tnconv.quantities import Quantity

Batches = Iterable[tuple[Inputs, Any]]


def points_of(model: nn.Module) -> Point:
    """The parameters of a model that learn, by name, detached.

    >>> points_of(nn.Linear(3, 2))["weight"].shape
    torch.Size([2, 3])
    """
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def form_of(operator: CurvatureOperator) -> Bilinear:
    """A curvature operator as a bilinear form over its parameters."""
    names = operator.names
    space = dict(zip(names, operator.space.like, strict=True))
    return Bilinear(lambda v: Covector(operator @ {name: v.parts[name] for name in names}), space)


def shared_batches(
    model: nn.Module, loss_fn: LossFunction, batches: Batches
) -> Iterator[tuple[Inputs, Any, float]]:
    """Inputs, targets, and the factor of each batch's loss in that of all."""
    operator = HessianOperator(model, loss_fn, batches)
    for (inputs, targets), share in zip(operator.batches, operator.shares, strict=True):
        yield inputs, targets, share


def network_loss(
    model: nn.Module, loss_fn: LossFunction, batches: Batches
) -> Callable[[Point], Tensor]:
    """The loss over all batches as a function of parameters by name, for `torch.func`."""
    operator = HessianOperator(model, loss_fn, batches)

    def loss(theta: Point) -> Tensor:
        total: Any = 0
        for (inputs, targets), share in zip(operator.batches, operator.shares, strict=True):
            args, kwargs = arguments(inputs)
            output = functional_call(model, dict(theta), args, kwargs)
            total = total + share * loss_fn(output, targets)
        return total  # type: ignore[no-any-return]

    return loss


def network_gradient(model: nn.Module, loss_fn: LossFunction, batches: Batches) -> Covector:
    """``∂L/∂θ`` over all batches; what gradients the parameters have stays."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    for inputs, targets, share in shared_batches(model, loss_fn, batches):
        args, kwargs = arguments(inputs)
        with torch.enable_grad():
            loss = share * loss_fn(model(*args, **kwargs), targets)
        found = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
        for name, g in zip(named, found, strict=True):
            total[name] += g
    return Covector(total)


def observed(
    model: nn.Module, loss_fn: LossFunction, batches: Batches, quantity: Quantity[Any]
) -> dict[str, Any]:
    """A quantity of all batches taken as one, by parameter name, in the model's order.

    Raises:
        ValueError: a parameter that learns and has none.
    """
    with observe(model, [quantity]) as observation:
        for inputs, targets, share in shared_batches(model, loss_fn, batches):
            args, kwargs = arguments(inputs)
            with torch.enable_grad():
                output = model(*args, **kwargs)
                observation.propagate(loss_fn, output, targets, factor=share)
    found = observation.result()[quantity]
    if missing := sorted(set(points_of(model)) - set(found)):
        raise ValueError(
            f"{type(quantity).__name__} has nothing for {', '.join(missing)}; expected parameters "
            "of linear layers and convolutions: freeze the others"
        )
    return {name: found[name] for name in points_of(model)}
