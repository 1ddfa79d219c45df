"""A layer's Kronecker factors, as far as a family of matrices needs them, as diagrams.

Of a factor ``A = Σ_q u[q] u[q]ᵀ`` of rows u, which are patches (with a last entry 1 where a bias is
joint) or output gradients, blocks are Gram networks of narrowed halves: no part of A that is not
asked for is computed, and what is unfolded, if anything, is up to the compiler.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

from tnconv import diagrams
from tnconv.diagrams import Leg, Roles, TensorNetwork, View
from tnconv.diagrams.kronecker import Flavour

Interval = tuple[int, int]


@dataclass(frozen=True)
class Side:
    """Which factor of a layer: that of its inputs, or of its output gradients.

    ``joint`` rows of inputs end with a 1.
    """

    output: bool
    flavour: Flavour
    joint: bool = False

    @property
    def averaged(self) -> bool:
        """Whether positions are summed before rows are multiplied."""
        return self.flavour == "reduce" or (self.output and self.flavour == "hybrid")

    def half(self, layer: TensorNetwork, operand: str, vectors: int | None) -> TensorNetwork:
        """The rows, one result dimension per leg: without the entry 1."""
        if self.output:
            found = diagrams.output_half(layer, operand, vectors)
        else:
            found = diagrams.input_half(layer, operand)
        return found.marginal(*Roles.of(layer, operand).positions) if self.averaged else found

    def legs(self, layer: TensorNetwork, operand: str) -> tuple[tuple[Leg, ...], tuple[Leg, ...]]:
        """The legs of the groups, and those of a row's entries."""
        roles = Roles.of(layer, operand)
        return roles.groups, roles.outputs if self.output else roles.patch


def rows(layer: TensorNetwork, operand: str, vectors: int | None, side: Side) -> TensorNetwork:
    """``u[q, g, a]``, all of them.

    >>> layer = diagrams.conv((8, 4, 9), (6, 2, 3), groups=2)
    >>> rows(layer, "weight", None, Side(False, "expand")).shape
    (56, 2, 6)
    """
    half, (groups, own) = side.half(layer, operand, vectors), side.legs(layer, operand)
    return half.with_(result=View.of(half.sizes, _summed(half, groups, own), groups, own))


def row_sums(layer: TensorNetwork, operand: str, vectors: int | None, side: Side) -> TensorNetwork:
    """``Σ_q u[q, g, a]``."""
    half, (groups, own) = side.half(layer, operand, vectors), side.legs(layer, operand)
    return half.with_(result=View.of(half.sizes, groups, own))


def block(
    layer: TensorNetwork,
    operand: str,
    vectors: int | None,
    side: Side,
    first: Interval,
    second: Interval,
) -> TensorNetwork:
    """``A[g, first, second]``, as far as whole indices of the outermost leg of entries go.

    >>> layer, side = diagrams.conv((8, 4, 9), (6, 4, 3)), Side(False, "expand")
    >>> block(layer, "weight", None, side, (0, 4), (0, 12)).shape
    (1, 6, 12)
    """
    half, (groups, own) = side.half(layer, operand, vectors), side.legs(layer, operand)
    parts = [_narrowed(half, own, interval) for interval in (first, second)]
    pair = parts[0].connect(parts[1], (*groups, *_summed(half, groups, own)))
    axes, count = pair.result.axes, len(half.result.axes)
    at = [parts[0].result.legs.index(leg) for leg in own]
    kept = [axes[parts[0].result.legs.index(leg)] for leg in groups]
    chosen = [*kept, *(axes[i] for i in at), *(axes[count + i] for i in at)]
    shape = tuple(axis.size for axis in chosen)
    sizes = [prod(part.sizes[leg] for leg in own) for part in parts]
    found = pair.with_(result=View(shape, tuple(chosen)))
    return found.reshape(prod(axis.size for axis in kept), *sizes)


def pieces(
    layer: TensorNetwork,
    operand: str,
    vectors: int | None,
    side: Side,
    interval: Interval,
    count: int,
) -> TensorNetwork:
    """``A[g, b·m + r, b·m + r']`` for the ``count`` equal parts b of an interval.

    The diagonal, where parts have one entry; other parts are whole indices of the outermost leg.

    >>> layer, side = diagrams.conv((8, 4, 9), (6, 4, 3)), Side(False, "expand")
    >>> pieces(layer, "weight", None, side, (0, 12), 2).shape
    (1, 2, 6, 6)
    """
    half, (groups, own) = side.half(layer, operand, vectors), side.legs(layer, operand)
    part = _narrowed(half, own, interval)
    size = (interval[1] - interval[0]) // count
    if size == 1:
        pair = part.connect(part, part.result.legs)
        found = pair.with_(result=View.of(pair.sizes, *groups, *own))
        return found.reshape(part.size(groups), part.size(own), 1, 1)
    each = part.size(own[:1]) // count
    part = part.substitute(own[0], 0, {"b": each, "c*": 1}, {"b": count, "c*": each})
    own = ("c*", *own[1:])
    summed = _summed(half, groups, side.legs(layer, operand)[1])
    part = part.with_(result=View.of(part.sizes, *summed, *groups, "b", *own))
    pair = part.connect(part, (*summed, *groups, "b"))
    axes = pair.result.axes
    begin, width = len(summed), len(groups) + 1
    chosen = [*axes[begin : begin + width], *axes[begin + width : len(axes) // 2]]
    chosen += axes[len(axes) // 2 + begin + width :]
    found = pair.with_(result=View(tuple(axis.size for axis in chosen), tuple(chosen)))
    return found.reshape(part.size(groups), count, size, size)


def whole_pieces(
    layer: TensorNetwork, operand: str, side: Side, interval: Interval, count: int
) -> bool:
    """Whether `pieces` are known without parts of the outermost leg's indices."""
    _, own = side.legs(layer, operand)
    inner, size = layer.size(own[1:]), (interval[1] - interval[0]) // count
    return size == 1 or (size % inner == 0 and interval[0] % inner == 0)


def outermost(layer: TensorNetwork, operand: str, side: Side) -> int:
    """How many entries of a row have one index of the outermost leg."""
    return layer.size(side.legs(layer, operand)[1][1:])


def _narrowed(half: TensorNetwork, own: Sequence[Leg], interval: Interval) -> TensorNetwork:
    inner = half.size(own[1:])
    first, last = interval[0] // inner, ceil(interval[1] / inner)
    return half.narrow(own[0], first, last - first)


def _summed(half: TensorNetwork, groups: Sequence[Leg], own: Sequence[Leg]) -> tuple[Leg, ...]:
    """The legs of rows that the factor sums over."""
    return tuple(leg for leg in half.result.legs if leg not in (*groups, *own))
