"""The 130 convolutions of nine CNNs: padding stays where native kernels take it."""

import pytest

from benchmarks import cases
from benchmarks.simplification import OPERATIONS
from tnconv.diagrams import TensorNetwork
from tnconv.simplify import simplify


def padded(network: TensorNetwork) -> list[str]:
    """The operands, or the result, with an axis that reaches outside or leaves a border."""
    views = [(node.name, node.view) for node in network.tensors] + [("result", network.result)]
    return [name for name, view in views for axis in view.axes if any(axis.overhang(network.sizes))]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_view_is_padded_where_a_native_kernel_takes_the_padding(operation: str) -> None:
    """A view is padded only if its form has no pattern left that a kernel could match."""
    for layer in cases.layers():
        for term in OPERATIONS[operation](layer, 2).terms:
            result = simplify(term)
            for form in (result.normal, result.views):
                assert isinstance(form, TensorNetwork)
                assert padded(form) == [] or not list(form.patterns), layer.name


@pytest.mark.parametrize("operation", OPERATIONS)
def test_normal_forms_read_whole_inputs(operation: str) -> None:
    """Left over inputs stay in form N: kernels skip them, and give a gradient of their size."""
    for layer in cases.layers():
        for term in OPERATIONS[operation](layer, 2).terms:
            normal = simplify(term).normal
            assert isinstance(normal, TensorNetwork)
            inputs = [leg for leg in normal.sizes if leg.startswith("i")]
            assert all(normal.sizes[leg] == term.sizes[leg] for leg in inputs), layer.name
