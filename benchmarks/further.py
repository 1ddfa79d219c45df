"""All other operations of `tnconv.functional`, and the obvious ways of torch to compute them.

A row has two functions of a case: ours and torch's, each to be called with the same operands.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jacrev, jvp, vmap

from benchmarks.per_sample import TooLargeError, unfolded_input
from benchmarks.per_sample import vmap as gradients
from tnconv import functional as T

if TYPE_CHECKING:
    from benchmarks.contestants import Case

MOST_ENTRIES = 2**26  # of a result or an operand; above, an operation is not run on a layer
MOST_FLOPS = 3 * 10**10  # of the patches' second moment
VECTORS = 2
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Pair:
    """The same by us and by torch, to be called."""

    ours: Call
    torch: Call


def random(*shape: int) -> Tensor:
    """Equal entries for equal shapes.

    Raises:
        TooLargeError: there would be more than the limit.
    """
    _limit(*shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _limit(*shape: int) -> None:
    if prod(shape) > MOST_ENTRIES:
        raise TooLargeError(f"{float(prod(shape)):.0e} entries")


def _apply(case: "Case", x: Tensor, weight: Tensor) -> Tensor:
    return case.native(x, weight, **case.settings)


def _backward(case: "Case", x: Tensor, weight: Tensor, v: Tensor, output: int) -> Tensor:
    h = case.layer
    result: Tensor = torch.ops.aten.convolution_backward(
        *(v, x, weight, None, h.stride, h.padding, h.dilation, False, [0] * h.dims, h.groups),
        [output == 0, output == 1, False],
    )[output]
    return result


def _steps(case: "Case") -> dict[str, Any]:
    """Torch's keywords of patches."""
    return {name: case.settings[name] for name in ("stride", "padding", "dilation")}


def conv_transpose(case: "Case") -> Pair:
    given = {name: case.settings[name] for name in ("stride", "padding", "groups", "dilation")}
    operands = case.grad_output, case.weight
    return Pair(
        partial(T.conv_transpose, *operands, **given),
        partial(F.conv_transpose2d, *operands, **given),
    )


def bias(case: "Case") -> Pair:
    operands = case.x, case.weight, random(case.layer.out_channels)
    return Pair(
        partial(T.conv, *operands, **case.settings),
        partial(case.native, *operands, **case.settings),
    )


def linear(case: "Case") -> Pair:
    x = case.x.flatten(2).transpose(1, 2).contiguous()
    operands = x, random(case.layer.out_channels, case.layer.in_channels)
    return Pair(partial(T.linear, *operands), partial(F.linear, *operands))


def unfold(case: "Case") -> Pair:
    given = {"kernel_size": case.layer.kernel_size, **_steps(case)}
    return Pair(partial(T.unfold, case.x, **given), partial(F.unfold, case.x, **given))


def fold(case: "Case") -> Pair:
    h = case.layer
    patches = random(len(case.x), h.in_channels * prod(h.kernel_size), prod(h.output_shape[1:]))
    given = {"output_size": h.input_shape[1:], "kernel_size": h.kernel_size, **_steps(case)}
    return Pair(partial(T.fold, patches, **given), partial(F.fold, patches, **given))


def avg_pool(case: "Case", inside: bool = False) -> Pair:
    h = case.layer
    given = {"kernel_size": h.kernel_size, "stride": h.stride, "padding": h.padding}
    given |= {"count_include_pad": not inside}
    return Pair(partial(T.avg_pool, case.x, **given), partial(F.avg_pool2d, case.x, **given))


def unfolded_kernel(case: "Case") -> Pair:
    h = case.layer
    size = prod(h.input_shape)
    _limit(size, prod(h.output_shape))
    unit = torch.eye(size).reshape(size, *h.input_shape)
    return Pair(
        partial(T.unfolded_kernel, h.input_shape, case.weight, **case.settings),
        lambda: _apply(case, unit, case.weight).flatten(1).T,
    )


