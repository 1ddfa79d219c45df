"""Names for nodes of an autograd graph, by the layers of the model that made it."""

from collections.abc import Callable

from torch import nn
from torch.autograd.graph import Node

from tnconv.recursions.step import operation


def describing(model: nn.Module) -> Callable[[Node], str]:
    """A function that names a node by its operation, and the layer whose parameters are nearest."""

    def describe(node: Node) -> str:
        names = {id(p): name.rpartition(".")[0] for name, p in model.named_parameters()}
        waiting, seen = [(node, 0)], {node}
        while waiting:
            at, depth = waiting.pop(0)
            own = names.get(id(getattr(at, "variable", None)))
            if own is not None:
                where = "of" if depth == 1 else "after"
                return f"{operation(node)} {where} layer {own!r}"
            new = [below for below, _ in at.next_functions if below is not None]
            waiting += [(below, depth + 1) for below in new if below not in seen]
            seen.update(new)
        return operation(node)

    return describe
