"""Cross-entropy's whole Hessian, kept until the last layer: the recursion's first coupling.

``∂²L / ∂a² = diag(s) - Σ_m u_m u_mᵀ`` at the logits, with few columns u. Through views and
functions of single entries it keeps that form; before a layer with Jacobian J its diagonal is
``(J∘J)ᵀ s - Σ_m (Jᵀ u_m)²``. Parameters of the last two linear layers then have exact diagonals.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tnconv.recursions.step import Flow, Flows

INPUTS = {"Addmm": 1, "Mm": 0, "Convolution": 0, "Bilinear": 0}
"""Layers, and which of their operands is the input."""


@dataclass
class Spread:
    """A flow, and the columns ``(m, *shape)`` whose squares are to be taken off."""

    flow: Flow
    columns: Tensor

    def total(self) -> Flow:
        """The diagonal alone."""
        s = self.flow.diagonal - self.columns.square().sum(0)
        return Flow(self.flow.gradient, s)


Run = Callable[[Flows, bool], Flows]
"""A rule, and whether the gradients before all inputs are wanted."""


def spread(first: Spread, run: Run, name: str, keeps: bool) -> Sequence[Flow | Spread | None]:
    """A rule, run on a flow with columns; ``keeps`` says that every column stays one."""
    flow, columns = first.flow, first.columns
    found: list[Flow | Spread | None] = [*run([first.total()], False)]
    if not (keeps or name == "Add" or name in INPUTS):
        return found
    whole = run([flow], False)
    pulled = [run([Flow(u, flow.diagonal)], True) for u in columns]
    for at, each in enumerate(whole):
        before = [_gradient(flows[at]) for flows in pulled if flows[at] is not None]
        if each is None or not before:
            continue
        if name in INPUTS and at == INPUTS[name]:
            found[at] = Spread(each, torch.stack(before)).total()
        elif name not in INPUTS and each.diagonal.numel() == flow.diagonal.numel():
            found[at] = Spread(each, torch.stack(before))
    return found


def _gradient(flow: Flow | None) -> Tensor:
    assert flow is not None and flow.gradient is not None
    return flow.gradient
