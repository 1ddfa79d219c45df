"""Parts of networks: some positions of a leg, and what these read of the operands."""

from collections.abc import Sequence
from math import prod

from tnconv.diagrams.affine import Axis, Leg, Tensor, View, reach
from tnconv.diagrams.expression import Expression, Sum
from tnconv.diagrams.network import TensorNetwork
from tnconv.simplify import fixed_point
from tnconv.simplify.rules import crop

Window = tuple[str, int, int, int]
"""Positions of an operand: its name, a dimension, and the start and stop in it."""


def narrowed(term: TensorNetwork, leg: Leg, start: int, length: int, opened: bool) -> TensorNetwork:
    """The part of a term at some positions of a leg; other legs are cropped to what these meet."""
    if opened:
        part = term.narrow(leg, start, length)
    else:
        part = term.substitute(leg, start, {leg: 1}, {leg: length})
    return fixed_point(part, (crop,))[0]


def read_only_what_is_needed(
    terms: Sequence[TensorNetwork],
) -> tuple[Expression, tuple[Window, ...]]:
    """The same terms on the parts of the operands that any of them reads, and those parts."""
    expression: Expression = Sum(tuple(terms)) if len(terms) > 1 else terms[0]
    windows = []
    for name, shape in expression.operands.items():
        for dim in range(len(shape)):
            views = [(t, n.view) for t in expression.terms for n in t.tensors if n.name == name]
            spans = [_span(view, dim, term) for term, view in views]
            start, stop = min(span[0] for span in spans), max(span[1] for span in spans)
            units = {unit for *_, unit in spans}
            if (start, stop) == (0, shape[dim]) or stop <= start or len(units) > 1:
                continue
            windows.append((name, dim, start, stop))
            terms = [_shifted(term, name, dim, start, stop) for term in terms]
    part: Expression = Sum(tuple(terms)) if len(terms) > 1 else terms[0]
    return part, tuple(windows)


def _span(view: View, dim: int, term: TensorNetwork) -> tuple[int, int, int]:
    """Start and stop of what a view reads in an array dimension, in whole units of inner axes."""
    if (at := outermost(view, dim)) is None:
        return 0, view.shape[dim], 1
    axis = view.axes[at]
    unit = view.shape[dim] // axis.size
    low, high = reach(axis.terms, term.sizes)
    low, high = max(0, axis.offset + low), min(axis.size, axis.offset + high + 1)
    return unit * low, unit * high, unit


def _shifted(term: TensorNetwork, name: str, dim: int, start: int, stop: int) -> TensorNetwork:
    """The term with the operand's part from ``start`` to ``stop`` in the place of the operand."""

    def moved(view: View) -> View:
        at = outermost(view, dim)
        assert at is not None
        axis = view.axes[at]
        unit = view.shape[dim] // axis.size
        part = Axis((stop - start) // unit, axis.offset - start // unit, axis.terms)
        shape = (*view.shape[:dim], stop - start, *view.shape[dim + 1 :])
        return View(shape, (*view.axes[:at], part, *view.axes[at + 1 :]))

    return term.with_(
        node.read_through(moved(node.view))
        if isinstance(node, Tensor) and node.name == name
        else node
        for node in term.nodes
    )


def outermost(view: View, dim: int) -> int | None:
    """The first axis of size > 1 in an array dimension."""
    before = prod(view.shape[:dim])
    total = 1
    for at, axis in enumerate(view.axes):
        if axis.size > 1 and before <= total < before * view.shape[dim]:
            return at if total == before else None
        total *= axis.size
    return None
