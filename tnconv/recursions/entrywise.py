"""Functions of single entries, and those that couple the entries of one dimension."""

from math import pi, sqrt

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from tnconv.recursions.step import Flow, Flows, Step, register_rule

ENTRYWISE = (
    "LogSigmoid Mish Celu Hardswish Pow Exp Exp2 Expm1 Log Log2 Log10 Log1P Sqrt Rsqrt Reciprocal"
    " Sin Cos Tan Sinh Cosh Asin Acos Atan Asinh Acosh Atanh Erf Erfc Erfinv Lgamma Logit Sinc"
).split()
"""Functions of single entries whose derivatives autograd is asked for."""


@register_rule(*ENTRYWISE, curved=True, diagonal=True)
def entrywise(step: Step) -> Flows:
    """``f' = Jᵀ 1``, and f'' is its derivative."""
    edges = [GradientEdge(*edge) for edge in step.node.next_functions]
    if len(edges) > 1 and edges[1].node is not None:
        raise NotImplementedError("an exponent depends on a parameter")
    with torch.enable_grad():
        (first,) = step.pulled([torch.ones_like(step.flow.diagonal)])[:1]
        assert first is not None
        return step.entrywise(first.detach(), _derivative(first, edges[0], step.curved))


def region(step: Step, end: GradientEdge) -> Flow:
    """Functions of single entries of one tensor, put together, such as ``x / (1 + |x|)``.

    ``end`` is where that tensor comes from: between it and the node every path counts.
    """
    ones, start = torch.ones_like(step.flow.diagonal), GradientEdge(step.node, 0)
    (meta,) = step.node._input_metadata
    with torch.enable_grad():
        (first,) = torch.autograd.grad((start,), (end,), ones.to(meta.dtype), create_graph=True)
        second = _derivative(first, end, step.curved)
    (found,) = step.entrywise(first.detach().to(ones), None if second is None else second.to(ones))
    assert found is not None
    return found


def _derivative(first: Tensor, end: GradientEdge, curved: bool) -> Tensor | None:
    if not curved or not first.requires_grad:
        return None
    (found,) = torch.autograd.grad(
        (first,), (end,), torch.ones_like(first), retain_graph=True, allow_unused=True
    )
    return None if found is None else found.detach()


@register_rule("Tanh", curved=True, diagonal=True)
def tanh(step: Step) -> Flows:
    """``f' = 1 - y²``, ``f'' = -2 y f'``: ``s_x = f' (f' s - 2 y g)``."""
    y, g, s = step.saved("result"), step.flow.gradient, step.flow.diagonal
    times_slope = torch.ops.aten.tanh_backward
    s = times_slope(s, y)
    if step.curved:
        assert g is not None
        s.addcmul_(y, g, value=-2)
    gradient = times_slope(g, y) if g is not None and step.wants_gradient[0] else None
    return (Flow(gradient, times_slope(s, y)),)


@register_rule("Sigmoid", curved=True, diagonal=True)
def sigmoid(step: Step) -> Flows:
    """``f' = y (1 - y)``, ``f'' = f' (1 - 2 y)``."""
    y = step.saved("result")
    first = y - y * y
    return step.entrywise(first, first * (1 - 2 * y) if step.curved else None)


@register_rule("Silu", curved=True, diagonal=True)
def silu(step: Step) -> Flows:
    """``f = x σ``, ``f' = σ + x σ'``, ``f'' = 2 σ' + x σ''``."""
    x = step.saved("self")
    y = x.sigmoid()
    slope = y - y * y
    return step.entrywise(y + x * slope, slope * (2 + x * (1 - 2 * y)) if step.curved else None)


@register_rule("Gelu", curved=True, diagonal=True)
def gelu(step: Step) -> Flows:
    """``f = x Φ(x)``, ``f' = Φ + x φ``, ``f'' = (2 - x²) φ``; the tanh form by autograd."""
    if step.node._saved_approximate != "none":
        return entrywise(step)
    x = step.saved("self")
    density = torch.exp(-0.5 * x * x) / sqrt(2 * pi)
    first = torch.special.ndtr(x) + x * density
    return step.entrywise(first, (2 - x * x) * density if step.curved else None)


