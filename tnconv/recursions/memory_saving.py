"""Memory-saving layers: torch's operations, with what they store read from functions of ours."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tnconv.nn.memory.functions import cast, sum_but
from tnconv.nn.memory.normalization import Normalization
from tnconv.nn.memory.pointwise import slope_from_output
from tnconv.nn.memory.saving_convolution import Convolution
from tnconv.recursions.multilinear import convolution
from tnconv.recursions.norms import batch_norm
from tnconv.recursions.rearrangements import scaled, select
from tnconv.recursions.resampling import adaptive_averages, averages_over_windows
from tnconv.recursions.step import Flows, Step, operation, register_rule


@register_rule("Bilinear")
def bilinear(step: Step) -> Flows:
    """A convolution, a linear layer, or a normalisation by constants: ``y = f(x, w) + b``."""
    op, whole = step.node.op, torch_step(step)
    flows: Flows
    if not any(whole.wants[:2]):  # then no operand was stored
        flows = [None, None, whole.linear(2, *[partial(sum_but, channel=op.channel)] * 2)]
    elif isinstance(op, Convolution):
        flows = convolution(whole)
    else:
        flows = batch_norm(whole) if isinstance(op, Normalization) else _linear(whole)
    return [flow for flow, there in zip(flows, _operands(step.node), strict=True) if there]


def torch_step(step: Step) -> Step:
    """The step with the node of torch's own layer, which always has a weight and a bias."""
    if operation(step.node) != "Bilinear":
        return step
    there = _operands(step.node)

    def spread(found: Any) -> list[bool]:
        given = iter(found)
        return [bool(next(given)) if each else False for each in there]

    wants, gradients = spread(step.wants), spread(step.wants_gradient)
    return Step(_torch_node(step.node), step.flows, wants, gradients, step.curved)


def torch_convolution(node: Any) -> Any:
    """A node with the settings of torch's convolution; None if it is that of another layer."""
    if operation(node) != "Bilinear":
        return node
    return _torch_node(node) if isinstance(node.op, Convolution) else None


def _operands(node: Any) -> tuple[bool, bool, bool]:
    """Which of x, w and b were tensors: autograd's edges leave out the others."""
    constants = 2 if isinstance(node.op, Normalization) else 0
    weight = node.shapes.w is not None
    return True, weight, len(node.next_functions) - constants > 1 + weight


def _torch_node(node: Any) -> Any:
    """What torch's node of the layer has saved; x or w is made up where nobody reads it."""
    op, shapes = node.op, node.shapes
    x, w, *constants = node.saved_tensors
    like = x if x is not None else w
    if like is None:  # only the bias learns
        like = torch.empty((), dtype=torch.float64)
    x = like.new_empty(()).expand(shapes.x) if x is None else x
    if w is None and shapes.w is not None:
        w = like.new_empty(()).expand(shapes.w)
    found = {"input": x, "weight": cast(w, op.dtype)}
    if isinstance(op, Convolution):
        names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
        found |= {name: getattr(op, name) for name in names}
        found["bias_sym_sizes_opt"] = [shapes.y[op.channel]]
    elif isinstance(op, Normalization):
        found |= {"training": False, "eps": op.eps}
        found |= dict(zip(("running_mean", "running_var"), constants, strict=True))
    return SimpleNamespace(**{f"_saved_{name}": value for name, value in found.items()})


def _linear(step: Step) -> Flows:
    """``y[n, d] = Σ_c x[n, c] w[d, c] + b[d]``."""
    x, w = step.saved("input"), step.saved("weight")

    def rows(t: Tensor) -> Tensor:
        return t.reshape(-1, t.shape[-1])

    return [
        step.linear(0, lambda g: g @ w, lambda s: s @ w.square()),
        step.linear(1, lambda g: rows(g).mT @ rows(x), lambda s: rows(s).mT @ rows(x).square()),
        step.linear(2, lambda g: rows(g).sum(0), lambda s: rows(s).sum(0)),
    ]


@register_rule("Pooled")
def pooled(step: Step) -> Flows:
    """Maxima are selected; averages have the square of their divisor."""
    kernel, settings = step.node.kernel, step.node.settings
    if "max" in kernel:
        return select(step)
    if "adaptive" in kernel:
        return adaptive_averages(step, int(kernel[-2]))
    size, stride, padding, _, *others = settings
    return averages_over_windows(step, size, stride, padding, *others)


@register_rule("Gate", diagonal=True)
def gate(step: Step) -> Flows:
    """One of two slopes for every entry."""
    return scaled(step)


@register_rule("FromOutput", curved=True, diagonal=True)
def from_output(step: Step) -> Flows:
    """``f' = h(y)``, thus ``f'' = h'(y) h(y)``."""
    node = step.node
    y = node.saved_tensors[0].detach().to(step.flow.diagonal.dtype)
    with torch.enable_grad():
        y.requires_grad_()
        first = slope_from_output(node.rule, y, *node.settings)
        (second,) = torch.autograd.grad(first.sum(), y, allow_unused=True)
    first = first.detach()
    return step.entrywise(first, None if second is None else second * first)
