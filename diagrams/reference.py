"""The dense oracle: nodes and views become 0/1 and operand arrays, one einsum gives the value."""

from collections.abc import Collection, Mapping

import opt_einsum
import torch
from torch import Tensor as Array

from tnconv.diagrams.affine import Leg, Pattern, Selection, Sizes, Terms, View
from tnconv.diagrams.expression import Expression
from tnconv.diagrams.network import TensorNetwork

Factors = list[tuple[Array, list[Leg | tuple[str, int]]]]


def reference(network: Expression, operands: Mapping[str, Array]) -> Array:
    """``scale · Σ_legs Π nodes`` by dense contraction in float64 (complex128 for complex operands).

    Slow and obviously right: the oracle for every rule and route. A dense pattern multiplies by
    zero where native kernels skip, so it spreads nan and inf along its axes; they do not.

    Raises:
        ValueError: an operand is missing, unknown, or of another shape.
        TypeError: an operand is not a tensor.
    """
    check_operands(network.operands, operands, network.indices)
    values = [_reference(term, operands) for term in network.terms]
    return sum(values[1:], start=values[0])


def _reference(network: TensorNetwork, operands: Mapping[str, Array]) -> Array:
    dtype = torch.complex128 if any(x.is_complex() for x in operands.values()) else torch.float64
    device = next((x.device for x in operands.values()), torch.device("cpu"))
    factors: Factors = []
    for at, node in enumerate(network.nodes):
        if isinstance(node, Pattern):
            factors.append((indicator(node.terms, node.values, network.sizes), list(node.legs)))
        else:
            array = operands[node.name]
            if isinstance(node, Selection):
                array = torch.nn.functional.one_hot(array, node.view.shape[1])
            array = array.to(dtype).reshape([axis.size for axis in node.view.axes])
            factors.append((array, [(f"node {at}", p) for p in range(array.ndim)]))
            factors += _axis_maps(node.view, f"node {at}", network.sizes)
    factors += _axis_maps(network.result, "result", network.sizes)
    factors += [(torch.ones(size), [leg]) for leg, size in network.sizes.items()]
    number: dict[Leg | tuple[str, int], int] = {}
    arguments: list[Array | list[int]] = []
    for array, legs in factors:
        arguments += [
            array.to(dtype=dtype, device=device),
            [number.setdefault(leg, len(number)) for leg in legs],
        ]
    output = [number[("result", position)] for position in range(len(network.result.axes))]
    if not factors:
        return torch.full(network.shape, float(network.scale), dtype=dtype, device=device)
    value: Array = opt_einsum.contract(*arguments, output, optimize="greedy")
    return (value * float(network.scale)).reshape(network.shape)


def check_operands(
    expected: Mapping[str, tuple[int, ...]],
    given: Mapping[str, Array],
    indices: Collection[str] = (),
) -> None:
    """Raise unless ``given`` has exactly the expected names, as tensors of the expected shapes.

    Those that ``indices`` names hold integers.

    Raises:
        ValueError: an operand is missing, unknown, or of another shape, or an index is not int64.
        TypeError: an operand is not a tensor.
    """
    if given.keys() != expected.keys():
        raise ValueError(f"got operands {sorted(given)}; expected {sorted(expected)}")
    for name, array in given.items():
        if not isinstance(array, Array):
            raise TypeError(f"operand {name!r} is a {type(array).__name__}; expected a tensor")
        if tuple(array.shape) != expected[name]:
            raise ValueError(
                f"operand {name!r} has shape {tuple(array.shape)}; expected {expected[name]}"
            )
        if name in indices and array.dtype != torch.int64:
            raise ValueError(f"operand {name!r} has dtype {array.dtype}; expected torch.int64")


def indicator(terms: Terms, values: range, sizes: Sizes) -> Array:
    """``[Σ a·leg in values]`` as an array with one dimension per term."""
    total = torch.zeros((), dtype=torch.int64)
    for _ in terms:
        total = total.unsqueeze(-1)
    for position, (leg, a) in enumerate(terms):
        steps = a * torch.arange(sizes[leg])
        total = total + steps.reshape([-1 if p == position else 1 for p in range(len(terms))])
    return torch.isin(total, torch.tensor(list(values), dtype=torch.int64)).double()


def _axis_maps(view: View, holder: str, sizes: Sizes) -> Factors:
    """``[position = offset + Σ a·leg]`` for each axis: from array positions to leg values."""
    maps: Factors = []
    for at, axis in enumerate(view.axes):
        position = "\0position"
        terms = ((position, -1), *axis.terms)
        met = range(-axis.offset, 1 - axis.offset)
        array = indicator(terms, met, {**sizes, position: axis.size})
        maps.append((array, [(holder, at), *(leg for leg, _ in axis.terms)]))
    return maps
