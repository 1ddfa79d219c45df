"""Normalisations: by constants, or by statistics of the entries themselves."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tnconv.recursions.step import Flow, Flows, Step, register_rule

Shape = Sequence[int]


@register_rule("NativeLayerNorm", curved=True)
def layer_norm(step: Step) -> Flows:
    """Normalised over the last dimensions, which the weight has."""
    x, mean, rstd = (step.saved(name) for name in ("input", "result1", "result2"))
    shape = tuple(step.node._saved_normalized_shape)
    dims = tuple(range(x.dim() - len(shape), x.dim()))
    weight = step.saved("weight") if step.node._saved_weight is not None else None
    return _normalised(step, (x - mean) * rstd, rstd, weight, shape, dims)


@register_rule("NativeGroupNorm", curved=True)
def group_norm(step: Step) -> Flows:
    """Normalised over the channels of a group and all positions."""
    node, x = step.node, step.saved("input")
    shape = (node._saved_N, node._saved_group, -1, node._saved_HxW)
    mean, rstd = (step.saved(name)[:, :, None, None] for name in ("result1", "result2"))
    weight, own = node._saved_weight, (1, node._saved_group, -1, 1)
    if weight is not None:
        weight = step.saved("weight").reshape(own)
    grouped = [None if f is None else _reshaped(f, shape) for f in step.flows]
    inner = Step(node, grouped, step.wants, step.wants_gradient, step.curved)
    columns = (1, node._saved_group, node._saved_C // node._saved_group, 1)
    before, *parameters = _normalised(
        inner, (x.reshape(shape) - mean) * rstd, rstd, weight, columns, (2, 3)
    )
    flat = [None if f is None else _reshaped(f, (node._saved_C,)) for f in parameters]
    return [None if before is None else _reshaped(before, x.shape), *flat]


@register_rule("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", curved=True)
def batch_norm(step: Step) -> Flows:
    """Normalised over all dimensions but channels: in training mode, and in instance norms."""
    node, x = step.node, step.saved("input")
    channels = (1, -1, *[1] * (x.dim() - 2))
    weight = step.saved("weight").reshape(channels) if node._saved_weight is not None else None
    names = ("result1", "result2") if node._saved_training else ("running_mean", "running_var")
    mean, spread = (step.saved(name).reshape(channels) for name in names)
    rstd = spread if node._saved_training else (spread + node._saved_eps).rsqrt()
    dims = (0, *range(2, x.dim())) if node._saved_training else ()
    shape = (1, x.shape[1], *[1] * (x.dim() - 2))
    before, *parameters = _normalised(step, (x - mean) * rstd, rstd, weight, shape, dims)
    flat = [None if f is None else _reshaped(f, (x.shape[1],)) for f in parameters]
    return [before, *flat]


def _normalised(
    step: Step,
    y: Tensor,  # normalised
    rstd: Tensor,
    weight: Tensor | None,
    shape: Shape,  # of the weight and the bias
    dims: tuple[int, ...],
) -> Flows:
    """``x -> weight y + bias``, where y is normalised over ``dims``, or by constants."""
    flow = step.flow
    w = y.new_ones(()) if weight is None else weight
    flows: list[Flow | None] = [None, None, None]
    if len(step.wants) > 1 and step.wants[1]:
        flows[1] = step.linear(
            1, lambda g: (g * y).sum_to_size(shape), lambda s: (s * y * y).sum_to_size(shape)
        )
    if len(step.wants) > 2 and step.wants[2]:
        flows[2] = step.linear(2, lambda g: g.sum_to_size(shape), lambda s: s.sum_to_size(shape))
    if step.wants[0]:
        g = None if flow.gradient is None else flow.gradient * w
        inner = Flow(g, flow.diagonal * w * w)
        if dims:
            flows[0] = standardised(inner, y, rstd, dims, step.curved)
        else:
            flows[0] = Flow(None if g is None else g * rstd, inner.diagonal * rstd * rstd)
    return flows


def standardised(flow: Flow, y: Tensor, rstd: Tensor, dims: tuple[int, ...], curved: bool) -> Flow:
    """Before ``y = r (x - mean)`` over D entries, with ``r² (variance + ε) = 1``.

    ``J[o, i] = r (δ_oi - (1 + y_o y_i) / D)``, so that with ``S_k = Σ_o s_o y_o^k``

        ``Σ_o J[o, i]² s_o = r² (s_i (1 - 2 (1 + y_i²) / D) + (S_0 + 2 y_i S_1 + y_i² S_2) / D²)``,
        ``Σ_o g_o ∂²y_o / ∂x_i² = -r / D (2 y_i (Jᵀ g)_i + J[i, i] Σ_o g_o y_o)``.
    """
    g, s, count = flow.gradient, flow.diagonal, 1
    for dim in dims:
        count *= y.shape[dim]
    y2 = y * y
    s0, s1, s2 = (each.sum(dims, keepdim=True) for each in (s, s * y, s * y2))
    own = s * (1 - 2 / count * (1 + y2))
    diagonal = rstd**2 * (own + (s0 + 2 * y * s1 + y2 * s2) / count**2)
    if g is None:
        return Flow(None, diagonal)
    g0, g1 = g.sum(dims, keepdim=True), (g * y).sum(dims, keepdim=True)
    before = rstd * (g - (g0 + y * g1) / count)
    if curved:
        slope = rstd * (1 - (1 + y2) / count)
        diagonal = diagonal - rstd / count * (2 * y * before + slope * g1)
    return Flow(before, diagonal)


def _reshaped(flow: Flow, shape: Shape | torch.Size) -> Flow:
    g = flow.gradient
    return Flow(None if g is None else g.reshape(shape), flow.diagonal.reshape(shape))
