"""Lower bounds of the seconds of displaced products, from sizes alone: see decision 0024."""

from collections.abc import Sequence
from math import prod

from tnconv.codegen.lowering.strided import Strided
from tnconv.codegen.prices import cost
from tnconv.codegen.routes.tap_pairs import Dimension, Shared


def least_seconds(
    halves: Sequence[Strided],
    displaced: Sequence[Dimension],
    unfolded: Sequence[Dimension] = (),
    known: bool = False,
) -> list[float]:
    """For each pair of taps of the first dimension, the products that `block_rows` writes at least.

    They are those over what all windows share, or where these are known, those beside it.

    Args:
        halves: Arrays ``(groups, *positions, rows, channels)``.
        displaced: The dimensions that are displaced, one or two.
        unfolded: Those whose taps are unfolded into channels.
        known: Whether the sums over all positions are known already.
    """
    (groups, *_, rows, m), n = halves[0].shape, halves[1].shape[-1]
    first, *rest = displaced
    alike, found = halves[0] == halves[1], []
    inside = [*unfolded, *(rest if known else ())]
    taps, deep = prod(x.taps for x in inside), rows * prod(x.outputs for x in (*rest, *unfolded))
    for outer in first.pairs(symmetric=alike):
        mirrored = alike and outer.shift == 0
        batch = groups * (len(outer.pairs) if known else 1)
        positions = _beside(outer) if known else outer.core[1]
        times = 1 if known else prod(len(x.pairs(symmetric=mirrored)) for x in rest)
        product = cost.matmul(batch, taps * m, taps * n, positions * deep, across=True)
        seconds = product.seconds if positions else 0.0
        found.append(times * seconds / (2 if mirrored else 1))
    return found


def _beside(outer: Shared) -> int:
    """How many positions of border strips each pair of taps has; all pairs have equally many."""
    return sum(length for _, length in outer.others) // len(outer.pairs)
