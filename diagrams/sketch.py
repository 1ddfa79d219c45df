"""What a picture of a network shows: tensors, patterns, wires and their labels.

A leg with two ends is a wire; a leg with any other number of ends is a black dot. An axis that is
not plainly a leg has a small port with its linear form. Open legs are loose and carry their names.
"""

import html
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import cast

import graphviz

from tnconv.diagrams.affine import Axis, Leg, Node, Pattern, Tensor
from tnconv.diagrams.expression import Expression
from tnconv.diagrams.look import Look, Style
from tnconv.diagrams.network import TensorNetwork
from tnconv.diagrams.notation import condition, form, symbol

PLAIN = Style()
COLUMNS = 4  # pictures in a row of a grid
_TERM = {"peripheries": "0"}
_GAP = '<BR/><FONT POINT-SIZE="3"> </FONT>'  # between the name of a wire and the wire
_TINY = 'POINT-SIZE="7"'


def dot(network: Expression, style: Style = PLAIN) -> graphviz.Graph:
    """The picture of a network, or of all terms of a sum side by side.

    >>> from tnconv.diagrams import linear
    >>> "weight" in dot(linear((8, 3), (4, 3))).source
    True
    """
    terms = network.terms
    if len(terms) > 1:
        return _row([("", term, style) for term in terms], "+", _TERM, style)
    graph = _blank(style)
    _Sketch(graph, terms[0], style=style).paint()
    return graph


def dot_steps(
    steps: Sequence[tuple[str, TensorNetwork]], style: Style = PLAIN, columns: int = COLUMNS
) -> graphviz.Graph:
    """Networks side by side, each under its title: before and after simplification.

    What the next step takes away is highlighted. More than ``columns`` of them make a grid.

    >>> from tnconv.diagrams import linear
    >>> "before" in dot_steps([("before", linear((8, 3), (4, 3)))]).source
    True
    """
    shown = [(title, network if style.ones else without_ones(network)) for title, network in steps]
    marked = [*(changed(a, b) for (_, a), (_, b) in pairwise(shown)), ()]
    styled = [
        (title, network, replace(style, highlight=[*style.highlight, *names]))
        for (title, network), names in zip(shown, marked, strict=True)
    ]
    return _row(styled, "→", style.step, style, columns)


def changed(before: TensorNetwork, after: TensorNetwork) -> list[str]:
    """The legs of a network that another lacks or has in another size."""
    return [leg for leg, size in before.sizes.items() if after.sizes.get(leg) != size]


def without_ones(network: TensorNetwork) -> TensorNetwork:
    """The network without its legs of size one, and patterns that say nothing then.

    >>> from tnconv.diagrams import conv
    >>> print(without_ones(conv((8, 3, 9), (4, 3, 3))))
    [n, d, o1] = Σ_{c, i1, k1} x[n, c, i1] · Π[o1 + k1 - i1 = 0] · weight[d, c, k1]
    """
    for leg in [leg for leg, size in network.sizes.items() if size == 1]:
        network = network.substitute(leg)
    said = [at for at, node in network.patterns if not node.terms and 0 in node.values]
    return network.without(*said)


def _blank(style: Style) -> graphviz.Graph:
    return graphviz.Graph(graph_attr=style.graph, node_attr=style.node, edge_attr=style.edge)


def _row(
    steps: Sequence[tuple[str, TensorNetwork, Style]],
    sign: str,
    look: Look,
    style: Style,
    columns: int | None = None,
) -> graphviz.Graph:
    """Clusters in rows with signs between them, kept in order by invisible wires."""
    graph = _blank(style)
    sketches: list[_Sketch] = []
    rows = [range(at, len(steps))[:columns] for at in range(0, len(steps), columns or len(steps))]
    for at in (at for row in rows[::-1] for at in row):  # Graphviz puts what comes first below
        title, network, own = steps[at]
        attributes = look | {"label": graphviz.escape(_shown(title) if title else "")}
        with graph.subgraph(name=f"cluster{at}", graph_attr=attributes) as cluster:
            sketches.append(_Sketch(cluster, network, f"{at}_", own))
            sketches[-1].paint()
    sketches.sort(key=lambda sketch: int(sketch.prefix[:-1]))
    for at, (before, after) in enumerate(pairwise(sketches)):
        graph.node(f"sign{at}", sign, **style.sign)
        new_row = columns is not None and (at + 1) % columns == 0
        for name in sorted(before.names - {tail for tail, _ in before.wires}):
            graph.edge(name, f"sign{at}", style="invis")
        for name in sorted(after.names - {head for _, head in after.wires}) if not new_row else ():
            graph.edge(f"sign{at}", name, style="invis")
    return graph


