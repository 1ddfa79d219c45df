"""Elementwise products: tensors with the same legs are one."""

from dataclasses import replace
from itertools import combinations

from tnconv.codegen.lowering.covers import Cover
from tnconv.codegen.lowering.pairs import hadamard
from tnconv.codegen.lowering.values import Value
from tnconv.codegen.lowering.writer import MULTIPLY, Writer
from tnconv.codegen.prices import cost
from tnconv.diagrams.affine import Tensor


def multiplied(cover: Cover) -> Cover:
    """``Σ A[i, j] B[i, j] C[j, ..] .. = Σ (A ∘ B)[i, j] C[j, ..] ..``: routes join two tensors.

    A product of only two tensors without patterns is left to the contraction.
    """
    network = cover.network
    if len(network.nodes) < 3 or cover.selection is not None:
        return cover
    tensors = [(at, node) for at, node in enumerate(network.nodes) if isinstance(node, Tensor)]
    for (at, a), (other, b) in combinations(tensors, 2):
        if {*a.legs} == {*b.legs}:
            read, first = cover.value(at)
            read, second = read.value(other)
            writer, value = _product(read.writer, first, second)
            after = read.put(writer, (at, other), value, "")
            return multiplied(replace(after, routes=cover.routes))
    return cover


def _product(writer: Writer, first: Value, second: Value) -> tuple[Writer, Value]:
    """An array by itself is squared before it is reshaped."""
    origin = first.array.unshaped
    if first != second or origin is first.array:
        return hadamard(writer, first, second)
    kernel = cost.elementwise(origin.size, 2 * origin.size)
    writer, square = writer.run(MULTIPLY, [origin, origin], origin.shape, kernel, "square")
    array = square.free_reshape(first.array.shape)
    assert array is not None
    return writer, Value(array, first.legs)
