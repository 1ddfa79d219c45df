"""How networks are written: forms, nodes and equations as text, for everything that prints."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import prod

from tnconv.diagrams.affine import Axis, Node, Pattern, Selection, Tensor, Terms, View
from tnconv.diagrams.expression import Expression
from tnconv.diagrams.network import TensorNetwork

_TOGETHER = {"gc", "gd", "ck", "ii", "oo", "kk"}
"""Letters of neighbouring legs that usually share an array dimension."""


def form(terms: Terms, offset: int = 0) -> str:
    """The linear form ``offset + Σ a·leg``: plus before minus, o before k before i.

    >>> form((("k1", 1), ("o1", 2)), -1), form(())
    ('2·o1 + k1 - 1', '0')
    """
    order = sorted(terms, key=lambda t: (t[1] < 0, "oki".find(t[0][0]), t[0]))
    parts = [(a, leg if abs(a) == 1 else f"{abs(a)}·{leg}") for leg, a in order]
    if offset or not parts:
        parts.append((offset, str(abs(offset))))
    text = "".join((" - " if a < 0 else " + ") + part for a, part in parts)
    return ("-" if text.startswith(" -") else "") + text[3:]


def condition(pattern: Pattern) -> str:
    """When a pattern is 1.

    >>> condition(Pattern((("i", 1), ("k", -1), ("o", -2)), range(-1, 0)))
    '2·o + k - i = 1'
    >>> condition(Pattern((("i", 1),), range(2, 5)))
    '2 ≤ i < 5'
    """
    terms, values = pattern.terms, pattern.values
    if values and sum(a < 0 for _, a in terms) > len(terms) / 2:
        terms = tuple((leg, -a) for leg, a in terms)
        values = range(-values[-1], 1 - values[0], values.step)
    if is_delta(pattern):
        return " = ".join(pattern.legs)
    if pattern.value is not None:
        return f"{form(terms)} = {values[0]}"
    if values.step == 1:
        return f"{values.start} ≤ {form(terms)} < {values.stop}"
    return f"{form(terms)} ∈ {values.start}:{values.stop}:{values.step}"


def is_delta(pattern: Pattern) -> bool:
    """Whether the pattern is ``[i = j]``."""
    return pattern.value == 0 and [a for _, a in pattern.terms] == [1, -1]


def symbol(pattern: Pattern) -> str:
    """``Π`` if one value ties three or more legs, ``δ`` for ``[i = j]``, else nothing."""
    if is_delta(pattern):
        return "δ"
    return "Π" if pattern.value is not None and len(pattern.terms) > 2 else ""


def node(n: Node) -> str:
    """A tensor with its axes, those of one array dimension in parentheses, or a pattern.

    >>> node(Tensor("x", View.of({"n": 2, "g": 3, "c": 4}, "n", ("g", "c"))))
    'x[n, (g c)]'
    >>> node(Pattern((("i", 1), ("j", -1)), range(1)))
    'δ[i = j]'
    >>> node(Selection.of("index", {"r": 2, "i": 5}, "r", "i"))
    '[index[r] = i]'
    """
    if isinstance(n, Selection) and len(n.view.axes) == 2:
        r, i = (form(axis.terms, axis.offset) for axis in n.view.axes)
        return f"[{n.name}[{r}] = {i}]"
    if isinstance(n, Tensor):
        return n.name + _view(n.view)
    return f"{symbol(n)}[{condition(n)}]"


def equation(network: Expression) -> str:
    """``[result] = scale · Σ_{legs} node · node``; the terms of a sum on a line each.

    >>> from tnconv.diagrams import linear
    >>> equation(linear((8, 3), (4, 3)))
    '[n, d] = Σ_{c} x[n, c] · weight[d, c]'
    """
    terms = network.terms
    left = [_view(term.result) for term in terms]
    lines = [f"{left[0]} = {_value(terms[0])}"]
    for result, term in zip(left[1:], terms[1:], strict=True):
        lines.append(("" if result == left[0] else f"{result} = ") + _value(term))
    return "\n + ".join(lines)


def _value(network: TensorNetwork) -> str:
    summed = ", ".join(leg for leg in network.sizes if leg not in network.open_legs)
    sigma = f"Σ_{{{summed}}} " if summed else ""
    if not network.nodes:
        return f"{sigma}{network.scale}"
    scale = f"{network.scale} · " if network.scale != 1 else ""
    return scale + sigma + " · ".join(map(node, network.nodes))


def _view(view: View) -> str:
    """The axes, in parentheses where the axes nest into array dimensions."""
    texts = ["" if axis == Axis(1) else form(axis.terms, axis.offset) for axis in view.axes]
    groupings = _groupings(view.shape, [axis.size for axis in view.axes])
    best = min(groupings, key=lambda ends: _oddity(texts, ends), default=range(len(texts) + 1))
    return f"[{', '.join(_group(texts[start:stop]) for start, stop in pairwise(best))}]"


def _group(texts: Sequence[str]) -> str:
    shown = [text for text in texts if text]
    if len(shown) < 2:
        return "".join(shown) or "0"
    return f"({' '.join(text.replace(' ', '') for text in shown)})"


def _groupings(shape: Sequence[int], sizes: Sequence[int], start: int = 0) -> Iterator[list[int]]:
    """Where to cut the axes so that each part has the size of an array dimension."""
    if not shape:
        if start == len(sizes):
            yield [start]
        return
    for stop in range(start + 1, len(sizes) + 1):
        if prod(sizes[start:stop]) == shape[0]:
            yield from ([start, *rest] for rest in _groupings(shape[1:], sizes, stop))


def _oddity(texts: Sequence[str], ends: Sequence[int]) -> int:
    """How unlike the glossary a grouping is: this decides where axes of size one go."""
    groups = ["".join(text[:1] for text in texts[start:stop]) for start, stop in pairwise(ends)]
    pairs = [(a, b) for group in groups for a, b in pairwise(group)]
    unusual = sum(2 - (a == b) for a, b in pairs if a + b not in _TOGETHER)
    return unusual + sum(group.startswith("d") for group in groups)
