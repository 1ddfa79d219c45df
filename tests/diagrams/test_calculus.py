"""Derivatives: random networks against torch.func, layers against torch's own autograd."""

from dataclasses import replace

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.func import jacrev, jvp, vjp

from tests.strategies import (
    MODES,
    SUMS,
    ZOO,
    Case,
    assert_close,
    bounded,
    geometries,
    networks,
    operands_for,
)
from tnconv.diagrams import Sum, TensorNetwork, exactly, with_bias

RELATIVE = 1e-10


def random_like(x, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64)


def as_function(network, operand):
    """The reference value as a function of one operand, and that operand."""
    operands = operands_for(network)
    return lambda x: network.reference(**operands | {operand: x}), operands[operand]


def unfold(case):
    def value(x):
        u = case.patches(x).flatten(1, 2 + case.dims).flatten(2)
        return u if case.batched else u[0]

    return value


def kfac(case, reduce):
    def value(x):
        u = case.patches(x).flatten(2, 2 + case.dims).flatten(3)
        u = u.mean(-1, keepdim=True) if reduce else u
        return torch.einsum("ngao,ngbo->gab", u, u) / max(1, u.shape[0] * u.shape[-1])

    return value


def unfolded_transpose(case, reduce):
    def value(x):
        u = case.transposed_patches(x)
        u = u.mean(-1, keepdim=True) if reduce else u
        return torch.einsum("ngao,ngbo->gab", u, u) / max(1, u.shape[0] * u.shape[-1])

    return value


def mean_patches(case):
    def value(x):
        u = case.patches(x).flatten(2, 2 + case.dims).flatten(3).mean(-1)
        return u if case.batched else u[0]

    return value


