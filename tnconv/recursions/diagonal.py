"""Diagonals of a loss's Hessian in parameters: from the loss on, by one of the methods."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from tnconv.losses.diagonals import (
    METHODS,
    LossFunction,
    Method,
    cross_entropy_of,
    is_nll,
    output_derivatives,
)
from tnconv.recursions.coupled_columns import Spread
from tnconv.recursions.step import Flow, operation
from tnconv.recursions.walk import Taps, recursion


def check_method(method: str) -> None:
    """Raise unless there is such a method.

    Raises:
        ValueError: there is none.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}")


def diagonals(
    loss_fn: LossFunction,
    output: Tensor,
    targets: Any,
    parameters: Collection[Tensor],
    method: Method = "hesscale",
    *,
    factor: float = 1.0,
    gradients: bool = False,
    describe: Callable[[Node], str] = lambda node: operation(node),
    taps: Taps | None = None,
) -> tuple[Tensor, dict[Tensor, Flow]]:
    """The loss, and the flow ``(g, s)`` of every parameter that it depends on.

    Args:
        loss_fn: the loss, of an output and targets; it is multiplied by ``factor``.
        output: what the model gave, with its graph, which stays.
        targets: what the loss takes beside it.
        parameters: those that count.
        method: see `tnconv.hesscale`.
        factor: of the loss.
        gradients: whether the flows have gradients.
        describe: names a node in an error.
        taps: see `tnconv.recursions.walk.recursion`.

    Raises:
        NotImplementedError: a loss or an operation that is not known.
        TypeError: an output that is no tensor.
        ValueError: a loss that is no scalar, or an output without a graph.
    """
    if not isinstance(output, Tensor):
        raise TypeError(f"the output is a {type(output).__name__}; expected a tensor")
    if not output.requires_grad:
        raise ValueError("the output depends on no parameter that learns; expected a graph")
    start, loss_fn = _start(loss_fn, output, method)
    with uncast(output.device.type):
        wide = output.detach().to(torch.promote_types(output.dtype, torch.float32))
        found = output_derivatives(loss_fn, wide, targets, method)
        loss, gradient, s, columns = found
        if factor != 1:
            gradient, s = factor * gradient, factor * s
            columns = None if columns is None else factor**0.5 * columns
        plain = Flow(gradient, s)
        flow = plain if columns is None else Spread(plain, columns)
        how = parameters, method != "gn", gradients, describe, taps
        return loss, recursion(start, flow, *how)


def uncast(device: str) -> AbstractContextManager[Any]:
    """Autocast switched off, where it is on: entering it takes as long as a small kernel."""
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def _start(
    loss_fn: LossFunction, output: Tensor, method: Method
) -> tuple[GradientEdge, LossFunction]:
    """Where the recursion starts, and for which loss: log-softmax belongs to the likelihood.

    Raises:
        NotImplementedError: "gn" or "bl89" of log-probabilities that are made in another way.
    """
    edge = get_gradient_edge(output)
    if not is_nll(loss_fn):
        return edge, loss_fn
    node: Any = edge.node
    dims = {1, 1 - output.dim() + 2**64}
    if operation(node) != "LogSoftmax" or node._saved_dim not in dims:
        raise NotImplementedError(
            f"the loss is NLLLoss, of the result of {operation(node)}; expected a model "
            "that ends in log_softmax over dimension 1"
        )
    return GradientEdge(*node.next_functions[0]), cross_entropy_of(loss_fn)
