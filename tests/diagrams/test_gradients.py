"""Derivatives of layers, and what is made of per-sample gradients, against torch.func."""

from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import jacrev, jvp, vjp

from tests.strategies import ZOO, assert_close, geometries, operands_for, other_batch
from tnconv.diagrams import (
    conv,
    ggn_block,
    ggn_diagonal,
    ggn_vector_product,
    gradient_dots,
    gradient_norms,
    linear,
    ntk_block,
    with_bias,
)

RELATIVE = 1e-10


LAYERS = {
    "conv": lambda case: case.conv,
    "conv_transpose": lambda case: (
        lambda x, weight, bias: case.conv_transpose(x, weight) + bias.reshape(-1, *[1] * case.dims)
    ),
    "linear": lambda case: F.linear,
}
"""Functions of an input with batch, a weight and a bias."""


def build(name, case):
    """A layer with bias, its value as a function of (x, weight, bias), and operands for it."""
    network = with_bias(ZOO[name](case))
    return network, LAYERS[name](case), operands_for(network)


def vector_like(x, seed, *leading):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, *x, generator=generator, dtype=torch.float64)


def evaluate(network, operands, **more):
    known = operands | more
    return network.reference(**{name: known[name] for name in network.operands})


layers = pytest.mark.parametrize("name", LAYERS)
cases = geometries(max_dims=3, empty=False)
NAMES = ("x", "weight", "bias")


@layers
@given(case=cases, data=st.data())
def test_mixed_second_derivatives(name, case, data):
    """``∂²(v·y) / ∂a ∂b`` along a tangent, forward over reverse and reverse over reverse."""
    network, function, operands = build(name, case)
    first, second = data.draw(st.sampled_from([("x", "weight"), ("weight", "x")]))
    v, t = vector_like(network.shape, 1), vector_like(network.operands[second], 2)
    u = vector_like(network.operands[first], 3)

    def gradient(b):
        at = operands | {second: b}
        return vjp(lambda a: function(**at | {first: a}), at[first])[1](v)[0]

    once = network.vjp(first)
    pushed = jvp(gradient, (operands[second],), (t,))[1]
    forward = once.jvp(second)
    given_ = {"grad_output": v, f"tangent_{second}": t, "other": u}
    assert_close(evaluate(forward, operands, **given_), pushed, RELATIVE)
    pulled = vjp(gradient, operands[second])[1](u)[0]
    assert_close(
        evaluate(once.vjp(second, cotangent="other"), operands, **given_), pulled, RELATIVE
    )


@layers
@given(case=cases, count=st.integers(0, 3))
def test_several_cotangents_of_every_operand(name, case, count):
    """One loop over cotangents for the batch's gradient, per sample, and in both directions."""
    network, function, operands = build(name, case)
    v = vector_like(network.shape, 1, count)
    pulled = vjp(function, *[operands[which] for which in NAMES])[1]
    rows = [pulled(row) for row in v]
    for at, which in enumerate(NAMES):
        derivative = network.vjp(which, extra={"m": count})
        expected = [row[at] for row in rows]
        expected = torch.stack(expected) if rows else torch.zeros(0, *network.operands[which])
        assert_close(evaluate(derivative, operands, grad_output=v), expected.double(), RELATIVE)
        t = vector_like(network.operands[which], 2, count)
        forward = network.jvp(which, extra={"m": count})
        value = evaluate(forward, operands, **{f"tangent_{which}": t})
        for tangent, result in zip(t, value, strict=True):
            at_which = (operands[which],)

            def along(y, which=which):
                return function(**operands | {which: y})

            assert_close(result, jvp(along, at_which, (tangent,))[1], RELATIVE)


@layers
@given(case=cases, data=st.data())
def test_per_sample_directions(name, case, data):
    """Every sample has its own cotangents (two of them), and its own tangent of a parameter."""
    network, function, operands = build(name, case)
    which = data.draw(st.sampled_from(("weight", "bias")))
    j = jacobians(network, function, operands, which)
    v = vector_like(network.shape, 1, 2)
    derivative = network.vjp(which, per_sample=True, extra={"m": 2})
    expected = torch.einsum("mno,nop->mnp", v.flatten(2), j)
    value = evaluate(derivative, operands, grad_output=v)
    assert_close(value, expected.reshape(value.shape), RELATIVE)
    t = vector_like(network.operands[which], 2, len(j))
    forward = network.jvp(which, per_sample=True)
    value = evaluate(forward, operands, **{f"tangent_{which}": t})
    expected = torch.einsum("nop,np->no", j, t.flatten(1))
    assert_close(value, expected.reshape(value.shape), RELATIVE)