def grad_factor(case, reduce):
    def value(grad_output):
        sizes = (case.groups, case.weight_shape[0] // case.groups)
        v = grad_output.unflatten(1, sizes).flatten(3)
        v = v.sum(-1, keepdim=True) if reduce else v
        return torch.einsum("ngdo,ngeo->gde", v, v)

    return value


def fold(case):
    """The adjoint of unfolding, by autograd."""
    return lambda x: vjp(unfold(case), torch.zeros(case.input_shape, dtype=x.dtype))[1](x)[0]


def avg_pool(case):
    native = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[case.dims - 1]
    return lambda x: native(case.padded(x), case.kernel_size, case.stride)


def avg_pool_counts(case):
    """A sum over patches of the input extended to the right, times what stands for the counts."""

    def value(x, reciprocal_counts=None):
        network = ZOO["avg_pool_counts"](case)
        rest = [s - 1 for s in case.strides]
        pads = tuple((left, right + r) for (left, right), r in zip(case.pads, rest, strict=True))
        wide = Case(case.input_shape, case.weight_shape, case.stride, pads, groups=1)
        taps = tuple(range(3, 3 + case.dims))
        y = wide.patches(x)[:, 0].sum(tuple(t - 1 for t in taps))
        y = y[(..., *(slice(0, o) for o in network.shape[-case.dims :]))]
        return y * (float(network.scale) if reciprocal_counts is None else reciprocal_counts)

    return value


def input_jacobian(case, weight):
    """``∂y / ∂x`` of one sample as a matrix."""
    x = torch.zeros(case.input_shape[-case.dims - 1 :], dtype=weight.dtype)
    jacobian = jacrev(lambda x: case.conv(x, weight))(x)
    return jacobian.reshape(-1, x.numel())


def of_gradients(case, value):
    """A function of the per-sample gradients ``J[m, n, θ]``, and the weight's shape."""

    return lambda x, grad_output, **rest: value(
        gradients(case, x, grad_output), case.weight_shape, **rest
    )


def gradients(case, x, grad_output):
    """``J[m, n, θ]`` from patches; m is 1 where ``grad_output`` has no such dimension."""
    u = case.patches(x).flatten(2, 2 + case.dims).flatten(3)
    v = grad_output if grad_output.dim() == case.dims + 3 else grad_output[None]
    v = v.unflatten(2, (case.groups, case.weight_shape[0] // case.groups)).flatten(4)
    return torch.einsum("ngao,mngdo->mngda", u, v).flatten(2)


def ntk_block(case):
    def value(x, grad_output, other_x, other_grad_output):
        j, k = gradients(case, x, grad_output), gradients(case, other_x, other_grad_output)
        return torch.einsum("mnp,qrp->mnqr", j, k)

    return value


def pad(case, mode):
    """The padding as a choice of positions, which numpy tells."""
    names = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    dim = -case.dims
    size, (left, right) = case.input_shape[dim], bounded(case)[0]
    if mode == "zeros":
        return lambda x: F.pad(x, [0, 0] * (case.dims - 1) + [left, right])
    index = torch.from_numpy(numpy.pad(numpy.arange(size), (left, right), names[mode]))
    return lambda x: x.index_select(dim, index)


def padded_conv(case, mode):
    """Pad, then convolve with the padding that is left."""

    def value(x, weight):
        y = pad(case, mode)(x)
        rest = [(a - c, b - d) for (a, b), (c, d) in zip(case.pads, bounded(case), strict=True)]
        wide = replace(case, input_shape=tuple(y.shape), padding=tuple(rest))
        return wide.conv(y, weight)

    return value


def padded_jacobian(case, mode, weight):
    x = torch.zeros(1, *case.input_shape[1:], dtype=weight.dtype)
    jacobian = jacrev(lambda x: padded_conv(case, mode)(x, weight))(x)
    return jacobian.reshape(-1, x.numel())


def padded_hessian(case):
    def value(hessian, weight):
        jacobian, shape = padded_jacobian(case, "reflect", weight), case.input_shape[1:]
        return (jacobian.T @ hessian.reshape(2 * jacobian.shape[:1]) @ jacobian).reshape(2 * shape)

    return value


def diagonal(case, mode=None):
    def value(diagonal, weight):
        jacobian = (
            input_jacobian(case, weight) if mode is None else padded_jacobian(case, mode, weight)
        )
        flat = diagonal.reshape(case.input_shape[0], jacobian.shape[0])
        return (flat @ jacobian**2).reshape(case.input_shape)

    return value


def hessian(case):
    def value(hessian, weight):
        jacobian, shape = input_jacobian(case, weight), case.input_shape[-case.dims - 1 :]
        return (jacobian.T @ hessian.reshape(2 * jacobian.shape[:1]) @ jacobian).reshape(2 * shape)

    return value


def split_outputs(case):
    shape = (case.groups, case.weight_shape[0] // case.groups)
    return lambda grad_output: grad_output.unflatten(2, shape)


NATIVE = {
    "conv": lambda case: case.conv,
    "with_bias": lambda case: (
        lambda x, weight, bias: (case.conv(x, weight).movedim(1, -1) + bias).movedim(-1, 1)
    ),
    "conv_transpose": lambda case: case.conv_transpose,
    "unfold": unfold,
    "fold": fold,
    "avg_pool": avg_pool,
    "avg_pool_counts": avg_pool_counts,
    "unfolded_kernel": lambda case: lambda weight: input_jacobian(case, weight),
    "kfac_expand": lambda case: kfac(case, reduce=False),
    "kfac_reduce": lambda case: kfac(case, reduce=True),
    "kfac_expand_transposed": lambda case: unfolded_transpose(case, reduce=False),
    "kfac_reduce_transposed": lambda case: unfolded_transpose(case, reduce=True),
    "input_factor": lambda case: lambda x: len(x) * kfac(case, reduce=False)(x),
    "output_factor": lambda case: (
        lambda grad_output: grad_factor(case, reduce=False)(grad_output.flatten(0, 1))
    ),
    "grad_expand": lambda case: grad_factor(case, reduce=False),
    "grad_reduce": lambda case: grad_factor(case, reduce=True),
    "kfac_expand_average": lambda case: lambda x: kfac(case, reduce=False)(x).mean(0, keepdim=True),
    "mean_patches": mean_patches,
    "mean_patches_transposed": lambda case: lambda x: case.transposed_patches(x).mean(-1),
    "unfold_transposed": lambda case: lambda x: case.transposed_patches(x).flatten(1, 2),
    "gradient_dots": lambda case: of_gradients(
        case, lambda j, shape: torch.einsum("mnp,qrp->mnqr", j, j)
    ),
    "ntk_block": ntk_block,
    "gradient_norms": lambda case: of_gradients(case, lambda j, shape: j[0].square().sum(-1)),
    "ggn_diagonal": lambda case: of_gradients(
        case, lambda j, shape: j.square().sum((0, 1)).reshape(shape)
    ),
    "ggn_block": lambda case: of_gradients(
        case, lambda j, shape: torch.einsum("mnp,mnq->pq", j, j).reshape(2 * shape)
    ),
    "ggn_vector_product": lambda case: of_gradients(
        case,
        lambda j, shape, vector: torch.einsum("mnp,mnq,q->p", j, j, vector.flatten()).reshape(
            shape
        ),
    ),
    "combined_gradients": lambda case: of_gradients(
        case,
        lambda j, shape, coefficients: torch.einsum("fmn,mnp->fp", coefficients, j).reshape(
            -1, *shape
        ),
    ),
    "gradient_projections": lambda case: of_gradients(
        case,
        lambda j, shape, directions: torch.einsum("mnp,fp->fmn", j, directions.flatten(1)),
    ),
    "input_half": lambda case: case.patches,
    "output_half": split_outputs,
    "diagonal_vjp": diagonal,
    "hessian_vjp": hessian,
    "linear": lambda case: lambda x, weight: F.linear(x, weight),
    "bilinear": lambda case: lambda x, other, weight: F.bilinear(x, other, weight),
    "lookup": lambda case: lambda x, weight: x @ weight,
    "scale": lambda case: lambda x, weight: x * weight.reshape(-1, *[1] * case.dims),
    "bias": lambda case: lambda bias: bias.expand(case.input_shape),
    "repeated": lambda case: lambda x, weight: torch.stack([case.conv(y, weight) for y in x]),
    "per_sample_gradients": lambda case: of_gradients(
        case, lambda j, shape: j.reshape(*j.shape[:2], *shape)
    ),
    "gradient_sum": lambda case: of_gradients(case, lambda j, shape: j.sum((0, 1)).reshape(shape)),
    "gradient_sums": lambda case: of_gradients(case, lambda j, s: j.sum(1).reshape(-1, *s)),
    **{f"pad_{mode}": lambda case, mode=mode: pad(case, mode) for mode in MODES},
    **{f"conv_{mode}": lambda case, mode=mode: padded_conv(case, mode) for mode in MODES[1:]},
    **{f"diagonal_vjp_{mode}": lambda case, mode=mode: diagonal(case, mode) for mode in MODES[1:]},
    "hessian_vjp_reflect": padded_hessian,
}
"""The zoo in torch's own words, as functions of the operands."""

# Derivatives in all directions


def check_derivatives(network, function, operands, operand, tol):
    """vjp, jvp and jacobian in one operand are those of ``function(*operands)``."""

    def value(x):
        return function(**operands | {operand: x})

    at = operands[operand]
    result, pull = vjp(value, at)
    assert_close(network.reference(**operands), result, tol)
    v, t = random_like(result), random_like(at)
    rest = {name: operands[name] for name in operands}
    for derivative, name, given_, expected in (
        (network.vjp(operand, cotangent="given"), "given", v, pull(v)[0]),
        (network.jvp(operand), f"tangent_{operand}", t, jvp(value, (at,), (t,))[1]),
    ):
        assert derivative.operands[name] == given_.shape
        known = {n: x for n, x in (rest | {name: given_}).items() if n in derivative.operands}
        assert_close(derivative.reference(**known), expected, tol)
    if 0 < at.numel() * result.numel() < 3000:
        jacobian = network.jacobian(operand)
        known = {name: operands[name] for name in jacobian.operands}
        assert_close(jacobian.reference(**known), jacrev(value)(at), tol)


@given(network=networks(min_tensors=1), data=st.data())
def test_random_networks(network, data):
    operands = operands_for(network)
    operand = data.draw(st.sampled_from(sorted(operands)))
    check_derivatives(network, lambda **given: network.reference(**given), operands, operand, 1e-12)


@pytest.mark.parametrize("name", NATIVE)
@settings(max_examples=settings.default.max_examples // 2)  # all of them share one calculus
@given(case=geometries(max_dims=3), data=st.data())
def test_zoo(name, case, data):
    network = (ZOO | SUMS)[name](case)
    operands = operands_for(network)
    operand = data.draw(st.sampled_from(sorted(operands)))
    function = NATIVE[name](case)
    check_derivatives(
        network,
        function,
        operands,
        operand,
        RELATIVE,
    )


def test_zoo_is_complete():
    """Every public function that takes shapes and gives a network has an entry."""
    from tnconv import diagrams

    functions = {
        name
        for name in diagrams.__all__
        if getattr(getattr(diagrams, name), "__annotations__", {}).get("return")
        in (TensorNetwork, TensorNetwork | Sum)
    }
    assert functions <= NATIVE.keys() <= ZOO.keys() | SUMS.keys()
    assert SUMS.keys() <= NATIVE.keys()


# Open legs, several directions, several occurrences


@given(case=geometries(max_dims=2))
def test_per_sample(case):
    """A loop over samples, for both directions of a layer with a bias."""
    network = with_bias(ZOO["conv"](case))
    operands = operands_for(network)
    x, weight, bias = (operands[name] for name in ("x", "weight", "bias"))
    assume(len(x))
    v = random_like(torch.empty(network.shape))
    for name in ("weight", "bias"):

        def value(p, at, name=name):
            given = {"weight": weight, "bias": bias} | {name: p}
            return case.conv(x[at : at + 1], **given)

        derivative = network.vjp(name, per_sample=True)
        known = {n: y for n, y in (operands | {"grad_output": v}).items()}
        known = {n: known[n] for n in derivative.operands}
        at = operands[name]
        rows = [vjp(lambda p, i=i, f=value: f(p, i), at)[1](v[i : i + 1])[0] for i in range(len(x))]
        assert_close(derivative.reference(**known), torch.stack(rows), RELATIVE)
        directions = torch.stack([random_like(at, seed) for seed in range(len(x))])
        forward = network.jvp(name, per_sample=True)
        known = (operands | {f"tangent_{name}": directions}).items()
        known = {n: y for n, y in known if n in forward.operands}
        rows = [
            jvp(lambda p, i=i, f=value: f(p, i), (at,), (directions[i],))[1] for i in range(len(x))
        ]
        assert_close(forward.reference(**known), torch.cat(rows), RELATIVE)


@given(network=networks(min_tensors=1, max_legs=4), data=st.data())
def test_kept_legs(network, data):
    """At each value of a kept leg: the derivative of the network where a pattern pins the leg."""
    operands = operands_for(network)
    operand = data.draw(st.sampled_from(sorted(operands)))
    leg = data.draw(st.sampled_from(sorted(network.sizes)))
    size = network.sizes[leg]
    pinned = [network.with_((*network.nodes, exactly({leg: 1}, at))) for at in range(size)]
    v = random_like(torch.empty(network.shape))
    t = random_like(torch.empty(size, *operands[operand].shape))
    kept = evaluate(network.vjp(operand, keep=(leg,)), operands, grad_output=v)
    assert kept.shape == t.shape
    given_ = {f"tangent_{operand}": t}
    forward = evaluate(network.jvp(operand, keep=(leg,)), operands, **given_)
    for at, part in enumerate(pinned):
        assert_close(kept[at], evaluate(part.vjp(operand), operands, grad_output=v))
        given_ = {f"tangent_{operand}": t[at]}
        forward = forward - evaluate(part.jvp(operand), operands, **given_)
    assert_close(forward, torch.zeros_like(forward), 1e-10)


def evaluate(network, operands, **more):
    """The reference value at those of the operands that the network has."""
    given_ = {name: x for name, x in (operands | more).items() if name in network.operands}
    return network.reference(**given_)


@given(network=networks(min_tensors=1, max_legs=4), count=st.integers(0, 3), data=st.data())
def test_extra_legs_stack(network, count, data):
    operands = operands_for(network)
    operand = data.draw(st.sampled_from(sorted(operands)))
    extra = {"v": count}
    v = random_like(torch.empty(count, *network.shape))
    t = random_like(torch.empty(count, *operands[operand].shape))
    pulled = evaluate(network.vjp(operand, extra=extra), operands, grad_output=v)
    pushed = evaluate(network.jvp(operand, extra=extra), operands, **{f"tangent_{operand}": t})
    assert pulled.shape == t.shape and pushed.shape == v.shape
    for at in range(count):
        assert_close(pulled[at], evaluate(network.vjp(operand), operands, grad_output=v[at]))
        single = evaluate(network.jvp(operand), operands, **{f"tangent_{operand}": t[at]})
        assert_close(pushed[at], single)


@given(case=geometries(max_dims=2))
def test_extra_cotangents_of_every_sample(case):
    """``extra`` and ``keep`` together: (several cotangents, samples, weight)."""
    network = ZOO["conv"](case)
    operands = operands_for(network)
    v = random_like(torch.empty(2, *network.shape))
    both = network.vjp("weight", extra={"v": 2}, per_sample=True)
    assert both.shape == (2, len(operands["x"]), *case.weight_shape)
    single = network.vjp("weight", per_sample=True)
    rows = [evaluate(single, operands, grad_output=row) for row in v]
    assert_close(evaluate(both, operands, grad_output=v), torch.stack(rows))


@given(network=networks(min_tensors=1), data=st.data())
def test_one_term_per_occurrence(network, data):
    operand = data.draw(st.sampled_from(sorted(network.operands)))
    count = [node.name for node in network.tensors].count(operand)
    for derivative in (network.vjp(operand), network.jvp(operand), network.jacobian(operand)):
        assert isinstance(derivative, Sum) and len(derivative.terms) == count
    total = network + network.scaled(3)
    assert len(total.vjp(operand).terms) == 2 * count
    operands = operands_for(network)
    v = random_like(torch.empty(network.shape))
    once = evaluate(network.vjp(operand), operands, grad_output=v)
    assert_close(evaluate(total.vjp(operand), operands, grad_output=v), 4 * once)


# Second derivatives


@given(network=networks(min_tensors=2, max_nodes=6, max_legs=4), data=st.data())
def test_second_derivatives(network, data):
    """Forward over reverse and reverse over reverse, also in an operand that occurs often."""
    operands = operands_for(network)
    names = st.sampled_from(sorted(operands))
    first, second = data.draw(names), data.draw(names)
    v, t = random_like(torch.empty(network.shape)), random_like(operands[second], 8)
    u = random_like(operands[first], 9)

    def gradient(y):
        at = operands | {second: y}

        def value(x):
            return network.reference(**at | {first: x})

        return vjp(value, at[first])[1](v)[0]

    once = network.vjp(first)
    if second not in once.operands:
        with pytest.raises(ValueError, match=f"no operand '{second}'"):
            once.jvp(second)
        return
    if first != second:
        y = operands[second]
        pushed = jvp(gradient, (y,), (t,))[1]
        pulled = vjp(gradient, y)[1](u)[0]
        given_ = {"grad_output": v, f"tangent_{second}": t, "other": u}
        assert_close(evaluate(once.jvp(second), operands, **given_), pushed, 1e-11)
        again = once.vjp(second, cotangent="other")
        assert_close(evaluate(again, operands, **given_), pulled, 1e-11)


@given(case=geometries(max_dims=2, groups=False))
def test_hessian_of_an_operand_used_twice(case):
    """KFAC is quadratic in x: its second derivative along t is twice its value at t."""
    network = ZOO["kfac_expand"](case)
    t = random_like(torch.empty(case.input_shape))
    curved = network.jvp("x").jvp("x", tangent="t").reference(tangent_x=t, t=t)
    assert_close(curved, 2 * network.reference(x=t), RELATIVE)


def test_jacobian_of_a_small_layer():
    case = Case((2, 4, 5), (2, 2, 3), padding=1, groups=2)
    network = ZOO["conv"](case)
    jacobian = network.jacobian("weight")
    assert jacobian.shape == (2, 2, 5, 2, 2, 3) and list(jacobian.operands) == ["x"]