@dataclass
class _Sketch:
    """One network in a picture; ``ends`` are the names of what each leg ends at.

    Wires run from what is further left; ``left`` are nodes whose loose ends point left.
    """

    graph: graphviz.Graph
    network: TensorNetwork
    prefix: str = ""
    style: Style = PLAIN
    names: set[str] = field(default_factory=set)
    wires: list[tuple[str, str]] = field(default_factory=list)
    ends: dict[Leg, list[str]] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    loose: set[str] = field(default_factory=set)

    def paint(self) -> None:
        if not self.style.ones:
            self.network = without_ones(self.network)
        self.ends = {leg: [] for leg in self.network.sizes}
        order, left = arrange(self.network)
        self.left = {f"{self.prefix}node{at}" for at in left}
        for at in order:
            self._paint_node(f"node{at}", self.network.nodes[at])
        for at, axis in enumerate(self.network.result.axes):
            self._paint_open(f"open{at}", axis)
        for at, leg in enumerate(self.network.sizes):
            self._paint_leg(f"leg{at}", leg)
        if self.network.scale != 1:
            scale = self._add("scale", f"× {self.network.scale}", self.style.loose)
            for result in sorted(name for name in self.loose if "open" in name)[:1]:
                self.graph.edge(result, scale, style="invis")

    def _add(self, name: str, label: str, look: Look, marked: bool = False) -> str:
        name = self.prefix + name
        self.names.add(name)
        look = look | self.style.marked if marked else look
        self.graph.node(name, label, **look)
        return name

    def _join(self, tail: str, head: str, label: str = "", marked: bool = False) -> None:
        if head in self.loose and tail in self.left:
            tail, head = head, tail
        self.wires.append((tail, head))
        self.graph.edge(tail, head, label, **self.style.marked if marked else {})

    def _marked(self, *names: str) -> bool:
        return any(name in self.style.highlight for name in names)

    def _paint_node(self, name: str, node: Node) -> None:
        if isinstance(node, Tensor):
            marked = self._marked(node.name)
            body = self._add(name, f"<{html.escape(_shown(node.name))}>", self.style.tensor, marked)
            for at, axis in enumerate(node.view.axes):
                self._tie(axis, body, f"{name}_axis{at}")
        else:
            label, marked = _pattern_label(node), self._marked(*node.legs)
            body = self._add(name, label, self.style.pattern, marked)
            for leg in node.legs:
                self.ends[leg].append(body)

    def _paint_open(self, name: str, axis: Axis) -> None:
        leg = axis.plain(self.network.sizes)
        if axis != Axis(1):
            label = self._label(leg, axis.size) if leg else ""
            body = self._add(name, label, self.style.loose)
            self.loose |= {body} if leg else set()
            self._tie(axis, body, f"{name}_axis")

    def _tie(self, axis: Axis, body: str, port: str) -> None:
        """Let the legs of an axis end at ``body``, through a port if it is not plainly a leg."""
        leg = axis.plain(self.network.sizes)
        if leg is not None:
            self.ends[leg].append(body)
        elif axis != Axis(1):
            text = form(axis.terms, axis.offset).replace(" ", "")
            port = self._add(port, self._label(text, axis.size), self.style.port)
            tail, head = (body, port) if body in self.left else (port, body)
            self._join(tail, head)
            for leg, _ in axis.terms:
                self.ends[leg].append(port)

    def _paint_leg(self, name: str, leg: Leg) -> None:
        """A wire between two ends; for any other number of ends a dot."""
        ends = self.ends[leg]
        label, marked = self._label(leg, self.network.sizes[leg], _GAP), self._marked(leg)
        if self.loose.intersection(ends):
            label = ""
        if len(ends) == 2:
            self._join(ends[0], ends[1], label, marked)
            return
        look = self.style.dot
        point = self._add(name, "", look if ends else look | {"xlabel": label}, marked)
        if len(ends) == 1:
            self.loose.add(point)
        for end in ends[:1]:
            self._join(end, point, label, marked)
        for end in ends[1:]:
            self._join(point, end, "", marked)

    def _label(self, leg: Leg, size: int, below: str = "") -> str:
        """The name of a leg and its size, as HTML-like text."""
        style = self.style
        name = _math(leg) if style.labels else ""
        tiny = f'<FONT {_TINY} COLOR="{style.colours.faint}"> {size}</FONT>' if style.sizes else ""
        return f"<{name}{tiny}{below}>" if name or tiny else ""


