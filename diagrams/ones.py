"""A last entry 1 in every patch: the Kronecker factor of weight and bias as one block."""

from collections.abc import Sequence
from itertools import product
from math import prod

from tnconv.diagrams.affine import Axis, Leg, Node, Pattern, Tensor, View
from tnconv.diagrams.expression import Sum
from tnconv.diagrams.network import TensorNetwork


def with_ones(factor: TensorNetwork, groups: int = 1) -> Sum:
    """A Kronecker factor of patches with a last entry 1.

    From ``A[g, a, a'] = s Σ_q U[q, g, a] U[q, g, a']`` to ``(g, a + 1, a + 1)``, with
    ``s Σ_q U[q, g, a]`` in the last row and column and ``s Σ_q 1`` in the corner. The first
    ``groups`` axes are groups, each a leg of its own.

    >>> from tnconv.diagrams import kfac_expand
    >>> with_ones(kfac_expand((8, 4, 32, 32), 3, groups=2).terms[0]).shape
    (2, 19, 19)

    Raises:
        ValueError: a network that is no Kronecker factor with one block per group.
    """
    axes, half = factor.result.axes, len(factor.nodes) // 2
    entries = (len(axes) - groups) // 2
    sides = (axes[groups : groups + entries], axes[groups + entries :])
    blocks = all(axis.plain(factor.sizes) for axis in axes[:groups])
    square = [axis.size for axis in sides[0]] == [axis.size for axis in sides[1]]
    if len(factor.nodes) % 2 or not blocks or not square or not factor.nodes:
        raise ValueError(f"not a Kronecker factor with one block per group: {factor}")
    halves = (factor.nodes[:half], factor.nodes[half:])
    return Sum(
        tuple(
            _with_ones_for(factor, axes[:groups], sides, halves, kept)
            for kept in product((True, False), repeat=2)
        )
    )


def _with_ones_for(
    factor: TensorNetwork,
    groups: Sequence[Axis],
    sides: Sequence[tuple[Axis, ...]],
    halves: Sequence[tuple[Node, ...]],
    kept: tuple[bool, ...],
) -> TensorNetwork:
    """One block of `with_ones`: halves that are not kept are the entry 1 of every patch."""
    width = prod(axis.size for axis in sides[0])
    nodes: list[Node] = []
    axes, gone = list(groups), set[Leg]()
    for side, half, keep in zip(sides, halves, kept, strict=True):
        axes.append(Axis(width + 1, 0, _flattened(side)) if keep else Axis(width + 1, width))
        if keep:
            nodes += half
        else:
            read = {leg for node in half if isinstance(node, Tensor) for leg in node.legs}
            met = {leg for node in half if isinstance(node, Pattern) for leg in node.legs}
            gone |= (read & met) | {leg for axis in side for leg, _ in axis.terms}
    sizes = {leg: size for leg, size in factor.sizes.items() if leg not in gone}
    shape = (prod(axis.size for axis in groups), width + 1, width + 1)
    return factor.with_(nodes, View(shape, tuple(axes)), sizes)


def _flattened(side: tuple[Axis, ...]) -> tuple[tuple[Leg, int], ...]:
    """The linear form that flattens plain axes, the last one fastest."""
    strides = [prod(axis.size for axis in side[at + 1 :]) for at in range(len(side))]
    return tuple((leg, a) for axis, a in zip(side, strides, strict=True) for leg, _ in axis.terms)
