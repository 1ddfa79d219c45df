"""The gradient by itself, which needs no diagrams: autograd has it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnconv.given import instances
from tnconv.models.calls import Pass
from tnconv.models.capture import alone
from tnconv.models.checkpoints import refusing_reentrant
from tnconv.models.modules import named_modules, named_parameters, uncompiled, unwrapped
from tnconv.models.propagation import LossFunction
from tnconv.models.result import Result
from tnconv.quantities.base import Quantity
from tnconv.quantities.first_order import SUM

SINGLE = torch.float32, torch.float64
"""Where sums over samples need no wider dtype than torch's own gradient has."""


def asks_for_gradient(quantities: Any) -> bool:
    """Whether quantities are made of the loss's gradient, and of nothing else."""
    return (
        isinstance(quantities, list | tuple)
        and bool(quantities)
        and all(isinstance(q, Quantity) and _statistics(q) == (SUM,) for q in quantities)
    )


def _statistics(quantity: Quantity[Any]) -> tuple[object, ...]:
    return tuple(quantity.statistics().values())


def gradient_alone(
    model: nn.Module,
    loss_fn: LossFunction,
    given: tuple[tuple[Any, ...], dict[str, Any]],
    targets: Any,
    quantities: Sequence[Quantity[Any]],
    batch_dim: int,
) -> Result | None:
    """Quantities of the gradient alone; None where their sums need a wider dtype.

    As with all quantities, a parameter without a gradient is left out.

    Args:
        model: the network.
        loss_fn: the loss of the batch, a scalar.
        given: what the model is called with, by position and by keyword.
        targets: what the loss is given beside the model's output.
        quantities: quantities for which `asks_for_gradient` is true.
        batch_dim: the dimension of the inputs that samples are in.

    Raises:
        NotImplementedError: a reentrant checkpoint.
        ValueError: a loss that is no scalar, or inputs without a tensor.
    """
    instances(loss_fn=loss_fn)
    core = unwrapped(model)
    modules = named_modules(core)
    every = named_parameters(core, modules)
    if not all(p.dtype in SINGLE for p in every):
        return None
    args, kwargs = given
    learned = [p for p in every if p.requires_grad]
    with uncompiled(core, modules), alone(core), torch.enable_grad():
        with refusing_reentrant(modules):
            loss = expect_scalar(loss_fn(core(*args, **kwargs), targets))
        found = _gradients(loss, learned)
    samples = _samples(args, kwargs, batch_dim)
    known = {every[p]: g for p, g in zip(learned, found, strict=True) if g is not None}
    values = {}
    for quantity in quantities:
        (statistic,) = quantity.statistics()
        values[quantity] = {n: quantity.result({statistic: g}, samples) for n, g in known.items()}
    return Result(values, samples, loss.detach())


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not (parameters and loss.requires_grad):
        return [None] * len(parameters)
    found: Sequence[Tensor | None] = torch.autograd.grad(loss, parameters, allow_unused=True)
    return found


def _samples(args: tuple[Any, ...], kwargs: dict[str, Any], batch_dim: int) -> int:
    if args and isinstance(args[0], Tensor) and args[0].dim() > batch_dim:
        return args[0].shape[batch_dim]
    return Pass(args, kwargs, 0, batch_dim).samples


def expect_scalar(loss: Tensor) -> Tensor:
    """The loss.

    Raises:
        ValueError: it is no scalar.
    """
    if loss.dim():
        raise ValueError(f"the loss has shape {tuple(loss.shape)}; expected a scalar")
    return loss
