"""The same networks for another size of a leg: another batch, mostly."""

from collections.abc import Mapping, Sequence
from math import prod

from tnconv.diagrams.affine import Axis, Leg, Tensor, View
from tnconv.diagrams.expression import Expression, Sum
from tnconv.diagrams.network import TensorNetwork, array_dimension

Place = tuple[str, int]
"""An operand, and how many entries of the axes before lie at a position of an axis."""


def resized(networks: Sequence[Expression], leg: Leg, size: int) -> tuple[Expression, ...] | None:
    """The networks with another size of ``leg`` and of the legs that are tied to it.

    Those are legs of the same dimension of an operand, and second copies (with primes) of the same
    size. Scales stay. None if a pattern holds such a leg, if it is not a whole axis wherever it is
    held, or if no network has the leg.

    >>> from tnconv.diagrams import conv
    >>> (larger,) = resized([conv((8, 3, 32), (4, 3, 5))], "n", 13)
    >>> larger.operands, larger.shape
    ({'x': (13, 3, 32), 'weight': (4, 3, 5)}, (13, 4, 28))
    >>> resized([larger], "i", 13) is None
    True
    """
    found: list[Expression] = []
    shapes: dict[str, tuple[int, ...]] = {}
    changed = False
    for network in networks:
        terms = []
        for term in network.terms:
            legs = _tied(term, leg) if leg in term.sizes else []
            if legs is None or any(term.sizes[each] < 2 for each in legs):
                return None
            after = _with_size(term, legs, size)
            if after is None:
                return None
            changed = changed or bool(legs)
            terms.append(after)
            for tensor in after.tensors:
                if shapes.setdefault(tensor.name, tensor.shape) != tensor.shape:
                    return None
        if any(term.shape != terms[0].shape for term in terms):
            return None
        found.append(terms[0] if isinstance(network, TensorNetwork) else Sum(tuple(terms)))
    return tuple(found) if changed else None


def _tied(network: TensorNetwork, leg: Leg) -> list[Leg] | None:
    """The leg and those tied to it; None if one is no whole dimension of an operand."""
    places: dict[Place, set[Leg | None]] = {}
    for tensor in network.tensors:
        before = 1
        for axis in tensor.view.axes:
            if axis.size > 1:
                places.setdefault((tensor.name, before), set()).add(axis.plain(network.sizes))
            before *= axis.size
    size = network.sizes[leg]
    tied = [leg, *(x for x in network.sizes if x.rstrip("'") == leg != x)]
    tied = [each for each in tied if network.sizes[each] == size]
    for each in tied:
        for alike in places.values():
            if each in alike:
                if None in alike:
                    return None
                tied += [other for other in alike if other not in tied and other is not None]
    return tied


def _with_size(network: TensorNetwork, legs: Sequence[Leg], size: int) -> TensorNetwork | None:
    """The network with one size of these legs, if they are whole axes wherever they are held."""
    if not legs:
        return network
    if any(leg in pattern.legs for _, pattern in network.patterns for leg in legs):
        return None
    if 0 in network.sizes.values() or network.scale == 0:
        return None
    nodes = []
    for tensor in network.nodes:
        if isinstance(tensor, Tensor):
            if (view := _view(tensor.view, legs, network.sizes, size)) is None:
                return None
            tensor = tensor.read_through(view)
        nodes.append(tensor)
    if (result := _view(network.result, legs, network.sizes, size)) is None:
        return None
    sizes = {leg: size if leg in legs else own for leg, own in network.sizes.items()}
    return network.with_(nodes, result, sizes)


def _view(view: View, legs: Sequence[Leg], sizes: Mapping[Leg, int], size: int) -> View | None:
    shape, axes = list(view.shape), list(view.axes)
    before = 1
    for at, axis in enumerate(view.axes):
        if any(leg in legs for leg, _ in axis.terms):
            if axis.plain(sizes) is None:
                return None
            dim = array_dimension(view, at)
            if before % prod(view.shape[:dim]) or shape[dim] % axis.size:
                return None
            shape[dim] = shape[dim] // axis.size * size
            axes[at] = Axis(size, 0, axis.terms)
        before *= axis.size
    return View(tuple(shape), tuple(axes)) if prod(shape) == prod(a.size for a in axes) else None
