"""Operations whose Jacobian has entries 0 and 1, or one entry in every row and column.

A Jacobian of zeros and ones is its own square, so that s goes the way that gradients go.
"""

import torch
from torch import Tensor

from tnconv.recursions.step import Flow, Flows, Step, register_rule

VIEWS = (
    "View UnsafeView Reshape ReshapeAlias Squeeze Unsqueeze Transpose Permute Movedim Alias Clone"
    " Contiguous Flip Roll PixelShuffle PixelUnshuffle ChannelShuffle"
).split()
"""Permutations of entries."""

SELECTIONS = (
    "Expand Repeat Slice Select Narrow Split SplitWithSizes UnsafeSplit UnsafeSplitWithSizes Unbind"
    " Cat Stack Diagonal Tril Triu Index IndexSelect Gather MaskedFill MaskedSelect Where"
    " ConstantPadNd ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D"
    " ReplicationPad2D ReplicationPad3D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D"
    " UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D MaxPool2DWithIndices"
    " MaxPool3DWithIndices AdaptiveMaxPool2D AdaptiveMaxPool3D MaxUnpool2D MaxUnpool3D Topk"
    " Sort Im2Col Col2Im Unfold Sum Cumsum Relu Threshold Hardtanh Hardshrink Softshrink Clamp"
    " ClampMin ClampMax AsStrided Lift"
).split()
"""Every entry of a result is a sum of entries of the inputs, or a constant."""


@register_rule(*VIEWS, *SELECTIONS)
def select(step: Step) -> Flows:
    """``s_x = Jᵀ s``: every entry of J is 0 or 1."""
    diagonals = step.pulled([None if f is None else f.diagonal for f in step.flows])
    gradients: tuple[Tensor | None, ...] = ()
    given = [None if f is None else f.gradient for f in step.flows]
    if any(step.wants_gradient) and any(g is not None for g in given):
        gradients = step.pulled(given)
    return [
        None if s is None or not wanted else Flow(gradients[at] if gradients else None, s)
        for at, (s, wanted) in enumerate(zip(diagonals, step.wants, strict=False))
    ]


@register_rule("Max", "Min")
def extreme(step: Step) -> Flows:
    """One entry is selected, unless it is over all dimensions, where equal ones share."""
    if not hasattr(step.node, "_saved_indices"):
        raise NotImplementedError("equal entries share an extreme over all; expected a dim")
    return select(step)


@register_rule("Embedding")
def embedding(step: Step) -> Flows:
    """Rows are selected, unless autograd scales what it calls their gradient."""
    if step.node._saved_scale_grad_by_freq:
        raise NotImplementedError("scale_grad_by_freq is set: its gradient is none of the loss")
    return select(step)


@register_rule("T")
def transpose(step: Step) -> Flows:
    """A linear layer's weight: without the detour through the node."""
    g, s = step.flow.gradient, step.flow.diagonal
    return (Flow(g.t() if g is not None and step.wants_gradient[0] else None, s.t()),)


@register_rule("ToCopy")
def cast(step: Step) -> Flows:
    """Another dtype, in which g and s need not be, or another device."""
    g, s = step.flow.gradient, step.flow.diagonal
    node, at = step.node.next_functions[0]
    device = step.node(s).device if hasattr(node, "variable") else node._input_metadata[at].device
    return (Flow(None if g is None else g.to(device), s.to(device)),)


@register_rule(
    "LeakyRelu", "RreluWithNoise", "Hardsigmoid", "Abs", "Neg", "NativeDropout", diagonal=True
)
def scaled(step: Step) -> Flows:
    """``s_x = Jᵀ Jᵀ s``: J is diagonal, and constant in between bends."""
    (once,) = step.pulled([step.flow.diagonal])[:1]
    (twice,) = step.pulled([once])[:1]
    g = step.flow.gradient
    gradient = step.pulled([g])[0] if g is not None and step.wants_gradient[0] else None
    assert twice is not None
    return (Flow(gradient, twice),)


@register_rule("CopySlices")
def copied(step: Step) -> Flows:
    """Entries that are written into others, as circular padding writes them.

    What is written is unknown to the graph: it is a copy if J has zeros and ones alone, with at
    most one in a column, for which ``Jᵀ u² = (Jᵀ u)²`` tells with a random u.
    """
    s = step.flow.diagonal
    generator = torch.Generator(s.device).manual_seed(0)
    u = torch.empty_like(s).uniform_(1, 2, generator=generator)
    once, squares = step.pulled([u]), step.pulled([u.square()])
    for one, other in zip(once, squares, strict=True):
        if one is not None and other is not None and not torch.allclose(one.square(), other):
            raise NotImplementedError("a tensor is changed in place, by more than copies")
    return select(step)
