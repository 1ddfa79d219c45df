"""Piecewise linear functions in graphs that are differentiated twice.

The backward pass of ``y = max(x, 0)`` gives ``[y > 0] v``, which depends on the arriving gradient v
alone wherever it is differentiable. torch's derivative of it returns zeros of the size of y as
well, fills them, and adds them to what other paths bring. For activations that is as slow as a
convolution of a few channels. Inside `without_zeros`, gradients of such functions are recorded as
functions of v alone.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

aten = torch.ops.aten


def _relu(node: Any, v: Tensor) -> Tensor:
    found: Tensor = aten.threshold_backward(v, node._saved_result.detach(), 0)
    return found


def _threshold(node: Any, v: Tensor) -> Tensor:
    found: Tensor = aten.threshold_backward(v, node._saved_self.detach(), node._saved_threshold)
    return found


def _leaky_relu(node: Any, v: Tensor) -> Tensor:
    x, slope = node._saved_self.detach(), node._saved_negative_slope
    found: Tensor = aten.leaky_relu_backward(v, x, slope, False)
    return found


def _hardtanh(node: Any, v: Tensor) -> Tensor:
    x = node._saved_self.detach()
    found: Tensor = aten.hardtanh_backward(v, x, node._saved_min_val, node._saved_max_val)
    return found


def _max_pool(run: Callable[..., Tensor]) -> Callable[[Any, Tensor], Tensor]:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")

    def gradient(node: Any, v: Tensor) -> Tensor:
        settings = [getattr(node, f"_saved_{name}") for name in names]
        return run(v, node._saved_self.detach(), *settings, node._saved_result1)

    return gradient


def _adaptive_max_pool(run: Callable[..., Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return lambda node, v: run(v, node._saved_self.detach(), node._saved_result1)


GRADIENTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "ReluBackward0": _relu,
    "ThresholdBackward0": _threshold,
    "LeakyReluBackward0": _leaky_relu,
    "HardtanhBackward0": _hardtanh,
    "MaxPool2DWithIndicesBackward0": _max_pool(aten.max_pool2d_with_indices_backward),
    "MaxPool3DWithIndicesBackward0": _max_pool(aten.max_pool3d_with_indices_backward),
    "AdaptiveMaxPool2DBackward0": _adaptive_max_pool(aten.adaptive_max_pool2d_backward),
    "AdaptiveMaxPool3DBackward0": _adaptive_max_pool(aten.adaptive_max_pool3d_backward),
}
"""The gradient before a node, from the one after it and what the node saved."""


@contextmanager
def without_zeros(nodes: Iterable[Node]) -> Iterator[None]:
    """Record the nodes' gradients as functions of the arriving ones alone, in backward passes with
    ``create_graph=True`` while this is open.
    """
    with ExitStack() as stack:
        for node in nodes:
            if node.name() in GRADIENTS:
                stack.callback(node.register_hook(_hook(node, GRADIENTS[node.name()])).remove)
        yield


def _hook(node: Node, gradient: Callable[[Any, Tensor], Tensor]) -> Callable[..., Any]:
    def again(before: tuple[Tensor | None, ...], after: tuple[Tensor | None, ...]) -> Any:
        if before[0] is None or after[0] is None:
            return None
        try:
            return (gradient(node, after[0]),)
        except RuntimeError:  # saved under a checkpoint, which gives each value once
            return None

    return again
