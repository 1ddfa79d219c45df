"""Explicit networks: every view that is not plain as a 0/1 pattern, so that all are einsums."""

from tnconv.diagrams.affine import Axis, Leg, Node, Selection, Tensor, View, exactly, fresh
from tnconv.diagrams.network import TensorNetwork


def explicit(network: TensorNetwork) -> TensorNetwork:
    """The same network in which the axes of operands and of the result are legs, each once.

    Any other axis becomes a leg p of its own, and a pattern ``[p = offset + Σ a·leg]``.

    >>> from tnconv.diagrams import TensorNetwork
    >>> x = Tensor("x", View((4,), (Axis(4, 1, (("i", 1),)),)))
    >>> print(explicit(TensorNetwork((x,), View.of({"i": 3}, "i"), {"i": 3})))
    [i] = Σ_{p} x[p] · [i - p = -1]
    """
    sizes = dict(network.sizes)
    nodes: list[Node] = []
    for node in network.nodes:
        if isinstance(node, Tensor) and not isinstance(node, Selection):
            view, patterns = _plain(node.view, sizes)
            nodes += [node.read_through(view), *patterns]
        else:
            nodes.append(node)
    result, patterns = _plain(network.result, sizes)
    return network.with_((*nodes, *patterns), result, sizes)


def _plain(view: View, sizes: dict[Leg, int]) -> tuple[View, list[Node]]:
    """The view with a leg for each axis, and the patterns that tell where it points.

    New legs are added to ``sizes``.
    """
    axes: list[Axis] = []
    patterns: list[Node] = []
    seen: set[Leg] = set()
    for axis in view.axes:
        leg = axis.plain(sizes)
        if leg is None or leg in seen:
            leg = fresh("p", sizes)
            sizes[leg] = axis.size
            patterns.append(exactly([*axis.terms, (leg, -1)], -axis.offset))
            axis = Axis(axis.size, 0, ((leg, 1),))
        seen.add(leg)
        axes.append(axis)
    return View(view.shape, tuple(axes)), patterns