def input_jvp(case: "Case") -> Pair:
    tangent = random(*case.x.shape)
    return Pair(
        partial(T.input_jvp, case.x.shape, case.weight, tangent, **case.settings),
        lambda: jvp(lambda x: _apply(case, x, case.weight), (case.x,), (tangent,))[1],
    )


def weight_jvp(case: "Case") -> Pair:
    tangent = random(*case.weight.shape)
    return Pair(
        partial(T.weight_jvp, case.x, case.weight.shape, tangent, **case.settings),
        lambda: jvp(lambda w: _apply(case, case.x, w), (case.weight,), (tangent,))[1],
    )


def per_sample_weight_jvp(case: "Case") -> Pair:
    tangents = random(len(case.x), *case.weight.shape)
    one = vmap(lambda x, weight: _apply(case, x[None], weight)[0])
    return Pair(
        partial(T.per_sample_weight_jvp, case.x, case.weight.shape, tangents, **case.settings),
        partial(one, case.x, tangents),
    )


def bias_jvp(case: "Case") -> Pair:
    tangent, shape = random(case.layer.out_channels), case.grad_output.shape
    return Pair(
        partial(T.bias_jvp, shape, tangent),
        lambda: tangent.reshape(-1, *[1] * case.layer.dims).expand(shape).contiguous(),
    )


def bias_vjp(case: "Case") -> Pair:
    v = case.grad_output
    return Pair(partial(T.bias_vjp, v.shape, v), lambda: v.sum((0, 2, 3)))


def per_sample_bias_grad(case: "Case") -> Pair:
    v = case.grad_output
    return Pair(partial(T.per_sample_bias_grad, v.shape, v), lambda: v.sum((2, 3)))


def several(operation: str, output: int) -> Callable[["Case"], Pair]:
    """One of the two VJPs for several cotangents, in torch by ``vmap``."""

    def pair(case: "Case") -> Pair:
        v = random(VECTORS, *case.grad_output.shape)
        both = (case.x.shape, case.weight) if output == 0 else (case.x, case.weight.shape)
        each = vmap(lambda v: _backward(case, case.x, case.weight, v, output))
        return Pair(partial(getattr(T, operation), *both, v, **case.settings), partial(each, v))

    return pair


def jacobian(operation: str, output: int) -> Callable[["Case"], Pair]:
    """The whole Jacobian, in torch by ``jacrev``: of one sample in the input, or in the weight."""

    def pair(case: "Case") -> Pair:
        x = case.x[:1]
        parameter = x[0] if output == 0 else case.weight
        y = case.grad_output[0] if output == 0 else case.grad_output[:1]
        _limit(y.numel(), parameter.numel())
        if output == 0:
            return Pair(
                partial(T.input_jacobian, x[0].shape, case.weight, **case.settings),
                lambda: jacrev(lambda one: _apply(case, one[None], case.weight)[0])(x[0]),
            )
        return Pair(
            partial(T.weight_jacobian, x, case.weight.shape, **case.settings),
            lambda: jacrev(lambda weight: _apply(case, x, weight))(case.weight),
        )

    return pair


def of_gradients(operation: str, value: Callable[[Tensor], Tensor]) -> Callable[["Case"], Pair]:
    """A function of per-sample gradients ``J[n, p]``, in torch by ``vmap(grad)``."""

    def pair(case: "Case") -> Pair:
        if operation == "ggn_block":
            _limit(case.weight.numel(), case.weight.numel())
        operands = case.x, case.weight.shape, case.grad_output
        own = partial(getattr(T, operation), *operands, **case.settings)
        shapes = {"ggn_diagonal": case.weight.shape, "ggn_block": 2 * case.weight.shape}
        shapes["per_sample_ggn_diagonal"] = (len(case.x), *case.weight.shape)
        shape = shapes.get(operation, (len(case.x),) * 2)
        return Pair(own, lambda: value(gradients(case).flatten(1)).reshape(shape))

    return pair


def ntk_block(case: "Case") -> Pair:
    half = len(case.x) // 2
    parts = [
        type(case)(case.layer, case.x[at], case.weight, case.grad_output[at])
        for at in (slice(half), slice(half, None))
    ]
    one, other = parts
    operands = one.x, case.weight.shape, one.grad_output, other.x, other.grad_output
    return Pair(
        partial(T.ntk_block, *operands, **case.settings),
        lambda: gradients(one).flatten(1) @ gradients(other).flatten(1).T,
    )