def arrange(network: TensorNetwork) -> tuple[list[int], set[int]]:
    """Positions from inputs to results, and those whose loose ends point left.

    The halves of a Gram network mirror each other: patterns inside where they are joined.
    """
    nodes = network.nodes
    names = [node.name if isinstance(node, Tensor) else "" for node in nodes]
    half = len(nodes) // 2
    first = _in_reading_order(nodes[: half or 1])
    if not half or names[:half] != names[half:]:
        order = _in_reading_order(nodes)
        return order, set(order[:1])
    second = [half + at for at in first]
    inner, outer = (
        {leg for n in part if isinstance(n, Pattern) for leg in n.legs}
        for part in (nodes[:half], nodes[half:])
    )
    order = first + second[::-1] if inner & outer else first[::-1] + second
    return order, set(first)


def _in_reading_order(nodes: Sequence[Node]) -> list[int]:
    """Positions by their distance from the input: through a composed network, layer by layer.

    The input is the operand x, or the first one. Legs with more than two ends, such as samples,
    are no way from one layer to the next.
    """
    legs = [frozenset(node.legs) for node in nodes]
    ends = Counter(leg for held in legs for leg in held)
    tensors = [at for at, node in enumerate(nodes) if isinstance(node, Tensor)]
    named = [at for at in tensors if cast(Tensor, nodes[at]).name == "x"]
    distance = dict.fromkeys((named or tensors or [0])[:1], 0) if nodes else {}
    reached = list(distance)
    for at in reached:
        near = {leg for leg in legs[at] if ends[leg] == 2}
        for other in range(len(nodes)):
            if other not in distance and near & legs[other]:
                distance[other] = distance[at] + 1
                reached.append(other)
    return sorted(range(len(nodes)), key=lambda at: distance.get(at, len(nodes)))


def _math(text: str, points: int = 10) -> str:
    """HTML-like text with the numbers of legs as subscripts."""
    sub = rf'<SUB><FONT POINT-SIZE="{points * 0.7:g}">\g<0></FONT></SUB>'
    text = html.escape(_shown(text), quote=False).replace("'", "′")
    return re.sub(r"(?<=[A-Za-z])\d+", sub, text)


def _shown(name: str) -> str:
    """A name that Graphviz can read: what is not printable is escaped, nothing at all quoted."""
    escaped = (c if c.isprintable() else ascii(c)[1:-1] for c in name)
    return "".join(escaped) or "''"


def _pattern_label(pattern: Pattern) -> str:
    sign = symbol(pattern)
    if sign == "δ":
        return sign
    rule = f'<FONT POINT-SIZE="8">{_parameters(pattern) or _math(condition(pattern), 9)}</FONT>'
    return f'<<FONT POINT-SIZE="12">{sign}</FONT><BR/>{rule}>' if sign else f"<{rule}>"


def _parameters(pattern: Pattern) -> str | None:
    """Stride, dilation and padding of ``[i = s·o + d·k - p]``: i is the leg of the other sign.

    o and k are told by their letters or, where s = d, need not be told.
    """
    a = dict(pattern.terms)
    if len(a) != 3 or pattern.value is None:
        return None
    alone = [leg for leg in a if sum(a[leg] * other > 0 for other in a.values()) == 1]
    if len(alone) != 1 or abs(a[i := alone[0]]) != 1:
        return None
    others = sorted((leg for leg in a if leg != i), key=lambda leg: leg[0] == "k")
    o, k = ((-a[i] * a[leg]) for leg in others)
    if o != k and sorted(leg[0] for leg in a) != ["i", "k", "o"]:
        return None
    return f"s={o} d={k} p={-a[i] * pattern.value}"
