"""What a recursion does with every node of a graph: found before any work."""

from collections.abc import Callable, Collection, Container
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from tnconv.recursions import padded
from tnconv.recursions.entrywise import region
from tnconv.recursions.memory_saving import torch_convolution
from tnconv.recursions.step import Flows, Known, Step, known, operation

End = tuple[Node | None, int]
Edge = tuple[Node, int]

JOINS = frozenset("Add Sub Rsub Mul Div Where".split())
"""Entrywise functions of two tensors; of one tensor, where both are functions of it."""
INSIDE = frozenset("Relu Threshold Hardtanh Hardshrink Softshrink Clamp ClampMin ClampMax".split())
"""Selections that are entrywise."""


@dataclass
class Plan:
    """Nodes in the order of the walk, with their rules; parameters have none."""

    order: list[Node]
    below: dict[Node, tuple[End, ...]]
    leads: dict[Node, bool] = field(default_factory=dict)  # to a parameter that counts
    bends: dict[Node, bool] = field(default_factory=dict)  # or is itself curved
    at: dict[Node, int] = field(default_factory=dict)  # counted from the parameters
    rules: dict[Node, Known] = field(default_factory=dict)
    joined: dict[Node, tuple[End, ...]] = field(default_factory=dict)

    def ends(self, node: Node) -> tuple[End, ...]:
        """Where a node's inputs come from, or those of an operation that it is the last of."""
        return self.joined[node] if node in self.joined else self.below[node]


def made(
    root: Node,
    parameters: Collection[Tensor],
    describe: Callable[[Node], str],
    taps: Container[Edge] = (),
) -> Plan:
    """The nodes that lead from a root to parameters, users first.

    Raises:
        NotImplementedError: one without a rule.
    """
    wanted = {id(p) for p in parameters}
    order, below = users_last(root)
    plan = Plan([], below)
    leads, bends = plan.leads, plan.bends
    for node in order:
        lead = bend = False
        for input_, _ in below[node]:
            if input_ is not None and leads[input_]:
                lead, bend = True, bend or bends[input_]
        leads[node], bends[node] = lead, bend
        if lead:
            name, rule = known(node)
            if rule is None:
                raise _unknown(name, describe(node))
            plan.at[node] = len(plan.order)
            plan.order.append(node)
            plan.rules[node] = rule
            bends[node] = bend or rule.curved
            if name in JOINS or name in ("Convolution", "Bilinear"):
                _join(plan, node, name, taps)
        elif not below[node] and id(getattr(node, "variable", None)) in wanted:
            leads[node] = True
            plan.order.append(node)
    plan.order.reverse()
    return plan


def _unknown(name: str, described: str) -> NotImplementedError:
    what = "an operation that tnconv.recursions knows, or register_rule for it"
    if name.startswith("ScaledDotProduct"):
        what = "the model to run under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    return NotImplementedError(
        f"no rule says how second derivatives go backwards through {described}; expected {what}"
    )


def users_last(root: Node) -> tuple[list[Node], dict[Node, tuple[End, ...]]]:
    """The nodes that a node depends on, itself last, and where the inputs of each come from."""
    order, below = list[Node](), dict[Node, tuple[End, ...]]()
    waiting: list[tuple[Node, bool]] = [(root, False)]
    while waiting:
        node, done = waiting.pop()
        if done:
            order.append(node)
        elif node not in below:
            below[node] = inputs = node.next_functions
            waiting.append((node, True))
            waiting += [(n, False) for n, _ in inputs if n is not None and n not in below]
    return order, below


def _join(plan: Plan, node: Node, name: str, taps: Container[Edge]) -> None:
    """Note where a node is the last of an operation that several nodes make."""
    if name in JOINS:
        end = _common(plan, node, taps) if len(_leading(plan, node)) > 1 else None
        if end is not None:
            rule = partial(_region, GradientEdge(*end))
            plan.rules[node] = Known(rule, curved=True, diagonal=True)
            plan.joined[node] = (end,)
            plan.bends[node] = True
    else:
        pad, layer = plan.below[node][0][0], torch_convolution(node)
        leads = pad is not None and plan.leads[pad] and layer is not None
        found = padded.rule(layer, pad) if leads else None
        if pad is not None and found is not None:
            plan.rules[node] = replace(plan.rules[node], rule=found)
            plan.joined[node] = (plan.below[pad][0], *plan.below[node][1:])


def _region(end: GradientEdge, step: Step) -> Flows:
    return (region(step, end),)


def _common(plan: Plan, node: Node, taps: Container[Edge]) -> Edge | None:
    """The one tensor of which an entrywise function of several tensors is a function."""
    edges, shape = {*_leading(plan, node)}, _shape((node, 0))
    while len(edges) > 1:
        top = max(edges, key=lambda edge: plan.at.get(edge[0], -1))
        if not _is_entrywise(plan, top, shape) or top in taps:
            return None
        edges = (edges - {top}) | {*_leading(plan, top[0])}
    (end,) = edges
    return end if _shape(end) == shape else None


def _leading(plan: Plan, node: Node) -> list[Edge]:
    return [(n, at) for n, at in plan.below[node] if n is not None and plan.leads[n]]


def _is_entrywise(plan: Plan, edge: Edge, shape: list[int]) -> bool:
    node, at = edge
    if node not in plan.rules or at or _shape(edge) != shape:
        return False
    name = operation(node)
    return plan.rules[node].diagonal or name in JOINS or name in INSIDE


def _shape(edge: Edge) -> list[int]:
    node: Any = edge[0]
    variable = getattr(node, "variable", None)
    return list(node._input_metadata[edge[1]].shape if variable is None else variable.shape)
