"""The recursion over an autograd graph: from a model's output to its parameters.

The graph is walked here, not by autograd's engine with hooks, which costs several times as much
for small networks. Nothing is written onto the model, and the graph stays as it is.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from tnconv.recursions.coupled_columns import Spread, spread
from tnconv.recursions.plan import Plan, made
from tnconv.recursions.rearrangements import VIEWS
from tnconv.recursions.step import Flow, Flows, Step, operation

Tap = Callable[[Flow], None]
Taps = Mapping[tuple[Node, int], Tap]
"""What is told the flow after some values, by the node and the number of its result."""
KEEPING = frozenset(["T", *VIEWS])
Sent = tuple[tuple[Node, int], Flow | Spread]


def recursion(
    start: GradientEdge,
    flow: Flow | Spread,
    parameters: Collection[Tensor],
    curved: bool = True,
    gradients: bool = False,
    describe: Callable[[Node], str] = lambda node: operation(node),
    taps: Taps | None = None,
) -> dict[Tensor, Flow]:
    """The flow before each parameter that a value depends on, from the one after that value.

    Args:
        start: the value's place in the graph.
        flow: what arrives there, with a gradient if anything is curved.
        parameters: those that count.
        curved: whether second derivatives of operations count.
        gradients: whether the parameters' gradients are wanted, too.
        describe: names a node in an error.
        taps: told the flow after some values on the way.

    Raises:
        NotImplementedError: an operation without a rule.
    """
    taps = taps or {}
    plan = made(start.node, parameters, describe, taps)
    arrived: dict[Node, dict[int, Flow | Spread]] = {start.node: {start.output_nr: flow}}
    found: dict[Tensor, Flow] = {}
    with torch.no_grad():
        for node in plan.order:
            here = arrived.pop(node, None)
            if here is None:
                continue
            for at, each in here.items() if taps else ():
                if (node, at) in taps:
                    taps[node, at](each.total())
            if node not in plan.rules:
                found[node.variable] = here[0].total()  # type: ignore[attr-defined]
                continue
            try:
                sent = _before(plan, node, here, curved, gradients)
            except NotImplementedError as reason:
                raise NotImplementedError(f"{describe(node)}: {reason}") from reason
            for (below, at), each in sent:
                held = arrived.setdefault(below, {})
                held[at] = held[at].total().plus(each.total()) if at in held else each
    return found


def _before(
    plan: Plan, node: Node, here: Mapping[int, Flow | Spread], curved: bool, gradients: bool
) -> list[Sent]:
    """What is before the inputs of one node."""
    rule, ends = plan.rules[node], plan.ends(node)
    wants = [end is not None and plan.leads[end] for end, _ in ends]
    wanted = [
        want and (gradients or (curved and plan.bends[end]))  # type: ignore[index]
        for want, (end, _) in zip(wants, ends, strict=True)
    ]

    def run(flows: Flows, everything: bool) -> Flows:
        return rule.rule(Step(node, flows, wants, wants if everything else wanted, curved))

    moved: Sequence[Flow | Spread | None]
    only = here.get(0) if len(here) == 1 else None
    if type(only) is Flow:
        moved = run([only], False)
    elif type(only) is Spread:
        name = operation(node)
        moved = spread(only, run, name, rule.diagonal or name in KEEPING)
    else:
        totals = {at: each.total() for at, each in here.items()}
        moved = run([totals.get(at) for at in range(len(node._input_metadata))], False)
    return [
        ((end, at), flow)
        for (end, at), flow in zip(ends, moved, strict=False)
        if end is not None and flow is not None
    ]