def ggn_vector_product(case: "Case") -> Pair:
    vector = random(*case.weight.shape)

    def expected() -> Tensor:
        j = gradients(case).flatten(1)
        return (j.T @ (j @ vector.flatten())).reshape(vector.shape)

    operands = case.x, case.weight.shape, case.grad_output, vector
    return Pair(partial(T.ggn_vector_product, *operands, **case.settings), expected)


def input_diagonal_vjp(case: "Case") -> Pair:
    diagonal = case.grad_output.abs()
    return Pair(
        partial(T.input_diagonal_vjp, case.x.shape, case.weight, diagonal, **case.settings),
        lambda: _backward(case, case.x, case.weight.square(), diagonal, 0),
    )


def weight_diagonal_vjp(case: "Case") -> Pair:
    diagonal = case.grad_output.abs()
    return Pair(
        partial(T.weight_diagonal_vjp, case.x, case.weight.shape, diagonal, **case.settings),
        lambda: _backward(case, case.x.square(), case.weight, diagonal, 1),
    )


def hessian(operation: str, output: int) -> Callable[["Case"], Pair]:
    """``Jᵀ B J`` of one sample, in torch by two VJPs of all rows and then of all columns."""

    def pair(case: "Case") -> Pair:
        x, y = case.x[:1], case.grad_output[0].shape
        parameter = x[0] if output == 0 else case.weight
        size = parameter.numel()
        _limit(size, size)
        b = random(*y, *y)

        def pulled(rows: Tensor) -> Tensor:
            each = vmap(lambda v: _backward(case, x, case.weight, v[None], output))
            return each(rows.reshape(-1, *y)).flatten(1)

        def expected() -> Tensor:
            half = pulled(b)  # (y, p)
            return pulled(half.T).T.reshape(2 * parameter.shape)

        both = (x[0].shape, case.weight) if output == 0 else (x[0], case.weight.shape)
        return Pair(partial(getattr(T, operation), *both, b, **case.settings), expected)

    return pair


def sampled_weight_vjp(case: "Case") -> Pair:
    """Half of the samples."""
    n = len(case.x)
    index = torch.arange(0, n, 2)

    def expected() -> Tensor:
        x, v = case.x[index], case.grad_output[index]
        return n / len(index) * _backward(case, x, case.weight, v, 1)

    operands = case.x, case.weight.shape, case.grad_output, {"n": index}
    return Pair(partial(T.sampled_weight_vjp, *operands, **case.settings), expected)


def sampled_input_vjp(case: "Case") -> Pair:
    """Half of the output channels.

    Raises:
        NotImplementedError: for groups, of whose channels torch takes no part.
    """
    if case.layer.groups > 1:
        raise NotImplementedError("half of the channels of each group")
    index = torch.arange(0, case.layer.out_channels, 2)
    factor = case.layer.out_channels / len(index)

    def expected() -> Tensor:
        w, v = case.weight[index], case.grad_output[:, index]
        return factor * _backward(case, case.x, w, v, 0)

    operands = case.x.shape, case.weight, case.grad_output, {"d": index}
    return Pair(partial(T.sampled_input_vjp, *operands, **case.settings), expected)


def mean_patches(case: "Case") -> Pair:
    own = partial(T.mean_patches, case.x, case.layer.kernel_size, **case.settings)
    return Pair(own, lambda: unfolded_input(case).mean(-1))