def jacobians(network, function, operands, which):
    """``∂y[n] / ∂θ`` as ``J[n, o, p]``; a layer acts on each sample alone."""
    y, at = operands[which], operands
    j = jacrev(lambda y: function(**at | {which: y}))(y)
    return j.reshape(network.shape[0], prod(network.shape[1:]), y.numel())


@layers
@given(case=cases, data=st.data())
def test_gradients_of_samples(name, case, data):
    """Dots, norms, Gauss-Newton diagonal, block and product, and the kernel of two batches."""
    network, function, operands = build(name, case)
    which = data.draw(st.sampled_from(("weight", "bias")))
    vectors = data.draw(st.sampled_from((None, 1, 3)))
    shape = network.operands[which]
    lead = () if vectors is None else (vectors,)

    def gradients(network, operands, v):
        j = jacobians(network, function, operands, which)
        return torch.einsum("mno,nop->mnp", v.reshape(-1, len(j), j.shape[1]), j)

    v = vector_like(network.shape, 1, *lead)
    j = gradients(network, operands, v)
    options = {"operand": which, "vectors": vectors}
    u = vector_like(shape, 2)
    samples = network.shape[0]
    expected = {
        gradient_dots: torch.einsum("mnp,qrp->mnqr", j, j),
        gradient_norms: j.square().sum(-1),
        ggn_diagonal: j.square().sum((0, 1)),
        ggn_block: torch.einsum("mnp,mnq->pq", j, j),
        ggn_vector_product: torch.einsum("mnp,mnq,q->p", j, j, u.flatten()),
    }
    shapes = {
        gradient_dots: 2 * (*lead, samples),
        gradient_norms: (*lead, samples),
        ggn_diagonal: shape,
        ggn_block: 2 * shape,
        ggn_vector_product: shape,
    }
    for quantity, value in expected.items():
        diagram = quantity(network, **options)
        found = evaluate(diagram, operands, grad_output=v, vector=u)
        assert_close(found, value.reshape(shapes[quantity]), RELATIVE)
    each = evaluate(ggn_diagonal(network, **options, per_sample=True), operands, grad_output=v)
    assert_close(each, j.square().sum(0).reshape(samples, *shape), RELATIVE)
    other, _, rest = build(name, other_batch(case))
    rest |= {name: operands[name] for name in ("weight", "bias")}
    w = vector_like(other.shape, 3, 2)
    k = gradients(other, rest, w)
    block = ntk_block(network, other, **options, other_vectors=2)
    known = {"x": operands["x"], "grad_output": v, "other_x": rest["x"], "other_grad_output": w}
    value = evaluate(block, known)
    assert_close(
        value, torch.einsum("mnp,qrp->mnqr", j, k).reshape(*lead, samples, 2, -1), RELATIVE
    )


def test_kernels_need_one_layer():
    with pytest.raises(ValueError, match=r"'weight' has shapes \(4, 3\) and \(5, 3\)"):
        ntk_block(linear((2, 3), (4, 3)), linear((2, 3), (5, 3)))
    with pytest.raises(ValueError, match="leg 'g' of sizes 1 and 2"):
        ntk_block(conv((2, 2, 8), (4, 2, 3)), conv((2, 4, 8), (4, 2, 3), groups=2))


def test_kernels_of_two_input_sizes():
    """Fully convolutional: the weight alone is common."""
    first, second = conv((2, 3, 8), (4, 3, 3)), conv((5, 3, 11), (4, 3, 3), stride=2)
    block = ntk_block(first, second)
    operands = operands_for(block)
    a = first.vjp("weight", per_sample=True)
    b = second.vjp("weight", per_sample=True)
    rows = a.reference(x=operands["x"], grad_output=operands["grad_output"])
    columns = b.reference(x=operands["other_x"], grad_output=operands["other_grad_output"])
    assert_close(block.reference(**operands), rows.flatten(1) @ columns.flatten(1).T)
