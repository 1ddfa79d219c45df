"""Questions about a diagram's graph whose answers code generation uses; nothing is rewritten."""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import combinations, islice
from typing import TYPE_CHECKING, cast

from tnconv.diagrams.affine import Pattern, View
from tnconv.diagrams.network import TensorNetwork

if TYPE_CHECKING:
    import networkx

TRIED = 64  # automorphisms per pair of nodes: odd networks may have factorially many


def constants(tn: TensorNetwork) -> tuple[tuple[int, ...], ...]:
    """The parts without operands: patterns, together where a leg touches nothing but patterns.

    Each part is one array that does not depend on the operands' values, so that it can be made
    once. Positions of nodes, largest parts first.

    >>> from tnconv.diagrams import kfac_reduce
    >>> constants(kfac_reduce((8, 3, 32, 32), 3))
    ((1,), (2,), (4,), (5,))
    """
    import networkx

    patterns = {at for at, _ in tn.patterns}
    inside = [
        ("leg", leg)
        for leg, held in tn.holders.items()
        if held and patterns.issuperset(held) and leg not in tn.open_legs
    ]
    graph = tn.graph.subgraph([*patterns, *inside])
    parts = [
        tuple(sorted(at for at in part if isinstance(at, int)))
        for part in networkx.connected_components(graph)
    ]
    return tuple(sorted(parts, key=lambda part: (-len(part), part)))


def mirrored(tn: TensorNetwork) -> dict[int, int] | None:
    """An exchange of halves that leaves the network as it is, up to the order of result axes.

    A map of node positions that is its own inverse and moves a tensor: in a Gram network each half
    is computed once. Asked as automorphisms of the labelled graph of nodes and legs.

    >>> from tnconv.diagrams import conv, kfac_expand
    >>> mirrored(kfac_expand((8, 3, 32, 32), 3))
    {0: 3, 1: 4, 2: 5, 3: 0, 4: 1, 5: 2}
    >>> mirrored(conv((8, 3, 32), (4, 3, 3))) is None
    True
    """
    tensors = [(at, node.name) for at, node in enumerate(tn.nodes) if not isinstance(node, Pattern)]
    for (one, name), (two, other) in combinations(tensors, 2):
        if name == other:
            for found in islice(_exchanges(tn, one, two), TRIED):
                if _is_mirror(tn, found):
                    return {at: cast(int, found[at]) for at in range(len(tn.nodes))}
    return None


def _exchanges(tn: TensorNetwork, one: int, two: int) -> Iterator[dict[object, object]]:
    """Automorphisms of the graph that take one node to another; signs of patterns are not told."""
    first, second = _labelled(tn), _labelled(tn)
    import networkx  # takes a while; networks without two like tensors need not wait for it
    from networkx.algorithms import isomorphism

    first.nodes[one]["label"] = second.nodes[two]["label"] = "seed"
    if networkx.faster_could_be_isomorphic(first, second):
        labels = isomorphism.categorical_node_match("label", None)
        ends = isomorphism.categorical_edge_match("ends", None)
        yield from isomorphism.GraphMatcher(first, second, labels, ends).isomorphisms_iter()


def _labelled(tn: TensorNetwork) -> "networkx.Graph[object]":
    """`TensorNetwork.graph` with labels: equal ones can be exchanged, as can the result's axes."""
    graph = tn.graph.copy()
    for leg, size in tn.sizes.items():
        graph.nodes["leg", leg]["label"] = size
    for at, node in enumerate(tn.nodes):
        if isinstance(node, Pattern):
            graph.nodes[at]["label"] = len(node.values), node.values.step
            for leg, a in node.terms:
                graph.edges[at, ("leg", leg)]["ends"] = abs(a)
        else:
            graph.nodes[at]["label"] = node.name
            _label(graph, at, node.view, ordered=True)
    graph.nodes["result"]["label"] = "result"
    _label(graph, "result", tn.result, ordered=False)
    return graph


def _label(graph: "networkx.Graph[object]", holder: object, view: View, ordered: bool) -> None:
    """Where and how often each leg is held: by which axes, with which coefficients."""
    for leg in view.legs:
        graph.edges[holder, ("leg", leg)]["ends"] = sorted(
            (position if ordered else 0, axis.size, axis.offset, a)
            for position, axis in enumerate(view.axes)
            for other, a in axis.terms
            if other == leg
        )


def _is_mirror(tn: TensorNetwork, found: Mapping[object, object]) -> bool:
    """Whether an exchange is its own inverse and maps every node and the result onto itself."""
    if any(found[found[at]] != at for at in found):
        return False
    names = {leg: cast(tuple[str, str], found["leg", leg])[1] for leg in tn.sizes}
    renamed = tn.rename(names)
    same = (tn.nodes[cast(int, found[at])] == node for at, node in enumerate(renamed.nodes))
    return all(same) and Counter(renamed.result.axes) == Counter(tn.result.axes)
