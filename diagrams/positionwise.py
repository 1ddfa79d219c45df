"""Layers that mix no positions: scales, biases, lookups; and a layer that is called repeatedly."""

from collections.abc import Sequence

from tnconv.diagrams.affine import Leg, Tensor, View
from tnconv.diagrams.hyperparameters import checked_shape
from tnconv.diagrams.network import TensorNetwork


def scale(
    input_shape: Sequence[int], weight_shape: Sequence[int], dimension: int = 1
) -> TensorNetwork:
    """``y[n, o, d, o'] = x[n, o, d, o'] w[d]``: normalisation layers, after normalising.

    ``weight`` has the sizes of the input from ``dimension`` on, negative ones counted from the end.

    >>> scale((8, 3, 32, 32), (3,)).vjp("weight").shape
    (3,)

    Raises:
        ValueError: a weight that does not have the input's sizes there.
    """
    sizes, input, weight = _aligned(input_shape, weight_shape, dimension)
    nodes = (Tensor("x", View.of(sizes, *input)), Tensor("weight", View.of(sizes, *weight)))
    return TensorNetwork(nodes, View.of(sizes, *input), sizes)


def bias(
    output_shape: Sequence[int], bias_shape: Sequence[int], dimension: int = 1
) -> TensorNetwork:
    """``y[n, o, d, o'] = b[d]``: a bias by itself, read as `scale` reads its weight.

    >>> bias((8, 3, 32, 32), (3,)).vjp("bias", per_sample=True).shape
    (8, 3)

    Raises:
        ValueError: a bias that does not have the output's sizes there.
    """
    sizes, output, held = _aligned(output_shape, bias_shape, dimension)
    return TensorNetwork((Tensor("bias", View.of(sizes, *held)),), View.of(sizes, *output), sizes)


def lookup(input_shape: Sequence[int], weight_shape: Sequence[int]) -> TensorNetwork:
    """``y[n, o, d] = Σ_c x[n, o, c] w[c, d]``: an embedding of one-hot rows x.

    >>> lookup((8, 5, 100), (100, 4)).shape
    (8, 5, 4)

    Raises:
        ValueError: a weight that is no matrix or does not fit the input.
    """
    shape, weight = checked_shape("input", input_shape), checked_shape("weight", weight_shape)
    if len(weight) != 2 or not shape or shape[-1] != weight[0]:
        raise ValueError(f"weight has shape {weight}; expected ({shape[-1:]}, dimensions)")
    leading = ("n", *(f"o{at}" for at in range(1, len(shape) - 1)))[: len(shape) - 1]
    sizes = dict(zip((*leading, "c", "d"), (*shape, weight[1]), strict=True))
    nodes = (Tensor("x", View.of(sizes, *leading, "c")), Tensor("weight", View.of(sizes, "c", "d")))
    return TensorNetwork(nodes, View.of(sizes, *leading, "d"), sizes)


def repeated(layer: TensorNetwork, calls: int, operands: Sequence[str] = ("x",)) -> TensorNetwork:
    """``y[t, n, ...] = layer(x[t, n, ...])``: several calls of a layer, with the same parameters.

    A call is one more output position, in front of the others in the ``operands`` that differ from
    call to call and in the result, so that every quantity of a layer is also one of a layer that a
    network calls more than once.

    >>> from tnconv.diagrams import conv
    >>> repeated(conv((8, 3, 9), (4, 3, 3)), 2).vjp("weight", per_sample=True).shape
    (8, 4, 3, 3)

    Raises:
        ValueError: a layer that has a leg ``t`` already.
    """
    if "t" in layer.sizes:
        raise ValueError(f"leg 't' exists already; the legs are {sorted(layer.sizes)}")
    sizes = dict(layer.sizes) | {"t": calls}
    nodes = (
        Tensor(node.name, node.view.prepend(sizes, ("t",)))
        if isinstance(node, Tensor) and node.name in operands
        else node
        for node in layer.nodes
    )
    return layer.with_(nodes, layer.result.prepend(sizes, ("t",)), sizes)


def _aligned(
    shape: Sequence[int], held: Sequence[int], dimension: int
) -> tuple[dict[Leg, int], list[Leg], list[Leg]]:
    """Sizes and legs of an array: n, positions o, and d in the dimensions that ``held`` has."""
    shape, held = checked_shape("input", shape), checked_shape("weight", held)
    start = dimension if dimension >= 0 else len(shape) + dimension
    stop = start + len(held)
    if not 0 < start <= len(shape) or shape[start:stop] != held:
        raise ValueError(
            f"weight has shape {held}; expected the sizes of {shape} from dimension {dimension} on"
        )
    names = [f"d{at}" for at in range(1, len(held) + 1)] if len(held) > 1 else ["d"] * len(held)
    rest = range(1, len(shape) - len(held))
    positions = [f"o{at}" for at in rest]
    legs = ["n", *positions[: start - 1], *names, *positions[start - 1 :]]
    return dict(zip(legs, shape, strict=True)), legs, names