def factor(operation: str, reduce: bool, ones: bool = False) -> Callable[["Case"], Pair]:
    """A factor with the bias, or of the patches of the transposed layer on output gradients."""

    def pair(case: "Case") -> Pair:
        h = case.layer
        given = _steps(case) | {"groups": h.groups, "scale": "kfc"}
        given |= {"joint": True} if ones else {"transposed": True}
        x = case.x if ones else case.grad_output
        if not ones:
            _limit(*x.shape[:2], *h.kernel_size, *h.input_shape[1:])
            patch = h.out_channels // h.groups * prod(h.kernel_size)
            flops = 2 * h.groups * patch**2 * len(x) * prod(h.input_shape[1:])
            if not reduce and flops > MOST_FLOPS:
                raise TooLargeError(f"{float(flops):.0e} flop")

        def patches() -> Tensor:
            if ones:
                u = unfolded_input(case)
                return torch.cat([u, torch.ones_like(u[:, :, :1])], 2)
            from unfoldNd import unfold_transposeNd

            u = unfold_transposeNd(x, h.kernel_size, h.stride, h.padding, 0, h.dilation)
            grouped: Tensor = u.reshape(len(x), h.groups, -1, u.shape[-1])
            return grouped

        return Pair(
            partial(getattr(T, operation), x, h.kernel_size, **given),
            lambda: _second_moment(patches(), reduce, 1 / len(x)),
        )

    return pair


def grad_factor(operation: str, reduce: bool) -> Callable[["Case"], Pair]:
    """A factor of output gradients."""

    def pair(case: "Case") -> Pair:
        v, groups = case.grad_output, case.layer.groups

        def expected() -> Tensor:
            rows = v.reshape(len(v), groups, -1, prod(v.shape[2:]))
            return _second_moment(rows.sum(-1, keepdim=True) if reduce else rows, False)

        return Pair(partial(getattr(T, operation), v, groups), expected)

    return pair


def _second_moment(u: Tensor, reduce: bool, scale: float = 1) -> Tensor:
    """``scale · Σ_{n,o} U Uᵀ``, or of means over o, for each group."""
    u = u.mean(-1, keepdim=True) if reduce else u
    u = u.permute(1, 2, 0, 3).flatten(2)
    return u @ u.mT * scale


WAYS: Mapping[str, Callable[["Case"], Pair]] = {
    "conv, bias": bias,
    "conv_transpose": conv_transpose,
    "linear": linear,
    "unfold": unfold,
    "fold": fold,
    "avg_pool": avg_pool,
    "avg_pool, padding not counted": partial(avg_pool, inside=True),
    "unfolded_kernel": unfolded_kernel,
    "input_jvp": input_jvp,
    "weight_jvp": weight_jvp,
    "per_sample_weight_jvp": per_sample_weight_jvp,
    "weight_vjp, several": several("weight_vjp", 1),
    "input_vjp, several": several("input_vjp", 0),
    "bias_vjp": bias_vjp,
    "bias_jvp": bias_jvp,
    "per_sample_bias_grad": per_sample_bias_grad,
    "input_jacobian": jacobian("input_jacobian", 0),
    "weight_jacobian": jacobian("weight_jacobian", 1),
    "gradient_dots": of_gradients("gradient_dots", lambda j: j @ j.T),
    "ntk_block": ntk_block,
    "ggn_diagonal": of_gradients("ggn_diagonal", lambda j: j.square().sum(0)),
    "per_sample_ggn_diagonal": of_gradients("per_sample_ggn_diagonal", torch.square),
    "ggn_block": of_gradients("ggn_block", lambda j: j.T @ j),
    "ggn_vector_product": ggn_vector_product,
    "input_diagonal_vjp": input_diagonal_vjp,
    "weight_diagonal_vjp": weight_diagonal_vjp,
    "input_hessian_vjp": hessian("input_hessian_vjp", 0),
    "weight_hessian_vjp": hessian("weight_hessian_vjp", 1),
    "sampled_weight_vjp": sampled_weight_vjp,
    "sampled_input_vjp": sampled_input_vjp,
    "mean_patches": mean_patches,
    "kfac_expand, bias": factor("kfac_expand", False, ones=True),
    "kfac_reduce, bias": factor("kfac_reduce", True, ones=True),
    "kfac_expand, transposed": factor("kfac_expand", False),
    "kfac_reduce, transposed": factor("kfac_reduce", True),
    "grad_expand": grad_factor("grad_expand", False),
    "grad_reduce": grad_factor("grad_reduce", True),
}
"""By operation; the first word is the function's name."""
