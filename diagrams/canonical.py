"""Canonical names of legs, by which networks that differ in names only compare equal."""

from collections.abc import Mapping, Sequence
from itertools import islice, product

from tnconv.diagrams.affine import Leg, Node, Pattern, Sizes, Tensor, View

Place = tuple[int, int, int]
"""Where a leg is held: a view, an axis in it, and the leg's coefficient there."""
MOST_SIGNS = 2**10  # combinations of signs: equal networks that are found unequal only cost time


def canonical_names(nodes: Sequence[Node], result: View, sizes: Sizes) -> dict[Leg, Leg]:
    """A new name for each leg of a network, by the places where it is held.

    Two legs that are held at the same places with the same coefficients can be exchanged, so
    sorting the legs by their places gives a complete normal form for a given order of nodes.
    A pattern and its negative are the same pattern: its sign is fixed without names, or where
    nothing tells the two apart, both signs are tried.
    """
    tensors = [node for node in nodes if isinstance(node, Tensor)]
    patterns = [(at, node) for at, node in enumerate(nodes) if isinstance(node, Pattern)]
    places: dict[Leg, list[Place]] = {leg: [] for leg in sizes}
    for at, view in enumerate((result, *(node.view for node in tensors))):
        for position, axis in enumerate(view.axes):
            for leg, a in axis.terms:
                places[leg].append((at, position, a))

    def rows(signs: Sequence[int]) -> list[tuple[list[Place], int, Leg]]:
        every = {leg: list(found) for leg, found in places.items()}
        for (at, pattern), sign in zip(patterns, signs, strict=True):
            for leg, a in pattern.terms:
                every[leg].append((-1, at, sign * a))
        return sorted((every[leg], size, leg) for leg, size in sizes.items())

    choices = [_signs(pattern, places, sizes) for _, pattern in patterns]
    tried = islice(product(*choices), MOST_SIGNS)
    order = min(map(rows, tried), key=lambda rows: [row[:2] for row in rows])
    return {leg: f"l{at:04d}" for at, (*_, leg) in enumerate(order)}


def _signs(pattern: Pattern, places: Mapping[Leg, list[Place]], sizes: Sizes) -> list[int]:
    """The sign whose values and terms come first, whatever legs are called; both if alike."""
    ends = (pattern.values[0], pattern.values[-1]) if pattern.values else ()
    keys = {
        sign: (
            sorted(sign * end for end in ends),
            sorted((places[leg], sizes[leg], sign * a) for leg, a in pattern.terms),
        )
        for sign in (1, -1)
    }
    return [sign for sign, key in keys.items() if key == min(keys.values())]
