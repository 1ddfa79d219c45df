"""The operations below some tensors of an autograd graph, in an order that returns with the graph.

Batches of one kind make new graphs of the same structure: what was found in one of them holds in
the next, for the operations at the same places.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

from torch.autograd.graph import Node

from tnconv.recursions.step import node_name, operation

RIGID = ("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze")
LEAF = "torch::autograd::AccumulateGrad"
Key = tuple[tuple[str, ...], tuple[int, ...]]


class Graph:
    """All operations below some roots, with who uses what; ``key`` is the structure.

    Leaves are told apart by the names that their tensors' ids have.
    """

    def __init__(
        self, roots: Iterable[Node], names: Mapping[int, str] = MappingProxyType({})
    ) -> None:
        self.nodes: list[Node] = list(dict.fromkeys(roots))
        self.roots = tuple(self.nodes)
        self.places: dict[Node, int] = {node: at for at, node in enumerate(self.nodes)}
        self.parents: dict[Node, list[tuple[Node, int]]] = defaultdict(list)
        self.below: dict[Node, list[Node]] = {}
        self.leaves: dict[int, Node] = {}  # by their tensors' ids
        kinds, wires = list[str](), [len(self.nodes)]
        for node in self.nodes:  # grows meanwhile
            called = node_name(node)
            if called == LEAF:
                leaf = id(getattr(node, "variable", None))
                self.leaves[leaf] = node
                called = names.get(leaf, LEAF)
            kinds.append(called)
            inputs = node.next_functions
            self.below[node] = [below for below, _ in inputs if below is not None]
            for at, (below, output) in enumerate(inputs):
                if below is None:
                    wires.append(-1)
                    continue
                self.parents[below].append((node, at))
                place = self.places.get(below)
                if place is None:
                    place = self.places[below] = len(self.nodes)
                    self.nodes.append(below)
                wires += (place, output)
        self.key: Key = tuple(kinds), tuple(wires)

    def above(self, starts: Iterable[Node], stops: Collection[Node] = ()) -> list[Node]:
        """All operations on the way from some to the roots, as far as the first of ``stops``."""
        seen, waiting = dict.fromkeys(starts), list(starts)
        while waiting:
            for parent, _ in self.parents[waiting.pop()]:
                if parent not in seen:
                    seen[parent] = None
                    if parent not in stops:
                        waiting.append(parent)
        return list(seen)

    def around(self, starts: Iterable[Node]) -> tuple[list[Node], list[Node]]:
        """Operations after some, as far as the first that something else than leaves flows into.

        That is where what all samples share mostly meets what they have of their own. Those that
        only rearrange what all share come second: to ask for gradients after them takes a product.
        """
        waiting = [node for node in starts if node in self.places]
        seen, alone = dict[Node, None](), {*waiting, *self.leaves.values()}
        while waiting:
            for parent, _ in self.parents[waiting.pop()]:
                seen[parent] = None
                if parent not in alone and all(
                    below in alone for below, _ in parent.next_functions
                ):
                    alone.add(parent)
                    waiting.append(parent)
        rigid = [node for node in seen if node in alone and operation(node) in RIGID]
        return [node for node in seen if node not in rigid], rigid
