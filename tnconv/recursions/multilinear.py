"""Operations that are linear in each of several operands: layers, products and sums.

One idea serves them all: s goes backwards as g does, through the operation with its other operands
squared.
"""

from typing import Any

import torch
from torch import Tensor

from tnconv.recursions.step import Flow, Flows, Step, register_rule, shape_of


@register_rule("Addmm")
def addmm(step: Step) -> Flows:
    """``y = β b + α x w``."""
    node = step.node
    beta, alpha = node._saved_beta, node._saved_alpha
    bias = None
    if step.wants[0]:
        shape = shape_of(*node.next_functions[0])
        bias = step.linear(0, lambda g: g.sum_to_size(shape), lambda s: s.sum_to_size(shape))
        bias = bias if beta == 1 else _times(bias, beta)
    return (bias, *_matrices(step, "mat1", "mat2", 1, alpha))


@register_rule("Mm")
def mm(step: Step) -> Flows:
    """``y = x w``."""
    return _matrices(step, "self", "mat2", 0, 1)


def _matrices(step: Step, first: str, second: str, start: int, factor: float) -> Flows:
    def before_x(v: Tensor, w: Tensor) -> Tensor:
        return v.mm(w.t())

    def before_w(v: Tensor, x: Tensor) -> Tensor:
        """Laid out as w is, of which a layer's weight is the transpose."""
        return v.t().mm(x).t()

    flows: list[Flow | None] = [None, None]
    if step.wants[start]:
        w = step.saved(second)
        flows[0] = step.linear(start, lambda g: before_x(g, w), lambda s: before_x(s, w * w))
    if step.wants[start + 1]:
        x = step.saved(first)
        flows[1] = step.linear(start + 1, lambda g: before_w(g, x), lambda s: before_w(s, x * x))
    return flows if factor == 1 else [_times(flow, factor) for flow in flows]


def _times(flow: Flow | None, factor: float) -> Flow | None:
    if flow is None:
        return None
    g = flow.gradient
    return Flow(None if g is None else factor * g, factor**2 * flow.diagonal)


@register_rule("Bmm", "Baddbmm")
def bmm(step: Step) -> Flows:
    """``y[b] = x[b] w[b]``, with ``β`` and ``α`` as in `addmm`."""
    added = len(step.wants) == 3
    names, start = (("batch1", "batch2"), 1) if added else (("self", "mat2"), 0)
    flows: list[Flow | None] = [None, None]
    if step.wants[start]:
        w = step.saved(names[1]).mT
        flows[0] = step.linear(start, lambda g: g.bmm(w), lambda s: s.bmm(w * w))
    if step.wants[start + 1]:
        x = step.saved(names[0]).mT
        flows[1] = step.linear(start + 1, lambda g: x.bmm(g), lambda s: (x * x).bmm(s))
    if not added:
        return flows
    factor = step.node._saved_beta
    (bias,) = _sums(step, (factor,))
    return (bias, *(_times(flow, step.node._saved_alpha) for flow in flows))


@register_rule("Convolution")
def convolution(step: Step) -> Flows:
    """Any convolution, transposed ones too: all squares by one call of its backward kernel.

    An entry of x and one of y meet in at most one tap, so that J² is the convolution with w².
    """
    node, needs = step.node, [*step.wants]
    x, w = step.saved("input"), step.saved("weight")
    g, s = step.flow.gradient, step.flow.diagonal
    how: list[Any] = [
        node._saved_bias_sym_sizes_opt,
        *(node._saved_stride, node._saved_padding, node._saved_dilation, node._saved_transposed),
        *(node._saved_output_padding, node._saved_groups),
    ]
    backward = torch.ops.aten.convolution_backward
    diagonals = backward(s, x * x if needs[1] else x, w * w if needs[0] else w, *how, needs)
    gradients: Any = (None, None, None)
    wanted = [a and b for a, b in zip(step.wants_gradient, needs, strict=True)]
    if g is not None and any(wanted):
        gradients = backward(g, x, w, *how, wanted)
    return [
        Flow(gradient, diagonal) if want else None
        for gradient, diagonal, want in zip(gradients, diagonals, needs, strict=True)
    ]


@register_rule("Mul")
def mul(step: Step) -> Flows:
    """``y = a b``, of which each can be broadcast; a dropout is one."""
    return [_factor(step, at, ("other", "self")[at]) for at in range(len(step.wants))]


def _factor(step: Step, at: int, other: str) -> Flow | None:
    if not step.wants[at]:
        return None
    node, index = step.node.next_functions[at]
    shape = shape_of(node, index)
    b = step.saved(other)

    def before(v: Tensor, factor: Tensor) -> Tensor:
        return (v * factor).sum_to_size(shape)

    return step.linear(at, lambda g: before(g, b), lambda s: before(s, b * b))


@register_rule("Div", curved=True)
def div(step: Step) -> Flows:
    """``y = a / b``: ``-a / b²`` and ``2 a / b³`` in b."""
    b = step.saved("other")
    flows: list[Flow | None] = [None, None]
    if step.wants[0]:
        shape = shape_of(*step.node.next_functions[0])
        flows[0] = step.linear(
            0, lambda g: (g / b).sum_to_size(shape), lambda s: (s / b**2).sum_to_size(shape)
        )
    if len(step.wants) > 1 and step.wants[1]:
        shape = shape_of(*step.node.next_functions[1])
        a, g = step.saved("self"), step.flow.gradient
        first = -a / b**2
        flow = step.linear(
            1, lambda g: (g * first).sum_to_size(shape), lambda s: (s * first**2).sum_to_size(shape)
        )
        if step.curved:
            assert flow is not None and g is not None
            flow.diagonal = flow.diagonal + (g * 2 * a / b**3).sum_to_size(shape)
        flows[1] = flow
    return flows


@register_rule("Add", "Sub")
def add(step: Step) -> Flows:
    """``y = a ± α b``: residual sums, biases."""
    return _sums(step, (1.0, float(step.node._saved_alpha)))


@register_rule("Rsub")
def rsub(step: Step) -> Flows:
    """``y = b - α a``."""
    return _sums(step, (float(step.node._saved_alpha), 1.0))


def _sums(step: Step, factors: tuple[float, ...]) -> list[Flow | None]:
    g, s = step.flow.gradient, step.flow.diagonal
    wanted = any(step.wants_gradient) and g is not None
    gradients = step.pulled([g]) if wanted else [None] * len(step.wants)
    flows: list[Flow | None] = []
    for at, (factor, want) in enumerate(zip(factors, step.wants, strict=False)):
        if not want:
            flows.append(None)
            continue
        diagonal = s.sum_to_size(shape_of(*step.node.next_functions[at]))
        flows.append(Flow(gradients[at], diagonal if factor == 1 else factor**2 * diagonal))
    return flows
