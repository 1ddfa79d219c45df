"""Several vectors at once through an autograd graph, of all samples or of some.

Autograd's engine sends one vector at a time through the rows of a whole batch. Here ``v[m, r, *y]``
are m vectors at rows r of dimension 0 of a value y: kernels take both as one batch. Rows are told
apart by what operations do, not by sizes: each rule takes rows of dimension 0 after an operation to
the same rows before it, and there are as many for each sample, one sample after the other. Where
one operation on the way has no such rule there is no plan, and nothing was done.
"""

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from tnconv.displays import Shown
from tnconv.recursions.column_step import At, ColumnRule, Rows, column_rule, passed, rule_of_two
from tnconv.recursions.plan import Edge, End, users_last
from tnconv.recursions.step import shape_of

Take = Callable[[Tensor, Rows], None]
"""Told vectors after a value, and which rows they are of."""
Front = dict[Node, dict[int, tuple[Tensor, bool]]]
"""Vectors that wait at the results of nodes, and whether they may be changed in place."""
LARGE = 2**23  # bytes of vectors that go through one operation at a time: what heaps reuse


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

    def send(
        self, vectors: Tensor, rows: Rows, takes: Mapping[Edge, Take], block: int | None = None
    ) -> None:
        """Take vectors ``(m, r, *y)`` after the start to all ``takes``, in the order of the walk.

        From where what an operation makes of them exceeds ``block`` bytes, samples go on a block
        after the other: each then stays in the cache from operation to operation. One vector alone
        is no larger than the gradient, and goes by torch's own kernels.

        Args:
            vectors: after the start, at the rows.
            rows: the samples that they are of.
            takes: told what arrives at a value: all samples once, or block by block.
            block: bytes from which on samples are sent in blocks, or None.

        Raises:
            RuntimeError: a saved tensor that was changed in place, or freed.
        """
        arrived: Front = {self.start[0]: {self.start[1]: (vectors, False)}}
        kind = vectors.device.type
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            self._walk(0, arrived, rows, takes, block if len(vectors) > 1 else None)

    def _walk(
        self, begin: int, arrived: Front, rows: Rows, takes: Mapping[Edge, Take], block: int | None
    ) -> None:
        """The nodes from a place of the order on."""
        for place, node in enumerate(self.order[begin:], begin):
            if node in self.rules and block and (count := self._made(node, arrived, rows) // block):
                blocks = rows.blocks(count + 1)
                if len(blocks) > 1:
                    for each in blocks:
                        self._walk(place, _narrowed(arrived, rows, each), each, takes, block)
                    return
            here = arrived.pop(node, {})
            for nr, (v, _) in here.items():
                if (take := takes.get((node, nr))) is not None:
                    take(v, rows)
                    here[nr] = v, False
            if node in self.rules and here:
                self._pass_on(node, *here[0], rows, arrived)

    def _made(self, node: Node, arrived: Front, rows: Rows) -> int:
        """The bytes of all vectors before a node."""
        ends = zip(self.wants[node], node.next_functions, strict=True)
        below = sum(_bytes((end, nr), rows) for want, (end, nr) in ends if want and end is not None)
        return below * max((v.shape[0] for v, _ in arrived.get(node, {}).values()), default=0)

    def _pass_on(self, node: Node, v: Tensor, mine: bool, rows: Rows, arrived: Front) -> None:
        wants = self.wants[node]
        mine = mine and sum(wants) == 1
        found = _through(self.rules[node], At(node, wants, rows, mine), v)
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

    def held(self, rows: Rows, takes: Container[Edge]) -> tuple[int, dict[Edge, int]]:
        """What is held of each vector, in bytes: the most on the way, and while one is taken.

        Results that are views, or take the place of what they are made of, count as others do.
        """
        arrived: dict[Edge, int] = {self.start: _bytes(self.start, rows)}
        most, taken = arrived[self.start], dict[Edge, int]()
        for node in self.order:
            total = sum(arrived.values())
            here = [edge for edge in arrived if edge[0] is node]
            taken |= {edge: total for edge in here if edge in takes}
            if node in self.rules and here:
                ends = zip(self.wants[node], node.next_functions, strict=True)
                below = [(end, nr) for want, (end, nr) in ends if want and end is not None]
                most = max(most, total + sum(_bytes(edge, rows) for edge in below))
                arrived |= {edge: _bytes(edge, rows) for edge in below}
            for edge in here:
                del arrived[edge]
        return most, taken


def _narrowed(arrived: Front, rows: Rows, block: Rows) -> Front:
    """Views of vectors at a block of their rows."""
    return {
        node: {nr: (_block(v, rows, block), mine) for nr, (v, mine) in here.items()}
        for node, here in arrived.items()
    }


def _block(v: Tensor, rows: Rows, block: Rows) -> Tensor:
    each = v.shape[1] // rows.count
    return v.narrow(1, (block.begin - rows.begin) * each, block.count * each)


def _bytes(edge: Edge, rows: Rows) -> int:
    """What one vector at a value's rows takes."""
    node: Any = edge[0]
    dtype = (
        node.variable.dtype if hasattr(node, "variable") else node._input_metadata[edge[1]].dtype
    )
    return prod(rows.shape(shape_of(*edge))) * int(dtype.itemsize)


def _through(rule: ColumnRule, at: At, v: Tensor) -> Sequence[Tensor | None]:
    """What a rule makes of vectors, a few of them at a time where they are large.

    So whatever it holds beside its result is small. Results that are views are free for all.
    """
    few = max(1, LARGE * v.shape[0] // max(1, v.nbytes))
    if v.shape[0] <= few:
        return rule(at, v)
    first, *others = torch.split(v, few)
    found = rule(at, first)
    if not all(each is None or _is_same(each, first) or _is_new(each, v) for each in found):
        return rule(at, v)
    whole = [each if each is None else v if _is_same(each, first) else _room(each, len(v))
             for each in found]  # fmt: skip
    start = 0
    for part in (first, *others):
        for place, each in zip(whole, found if part is first else rule(at, part), strict=True):
            if place is not None and place is not v and each is not None:
                place[start : start + len(part)].copy_(each)
        start += len(part)
    return whole


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether a tensor was passed on, or changed in place."""
    alike = one.shape == other.shape and one.stride() == other.stride()
    return alike and one.data_ptr() == other.data_ptr()


def _is_new(each: Tensor, v: Tensor) -> bool:
    """Whether a result has memory of its own, for every entry."""
    if each.untyped_storage().data_ptr() == v.untyped_storage().data_ptr():
        return False
    return all(step or size == 1 for step, size in zip(each.stride(), each.shape, strict=True))


def _room(part: Tensor, count: int) -> Tensor:
    """Memory for as many vectors, each laid out as those of a part are."""
    return part.new_empty_strided((count, *part.shape[1:]), (part[0].numel(), *part.stride()[1:]))


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
    _join(plan, targets)
    return plan


def _join(plan: ColumnPlan, targets: Container[Node]) -> None:
    """Use rules of two operations at once, where nothing needs what is between them."""
    below = {
        node: [end for want, (end, _) in zip(wants, node.next_functions, strict=True) if want]
        for node, wants in plan.wants.items()
    }
    uses = Counter(end for ends in below.values() for end in ends)
    for node in plan.order:
        for end in below.get(node, ()):
            if end is None or end not in plan.rules or uses[end] > 1 or end in targets:
                continue
            if (both := rule_of_two(plan.rules[node], plan.rules[end])) is not None:
                plan.rules[node], plan.rules[end] = both, passed


def _keeps_rows(node: Any, wants: Sequence[bool], below: Sequence[End], samples: int) -> bool:
    """Whether a node has one result, and rows of every sample on all sides."""
    if len(node._input_metadata) < 1 or not samples:
        return False
    shapes = [tuple(node._input_metadata[0].shape)]
    shapes += [shape_of(n, at) for want, (n, at) in zip(wants, below, strict=True) if want and n]
    return all(shape and not shape[0] % samples for shape in shapes)