@register_rule("Softplus", curved=True, diagonal=True)
def softplus(step: Step) -> Flows:
    """``f' = σ(β x)``, ``f'' = β σ (1 - σ)``, and 1 and 0 where β x is above the threshold."""
    beta, threshold = step.node._saved_beta, step.node._saved_threshold
    x = beta * step.saved("self")
    y = torch.where(x > threshold, 1, x.sigmoid())
    return step.entrywise(y, beta * (y - y * y) if step.curved else None)


@register_rule("Elu", curved=True, diagonal=True)
def elu(step: Step) -> Flows:
    """``f = c x`` where x > 0, else ``α c (e^{b x} - 1)``: ELU and SELU."""
    node = step.node
    if not hasattr(node, "_saved_self"):  # in place: the result was saved
        return entrywise(step)
    x, b, c = step.saved("self"), node._saved_input_scale, node._saved_scale
    below = node._saved_alpha * c * b * torch.exp(b * x.clamp(max=0))
    positive = x > 0
    return step.entrywise(torch.where(positive, c, below), torch.where(positive, 0, b * below))


@register_rule("Softmax", "SafeSoftmax", curved=True)
def softmax(step: Step) -> Flows:
    """``J[o, i] = y_o (δ_oi - y_i)``, ``∂²y_o / ∂x_i² = y_o (δ_oi - y_i)² - y_o y_i (1 - y_i)``."""
    y, g, s = step.saved("result"), step.flow.gradient, step.flow.diagonal
    dim = step.node._saved_dim
    dim = dim if dim < y.dim() else dim - 2**64
    square, tilt = y * y, y * (1 - 2 * y)
    found = y * tilt * s + square * (square * s).sum(dim, keepdim=True)
    if step.curved:
        assert g is not None
        mean = (y * g).sum(dim, keepdim=True)
        found = found + tilt * g + (2 * square - y) * mean
    return (Flow(_gradient(step), found),)


@register_rule("LogSoftmax", curved=True)
def log_softmax(step: Step) -> Flows:
    """``J[o, i] = δ_oi - p_i``, ``∂²y_o / ∂x_i² = -p_i (1 - p_i)``."""
    p, g, s = step.saved("result").exp(), step.flow.gradient, step.flow.diagonal
    dim = step.node._saved_dim
    dim = dim if dim < p.dim() else dim - 2**64
    found = s * (1 - 2 * p) + p * p * s.sum(dim, keepdim=True)
    if step.curved:
        assert g is not None
        found = found - (p - p * p) * g.sum(dim, keepdim=True)
    return (Flow(_gradient(step), found),)


@register_rule("Glu", curved=True)
def glu(step: Step) -> Flows:
    """``y = a σ(b)`` for the halves a and b of x."""
    x, g, s = step.saved("self"), step.flow.gradient, step.flow.diagonal
    dim = step.node._saved_dim
    dim = dim if dim < x.dim() else dim - 2**64
    a, b = x.chunk(2, dim)
    y = b.sigmoid()
    slope = y - y * y
    gate = (a * slope).square() * s
    if step.curved:
        assert g is not None
        gate = gate + a * slope * (1 - 2 * y) * g
    return (Flow(_gradient(step), torch.cat([y * y * s, gate], dim)),)


@register_rule("PreluKernel")
def prelu(step: Step) -> Flows:
    """``y = x`` where x > 0, else ``w x``: linear in each of both."""
    x, w = step.saved("self"), step.saved("weight")
    positive = x > 0
    slope, below = torch.where(positive, 1, w), torch.where(positive, 0, x)

    def before_weight(v: Tensor, factor: Tensor) -> Tensor:
        return (v * factor).sum_to_size(w.shape)

    return (
        step.linear(0, lambda g: g * slope, lambda s: s * slope.square()),
        step.linear(1, lambda g: before_weight(g, below), lambda s: before_weight(s, below**2)),
    )


def _gradient(step: Step) -> Tensor | None:
    g = step.flow.gradient
    return step.pulled([g])[0] if g is not None and step.wants_gradient[0] else None
