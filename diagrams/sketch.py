"""What a picture of a network shows: tensors, patterns, wires and their labels.

A leg with two ends is a wire; a leg with any other number of ends is a black dot. An axis that is
not plainly a leg has a small port with its linear form. Open legs are loose and carry their names.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import graphviz

from tnconv.diagrams.affine import Axis, Leg, Node, Pattern, Tensor
from tnconv.diagrams.expression import Expression
from tnconv.diagrams.network import TensorNetwork
from tnconv.diagrams.notation import condition, form, symbol

Look = dict[str, str]


def _look(attributes: str) -> Look:
    return dict(pair.split("=") for pair in attributes.split())


_FONT = "fontname=Helvetica,Arial,sans-serif fontcolor=#222222 fontsize=10 "
_GRAPH = _look(_FONT + "rankdir=LR bgcolor=white nodesep=0.2 ranksep=0.35")
_NODE = _look(_FONT + "style=filled penwidth=0.8 width=0 height=0")
_EDGE = _look(_FONT + "color=#888888 penwidth=0.8")
_BODY = "style=filled,rounded width=0.6 height=0.45 fontsize=12 "
_TENSOR = _look(_BODY + "shape=box fillcolor=#dce8f5 color=#5f86b3")
_PATTERN = _look("shape=ellipse fillcolor=#fdeacb color=#cf9a45 margin=0.02 height=0.38 width=0.38")
_PORT = _look("shape=box fillcolor=#f2f2f2 color=#bbbbbb margin=0.05,0.03")
_LOOSE = _look("shape=plaintext fillcolor=white margin=0.03")
_SIGN = _look("shape=plaintext fillcolor=white fontsize=16")
_DOT = _look("shape=point width=0.06 height=0.06 fillcolor=black")
_STEP = _look("style=rounded color=#cccccc margin=12")
_TERM = _look("peripheries=0")
_GAP = '<BR/><FONT POINT-SIZE="3"> </FONT>'  # between the name of a wire and the wire


def dot(network: Expression) -> graphviz.Graph:
    """The picture of a network, or of all terms of a sum side by side.

    >>> from tnconv.diagrams import linear
    >>> "weight" in dot(linear((8, 3), (4, 3))).source
    True
    """
    terms = network.terms
    if len(terms) > 1:
        return _row([("", term) for term in terms], "+", _TERM)
    graph = _blank()
    _Sketch(graph, terms[0]).paint()
    return graph


def dot_steps(steps: Sequence[tuple[str, TensorNetwork]]) -> graphviz.Graph:
    """Networks side by side, each under its title: before and after simplification.

    >>> from tnconv.diagrams import linear
    >>> "before" in dot_steps([("before", linear((8, 3), (4, 3)))]).source
    True
    """
    return _row(steps, "→", _STEP)


def _blank() -> graphviz.Graph:
    return graphviz.Graph(graph_attr=_GRAPH, node_attr=_NODE, edge_attr=_EDGE)


def _row(steps: Sequence[tuple[str, TensorNetwork]], sign: str, look: Look) -> graphviz.Graph:
    """Clusters in a row with signs between them, kept in order by invisible wires."""
    graph = _blank()
    sketches = []
    for at, (title, network) in enumerate(steps):
        attributes = look | {"label": graphviz.escape(_shown(title) if title else "")}
        with graph.subgraph(name=f"cluster{at}", graph_attr=attributes) as cluster:
            sketches.append(_Sketch(cluster, network, f"{at}_"))
            sketches[-1].paint()
    for at, (before, after) in enumerate(pairwise(sketches)):
        graph.node(f"sign{at}", sign, **_SIGN)
        for name in sorted(before.names - {tail for tail, _ in before.wires}):
            graph.edge(name, f"sign{at}", style="invis")
        for name in sorted(after.names - {head for _, head in after.wires}):
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
    names: set[str] = field(default_factory=set)
    wires: list[tuple[str, str]] = field(default_factory=list)
    ends: dict[Leg, list[str]] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    loose: set[str] = field(default_factory=set)

    def paint(self) -> None:
        self.ends = {leg: [] for leg in self.network.sizes}
        order, left = _arrange(self.network.nodes)
        self.left = {f"{self.prefix}node{at}" for at in left}
        for at in order:
            self._paint_node(f"node{at}", self.network.nodes[at])
        for at, axis in enumerate(self.network.result.axes):
            self._paint_open(f"open{at}", axis)
        for at, leg in enumerate(self.network.sizes):
            self._paint_leg(f"leg{at}", leg)
        if self.network.scale != 1:
            self._add("scale", str(self.network.scale), _LOOSE)

    def _add(self, name: str, label: str, look: Look) -> str:
        name = self.prefix + name
        self.names.add(name)
        self.graph.node(name, label, **look)
        return name

    def _join(self, tail: str, head: str, label: str = "") -> None:
        if head in self.loose and tail in self.left:
            tail, head = head, tail
        self.wires.append((tail, head))
        self.graph.edge(tail, head, label)

    def _paint_node(self, name: str, node: Node) -> None:
        if isinstance(node, Tensor):
            body = self._add(name, f"<{html.escape(_shown(node.name))}>", _TENSOR)
            for at, axis in enumerate(node.view.axes):
                self._tie(axis, body, f"{name}_axis{at}")
        else:
            body = self._add(name, _pattern_label(node), _PATTERN)
            for leg in node.legs:
                self.ends[leg].append(body)

    def _paint_open(self, name: str, axis: Axis) -> None:
        leg = axis.plain(self.network.sizes)
        if axis != Axis(1):
            body = self._add(name, _leg_label(leg, axis.size) if leg else "", _LOOSE)
            self.loose |= {body} if leg else set()
            self._tie(axis, body, f"{name}_axis")

    def _tie(self, axis: Axis, body: str, port: str) -> None:
        """Let the legs of an axis end at ``body``, through a port if it is not plainly a leg."""
        leg = axis.plain(self.network.sizes)
        if leg is not None:
            self.ends[leg].append(body)
        elif axis != Axis(1):
            text = form(axis.terms, axis.offset).replace(" ", "")
            port = self._add(port, _leg_label(text, axis.size), _PORT)
            tail, head = (body, port) if body in self.left else (port, body)
            self._join(tail, head)
            for leg, _ in axis.terms:
                self.ends[leg].append(port)

    def _paint_leg(self, name: str, leg: Leg) -> None:
        """A wire between two ends; for any other number of ends a dot."""
        ends = self.ends[leg]
        label = _leg_label(leg, self.network.sizes[leg], _GAP)
        if self.loose.intersection(ends):
            label = ""
        if len(ends) == 2:
            self._join(ends[0], ends[1], label)
            return
        point = self._add(name, "", _DOT if ends else _DOT | {"xlabel": label})
        if len(ends) == 1:
            self.loose.add(point)
        for end in ends[:1]:
            self._join(end, point, label)
        for end in ends[1:]:
            self._join(point, end)


def _arrange(nodes: Sequence[Node]) -> tuple[list[int], set[int]]:
    """Positions from left to right, and those whose loose ends point left.

    The halves of a Gram network mirror each other: patterns inside where they are joined.
    """
    names = [node.name if isinstance(node, Tensor) else "" for node in nodes]
    half = len(nodes) // 2
    first, second = list(range(half)), list(range(half, len(nodes)))
    if names[:half] != names[half:]:
        return first + second, {0}
    inner, outer = (
        {leg for n in part if isinstance(n, Pattern) for leg in n.legs}
        for part in (nodes[:half], nodes[half:])
    )
    order = first + second[::-1] if inner & outer else first[::-1] + second
    return order, set(first)


def _leg_label(leg: Leg, size: int, below: str = "") -> str:
    return f'<{_math(leg)}<FONT POINT-SIZE="7" COLOR="#999999"> {size}</FONT>{below}>'


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
    """Stride, dilation and padding of ``[i = s·o + d·k - p]``, by the letters of the legs."""
    a = {leg[0]: a for leg, a in pattern.terms}
    if len(pattern.terms) != 3 or sorted(a) != ["i", "k", "o"] or pattern.value is None:
        return None
    s, d, p = (-a["i"] * value for value in (a["o"], a["k"], pattern.value))
    return f"s={s} d={d} p={p}" if abs(a["i"]) == 1 else None
