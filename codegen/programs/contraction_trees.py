"""The contraction path of a network as an einsum, in the words of opt_einsum and of cotengra."""

from typing import TYPE_CHECKING, Any

from tnconv.codegen.lowering.contraction import contraction_path, path_flops
from tnconv.codegen.lowering.forms import forms_of
from tnconv.diagrams.network import TensorNetwork

if TYPE_CHECKING:
    import cotengra
    import opt_einsum


def path_and_info(network: TensorNetwork) -> "tuple[list[tuple[int, ...]], opt_einsum.PathInfo]":
    """What ``opt_einsum.contract_path`` tells of the einsum form, along our own path."""
    import opt_einsum

    equation, arrays = einsum_form(network).einsum(device="meta")
    terms, output = equation.split("->")
    sizes = _sizes(terms, arrays)
    path = contraction_path(terms.split(","), output, sizes)
    shapes = [tuple(array.shape) for array in arrays]
    found, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=list(path))
    return list(found), info


def tree(network: TensorNetwork) -> "cotengra.ContractionTree":
    """The same path as a tree of cotengra, which plots it and tells its costs."""
    import cotengra

    equation, arrays = einsum_form(network).einsum(device="meta")
    terms, output = equation.split("->")
    inputs, sizes = terms.split(","), _sizes(terms, arrays)
    path = contraction_path(inputs, output, sizes)
    legs = [tuple(term) for term in inputs]
    return cotengra.ContractionTree.from_path(legs, tuple(output), sizes, path=path)


def einsum_form(network: TensorNetwork) -> TensorNetwork:
    """The form of a network that takes the fewest flops if patterns are dense tensors."""
    forms, _ = forms_of(network, style="einsum")
    return min(forms.values(), key=path_flops)


def _sizes(terms: str, arrays: list[Any]) -> dict[str, int]:
    pairs = zip(terms.split(","), arrays, strict=True)
    return {leg: size for term, array in pairs for leg, size in zip(term, array.shape, strict=True)}
