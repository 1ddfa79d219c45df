"""Questions to an autograd graph: what it reaches, with calls of layers as single steps."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from tnconv.models.calls import Call


def sources(calls: Sequence[Call]) -> list[GradientEdge]:
    """The outputs of calls that reach no other call: all calls are on the way to these."""
    edges = [call.edge for call in calls if call.edge is not None]
    targets = {edge.node for edge in edges}
    reaches: dict[Node, bool] = {}
    return [edge for edge in edges if not _reaches(edge.node, targets, reaches)]


def unexplained(
    roots: Iterable[Tensor],
    calls: Iterable[Call],
    parameters: Iterable[nn.Parameter],
    leaves: Collection[Node] | None = None,
    inputs: Mapping[Node, list[Node]] = MappingProxyType({}),
) -> list[nn.Parameter]:
    """The parameters that reach the roots by other ways than as their own modules' in a call.

    Args:
        roots: tensors of the graph.
        calls: those that explain their modules' parameters.
        parameters: those to look for.
        leaves: the graph's ends, if they are known.
        inputs: what is below operations, as far as that is known: to ask the graph takes longer.
    """
    steps = {call.edge.node: call for call in calls if call.edge is not None and _is_step(call)}
    own = {id(parameter) for call in steps.values() for _, parameter in call.parameters}
    ends = {_node(root) for root in roots if root.requires_grad}
    if leaves is None:
        leaves = [node for node in _walk(ends, {}) if hasattr(node, "variable")]
    everywhere = {id(node.variable) for node in leaves}  # type: ignore[attr-defined]
    outside = {id(leaf) for leaf in _leaves(ends, steps, inputs=inputs)}
    return [p for p in parameters if id(p) in outside or id(p) in everywhere - own]


def past(starts: Sequence[Node], stops: Collection[Node]) -> list[Tensor]:
    """The tensors at the ends of a graph that some nodes reach other than through ``stops``."""
    given = [node for node in starts if node not in stops]
    return [n.variable for n in _walk(given, {}, stops) if hasattr(n, "variable")]


def before(roots: Iterable[Tensor]) -> set[Node]:
    """All nodes that some tensors depend on."""
    return set(_walk([_node(root) for root in roots if root.requires_grad], {}))


def reaching(roots: Iterable[Tensor], parameters: Collection[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that some tensors depend on."""
    nodes = before(roots) if parameters else set()
    return [p for p in parameters if _node(p) in nodes]


def missed(
    roots: Iterable[Tensor], calls: Sequence[Call], parameters: Iterable[nn.Parameter]
) -> list[Call]:
    """The calls that a backward pass from the roots to some parameters should have reached.

    Their outputs lead to the roots, or their parameters do in other ways than through a call.
    """
    wanted = {*parameters}
    silent = [c for c in calls if not c.reached and any(p in wanted for _, p in c.parameters)]
    if not silent:
        return []
    nodes = before(roots)
    wanted -= {p for call in calls if call.reached for _, p in call.parameters}
    around = {p for p in wanted if _node(p) in nodes}
    return [
        call
        for call in silent
        if (call.edge is not None and call.edge.node in nodes)
        or any(p in around for _, p in call.parameters)
    ]


def _is_step(call: Call) -> bool:
    """Whether nothing but a call's inputs and its module's own parameters flows into it."""
    if call.described:
        return True
    if call.edge is None or any(
        next(m.parameters(), None) is not None for m in call.module.children()
    ):
        return False
    own = {id(parameter) for _, parameter in call.parameters}
    return own >= {id(leaf) for leaf in _leaves({call.edge.node}, {}, set(_inputs(call)))}


def _leaves(
    roots: Collection[Node],
    steps: Mapping[Node, Call],
    ends: Collection[Node] = (),
    inputs: Mapping[Node, list[Node]] = MappingProxyType({}),
) -> Iterator[Tensor]:
    """The tensors at the graph's ends; a call in ``steps`` leads on to its inputs alone."""
    every = _walk(roots, steps, ends, inputs)
    return (node.variable for node in every if hasattr(node, "variable"))


def _walk(
    roots: Collection[Node],
    steps: Mapping[Node, Call],
    ends: Collection[Node] = (),
    inputs: Mapping[Node, list[Node]] = MappingProxyType({}),
) -> Iterator[Node]:
    seen, waiting = set(ends), list(roots)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            if node in steps:
                waiting += _inputs(steps[node])
            else:
                waiting += inputs[node] if node in inputs else _below(node)


def _node(tensor: Tensor) -> Node:
    return get_gradient_edge(tensor).node


def _inputs(call: Call) -> list[Node]:
    return [_node(tensor) for tensor in call.inputs if tensor.requires_grad]


def _below(node: Node) -> list[Node]:
    return [below for below, _ in node.next_functions if below is not None]


def _reaches(start: Node, targets: set[Node], known: dict[Node, bool]) -> bool:
    """Whether a path leads from a node to another one in ``targets``; ``known`` is filled."""
    path = [(start, iter(_below(start)))]
    seen = {start}
    while path:
        node, left = path[-1]
        below = next(left, None)
        if below is None:
            known.setdefault(node, False)
            path.pop()
        elif below in targets or known.get(below):
            known.update((above, True) for above, _ in path)
            return True
        elif below not in seen and below not in known:
            seen.add(below)
            path.append((below, iter(_below(below))))
    return False
