"""Several vectors at once through an autograd graph, of all samples or of some.

Autograd's engine sends one vector at a time through the rows of a whole batch. Here ``v[m, r, *y]``
are m vectors at rows r of dimension 0 of a value y: kernels take both as one batch. Rows are told
apart by what operations do, not by sizes: each rule takes rows of dimension 0 after an operation to
the same rows before it, and there are as many for each sample, one sample after the other. Where
one operation on the way has no such rule there is no plan, and nothing was done.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from tnconv.displays import Shown
from tnconv.recursions.column_step import At, ColumnRule, Rows, column_rule
from tnconv.recursions.plan import Edge, End, users_last
from tnconv.recursions.step import shape_of

Take = Callable[[Tensor], None]


@dataclass(repr=False)
class ColumnPlan(Shown):
    """The nodes between a value and some others, users first.

    Args:
        start: where vectors come from.
        order: the nodes, users first.
        wants: for each node which of its inputs lead to an end.
        rules: that of each node.
    """

    start: Edge
    order: list[Node]
    wants: dict[Node, tuple[bool, ...]]
    rules: dict[Node, ColumnRule] = field(default_factory=dict)

    def send(self, vectors: Tensor, rows: Rows, takes: Mapping[Edge, Take]) -> None:
        """Take vectors ``(m, r, *y)`` after the start to all ``takes``, in the order of the walk.

        Raises:
            RuntimeError: a saved tensor that was changed in place, or freed.
        """
        arrived: dict[Node, dict[int, tuple[Tensor, bool]]] = {
            self.start[0]: {self.start[1]: (vectors, False)}
        }
        kind = vectors.device.type
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            for node in self.order:
                here = arrived.pop(node, {})
                for nr, (v, _) in here.items():
                    if (take := takes.get((node, nr))) is not None:
                        take(v)
                        here[nr] = v, False
                if node in self.rules and here:
                    self._pass_on(node, *here[0], rows, arrived)

    def _pass_on(
        self,
        node: Node,
        v: Tensor,
        mine: bool,
        rows: Rows,
        arrived: dict[Node, dict[int, tuple[Tensor, bool]]],
    ) -> None:
        wants = self.wants[node]
        mine = mine and sum(wants) == 1
        found = self.rules[node](At(node, wants, rows, mine), v)
        own = v.untyped_storage().data_ptr()
        for each, (below, nr) in zip(found, node.next_functions, strict=False):
            if each is None or below is None:
                continue
            fresh = each.is_contiguous() and (mine or each.untyped_storage().data_ptr() != own)
            held = arrived.setdefault(below, {})
            if nr in held:
                before, free = held[nr]
                held[nr] = (before.add_(each) if free else before + each), True
            else:
                held[nr] = each, fresh


def column_plan(start: GradientEdge, ends: Sequence[Edge], samples: int = 1) -> ColumnPlan | None:
    """How vectors go from a value to the ends; None where an operation has no rule for columns.

    ``samples`` is how many the rows of dimension 0 are of, if some are to be chosen.
    """
    order, below = users_last(start.node)
    targets = {node for node, _ in ends}
    leads: dict[Node, bool] = {}
    plan = ColumnPlan((start.node, start.output_nr), [], {})
    for node in order:
        wants = tuple(n is not None and leads[n] for n, _ in below[node])
        leads[node] = node in targets or any(wants)
        if not leads[node]:
            continue
        plan.order.append(node)
        if any(wants):
            rule = column_rule(node, wants)
            if rule is None or not _keeps_rows(node, wants, below[node], samples):
                return None
            plan.wants[node], plan.rules[node] = wants, rule
    plan.order.reverse()
    return plan


def _keeps_rows(node: Any, wants: Sequence[bool], below: Sequence[End], samples: int) -> bool:
    """Whether a node has one result, and rows of every sample on all sides."""
    if len(node._input_metadata) < 1 or not samples:
        return False
    shapes = [tuple(node._input_metadata[0].shape)]
    shapes += [shape_of(n, at) for want, (n, at) in zip(wants, below, strict=True) if want and n]
    return all(shape and not shape[0] % samples for shape in shapes)
