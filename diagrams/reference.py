"""The dense oracle: nodes and views become 0/1 and operand arrays, one einsum gives the value."""

from collections.abc import Collection, Mapping
from functools import lru_cache

import numpy as np
import opt_einsum
import torch
from numpy.typing import NDArray
from torch import Tensor as Array

from tnconv.diagrams.affine import Axis, Leg, Pattern, Selection, Sizes, Terms, View
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
            held = [
                axis.terms[0][0] if _is_leg(axis, network.sizes) else (f"node {at}", p)
                for p, axis in enumerate(node.view.axes)
            ]
            factors.append((array, held))
            factors += _axis_maps(node.view, f"node {at}", network.sizes, plain=False)
    factors += _axis_maps(network.result, "result", network.sizes)
    every = {leg for _, legs in factors for leg in legs}
    factors += [(torch.ones(n), [leg]) for leg, n in network.sizes.items() if leg not in every]
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
    coefficients = tuple([a for _, a in terms])
    found = _indicator(coefficients, values, tuple([sizes[leg] for leg, _ in terms]))
    return torch.from_numpy(found.copy())


@lru_cache(maxsize=64)  # derivatives, and plans that are compared, share their patterns
def _indicator(
    coefficients: tuple[int, ...], values: range, shape: tuple[int, ...]
) -> NDArray[np.float64]:
    """No tensor: under torch's transforms those belong to one call."""
    total = np.zeros(shape, dtype=np.int64)
    for a, position in zip(coefficients, np.indices(shape, sparse=True), strict=True):
        total += a * position
    return np.isin(total, np.array(values, dtype=np.int64)).astype(np.float64)


def _axis_maps(view: View, holder: str, sizes: Sizes, plain: bool = True) -> Factors:
    """``[position = offset + Σ a·leg]`` for each axis: from array positions to leg values.

    Axes that are a leg need none, unless ``plain``.
    """
    maps: Factors = []
    for at, axis in enumerate(view.axes):
        if not plain and _is_leg(axis, sizes):
            continue
        position = "\0position"
        terms = ((position, -1), *axis.terms)
        met = range(-axis.offset, 1 - axis.offset)
        array = indicator(terms, met, {**sizes, position: axis.size})
        maps.append((array, [(holder, at), *(leg for leg, _ in axis.terms)]))
    return maps


def _is_leg(axis: Axis, sizes: Sizes) -> bool:
    return any(axis == Axis(sizes[leg], 0, ((leg, 1),)) for leg, _ in axis.terms)
