"""Programs in einsum style: the same steps printed by another printer, with the same values."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from tests.strategies import assert_close, networks, operands_for, shipped
from tnconv import compile
from tnconv.codegen.lowering.contraction import contraction_path
from tnconv.diagrams import TensorNetwork, conv, kfac_expand, kfac_reduce, linear, with_bias
from tnconv.diagrams.explicit import explicit

pytestmark = pytest.mark.usefixtures("double_precision")

NETWORK = networks(selections=True) | shipped(max_dims=2)


@settings(max_examples=60)
@given(network=NETWORK)
def test_values(network: TensorNetwork) -> None:
    operands = operands_for(network)
    program = compile(network, style="einsum")
    assert_close(program(**operands), network.reference(**operands), 1e-10)


@settings(max_examples=60)
@given(network=NETWORK)
def test_any_steps_can_be_printed_in_any_style(network: TensorNetwork) -> None:
    """Also those of other routes: loops, windows, native kernels."""
    operands = operands_for(network)
    program = compile([network, network])
    expected = program(**operands)
    for plan in program.terms[0][:3]:
        other = replace(program, terms=((plan,), (plan,)), style="einsum")
        for value, value_in_torch in zip(other(**operands), expected, strict=True):
            assert_close(value, value_in_torch, 1e-10)


@given(network=NETWORK)
def test_explicit_networks_have_plain_views_and_the_same_values(network: TensorNetwork) -> None:
    plain = explicit(network)
    for view in (plain.result, *(node.view for node in plain.tensors if len(node.shape) > 1)):
        legs = [axis.plain(plain.sizes) for axis in view.axes]
        assert None not in legs and len({*legs}) == len(legs)
    operands = operands_for(network)
    assert_close(plain.reference(**operands), network.reference(**operands), 1e-10)


@pytest.mark.parametrize(
    "network",
    [
        conv((4, 3, 9, 9), (5, 3, 3, 3), padding=1),
        conv((4, 3, 9), (5, 3, 3), stride=2).vjp("weight", per_sample=True).terms[0],
        kfac_expand((4, 3, 9, 9), 3, padding=1),
        kfac_reduce((4, 3, 16), 4, stride=4),
        linear((8, 3), (4, 3)),
    ],
)
def test_every_product_is_an_einsum_along_the_path(network: TensorNetwork) -> None:
    program = compile(network, style="einsum", simplify=False)
    products = [step for step in program.steps if step.kernel.kind in ("matmul", "sum")]
    assert program.source.count("torch.einsum(") >= len(products) > 0
    assert " @ " not in program.source and "F." not in program.source
    legs = [node.legs for node in explicit(network).nodes]
    output = [leg for leg in network.result.legs if network.holders[leg]]
    path = contraction_path(legs, output, explicit(network).sizes)
    mirrored = len(network.operands) < len([*network.tensors])  # halves that are computed once
    assert len(products) >= len(path) // (1 + mirrored)


def test_products_are_printed_as_what_they_mean() -> None:
    text = compile(linear((8, 3), (4, 3)), style="einsum").source
    assert 'torch.einsum("ab,cb->ac", x, weight)' in text


def test_source_explanation_and_derivatives() -> None:
    layer = with_bias(conv((4, 3, 9, 9), (5, 3, 3, 3), padding=1))
    program = compile(layer, style="einsum")
    assert "tnconv" not in program.source and "torch.einsum" in program.explain()
    namespace: dict[str, object] = {}
    exec(program.source, namespace)
    operands = operands_for(layer)
    value = namespace["contraction"](*(operands[name] for name in program.operands))  # type: ignore[operator]
    assert_close(value, layer.reference(**operands), 1e-10)
    leaves = [x.requires_grad_() for x in operands.values()]
    ours = torch.autograd.grad(program(**operands).sin().sum(), leaves)
    torchs = torch.autograd.grad(compile(layer)(**operands).sin().sum(), leaves)
    torch.testing.assert_close(ours, torchs)
    both = compile([layer, layer.vjp("weight")], style="einsum")
    assert both.source.count("= pattern(") == 1  # shared by both dimensions, and by both networks


def test_errors() -> None:
    layer = linear((8, 3), (4, 3))
    with pytest.raises(ValueError, match=r"style is 'jax'; expected one of \['torch', 'einsum'\]"):
        compile(layer, style="jax")
    with pytest.raises(ValueError, match="memory_limit is 99 and style 'einsum'; expected 'torch'"):
        compile(layer, style="einsum", memory_limit=99)
