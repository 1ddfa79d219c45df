"""Composition: one diagram's result is another's operand, or two views point at one place."""

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

from tnconv.diagrams.affine import Axis, Leg, Pattern, Tensor, View, exactly, linear, mask, reach
from tnconv.diagrams.expression import Expression, Sum
from tnconv.diagrams.network import TensorNetwork

_HOLE = "\0"  # the name of an operand that is about to be replaced


def compose(outer: Expression, operand: str, inner: Expression) -> Sum:
    """``outer`` with the value of ``inner`` as its ``operand``: one term per choice of terms.

    Operands of one name are one operand in both, so that diagrams of one variable chain.

    >>> from tnconv.diagrams import conv, pad
    >>> layer = compose(conv((2, 3, 10), (4, 3, 3)), "x", pad((2, 3, 8), 1, "reflect"))
    >>> layer.shape, layer.operands["x"]
    ((2, 4, 8), (2, 3, 8))

    Raises:
        ValueError: no such operand, another shape, or another operand of two shapes.
    """
    if outer.operands.get(operand) != inner.shape:
        raise ValueError(
            f"operand {operand!r} has shape {outer.operands.get(operand)} and the inner result "
            f"{inner.shape}; expected one shape"
        )
    terms = []
    for term in outer.terms:
        hole = term.rename_operands({operand: _HOLE})
        at = [p for p, n in enumerate(hole.nodes) if isinstance(n, Tensor) and n.name == _HOLE]
        terms += [_plugged(hole, at, chosen) for chosen in product(inner.terms, repeat=len(at))]
    return Sum(tuple(terms))


def _plugged(
    outer: TensorNetwork, positions: Sequence[int], inner: Sequence[TensorNetwork]
) -> TensorNetwork:
    """The outer network with an inner one in place of the node at each position."""
    for at, network in zip(reversed(positions), inner, strict=True):
        pair = outer.connect(network)
        node, axes = pair.nodes[at], pair.result.axes[len(outer.result.axes) :]
        assert isinstance(node, Tensor)
        rest = pair.without(at).with_(result=outer.result)
        outer = tie(rest, node.view, View(network.shape, axes))
    return outer


def tie(network: TensorNetwork, first: View, second: View) -> TensorNetwork:
    """``network · δ[first, second]``: only where two views point at one entry of an array.

    The deltas are solved for a leg where that needs no mask; the others stay as patterns.
    """
    deltas, masks = [], []
    for a, b in _aligned(_long(network, first), _long(network, second)):
        for axis in (*a, *b) if len(a) + len(b) > 2 else a if _outside(network, b) else ():
            if _outside(network, (axis,)):
                masks.append(mask(axis.terms, axis.offset, axis.size))
        one, other = _flat(a), _flat(b)
        difference = linear([*one.terms, *((leg, -c) for leg, c in other.terms)])
        deltas.append(exactly(difference, other.offset - one.offset))
    at = len(network.nodes) + len(masks)
    tied = network.with_((*network.nodes, *masks, *deltas))
    for _ in deltas:
        if (solved := _solve(tied, at, first.legs)) is None:
            at += 1
        else:
            tied = solved
    return tied


def _outside(network: TensorNetwork, axes: Sequence[Axis]) -> bool:
    """Whether an axis can leave its range."""
    return any(axis.overhang(network.sizes) != (0, 0) for axis in axes)


def _long(network: TensorNetwork, view: View) -> list[Axis]:
    """The axes without those of size one that are read at their one position only."""
    return [
        axis
        for axis in view.axes
        if (axis.size, axis.offset) != (1, 0) or reach(axis.terms, network.sizes) != (0, 0)
    ]


def _aligned(left: list[Axis], right: list[Axis]) -> Iterator[tuple[list[Axis], list[Axis]]]:
    """Pairs of the shortest runs of axes, one of each view, that flatten to equal sizes."""
    while left or right:
        a, b = left[:1], right[:1]
        del left[:1], right[:1]
        while (left or right) and (m := _size(a)) != (n := _size(b)):
            side, rest = (a, left) if left and (m < n or not right) else (b, right)
            side.append(rest.pop(0))
        yield a, b


def _size(axes: Sequence[Axis]) -> int:
    return prod(axis.size for axis in axes)


def _flat(axes: Sequence[Axis]) -> Axis:
    """Several axes as one, the last one fastest."""
    steps = [_size(axes[at + 1 :]) for at in range(len(axes))]
    pairs = list(zip(axes, steps, strict=True))
    return Axis(
        _size(axes),
        sum(step * axis.offset for axis, step in pairs),
        linear((leg, step * c) for axis, step in pairs for leg, c in axis.terms),
    )


def _solve(network: TensorNetwork, at: int, last: Sequence[Leg]) -> TensorNetwork | None:
    """``leg = ±(value - rest)`` for a unit coefficient that keeps in range; ``last`` legs last."""
    pattern = network.nodes[at]
    assert isinstance(pattern, Pattern)
    value = pattern.values[0]
    if not pattern.terms:
        return network.without(at) if value == 0 else None
    for leg, a in sorted(pattern.terms, key=lambda term: term[0] in last):
        rest = linear((other, -a * b) for other, b in pattern.terms if other != leg)
        low, high = reach(rest, network.sizes)
        if abs(a) == 1 and 0 <= a * value + low and a * value + high < network.sizes[leg]:
            return network.without(at).substitute(leg, a * value, rest)
    return None
