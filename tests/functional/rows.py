"""Every operation of `tnconv.functional`, and what it must be in torch's own words.

A row names its operands and has two functions of a layer and these operands: ours and expected.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jacrev, jvp, vjp

from tests.strategies import Case, geometries, transposed
from tnconv import functional as T
from tnconv.diagrams import Hyperparameters, TensorNetwork
from tnconv.diagrams.layer_networks import layer

VECTORS = 2
Value = Callable[..., Tensor]


@dataclass(frozen=True)
class Layer:
    """A convolution, its transpose, or a linear layer at the positions of the case's input."""

    case: Case
    kind: str

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keywords of the functions of layers."""
        if self.linear:
            return {}
        if self.kind == "conv":
            return self.case.kwargs
        return transposed(self.case) | {"transposed": True}

    @property
    def linear(self) -> bool:
        return self.kind.startswith("linear")

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return () if self.linear else self.case.kernel_size

    @property
    def groups(self) -> int:
        return 1 if self.linear else self.case.groups

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all operands that a row can name; (n, x, ...) puts n before them."""
        batch, channels, *spatial = self.case.input_shape
        x, weight = (batch, channels, *spatial), self.case.weight_shape
        if self.kind == "conv_transpose":
            x = self.case.output_shape
        if self.linear:
            positions = spatial if self.kind == "linear_positions" else ()
            x, weight = (batch, *positions, channels), (weight[0], channels)
        y = tuple(self(torch.zeros(x), torch.zeros(weight)).shape)
        out = y[-1] if self.linear else y[1]
        many = {"x": x, "weight": weight, "y": y, "bias": (out,), "bias_n": (x[0], out)}
        if not self.linear:
            many["unfolded"] = tuple(self.patches(torch.zeros(x)).flatten(1, 2).shape)
        many |= {"other_x": (x[0] + 1, *x[1:]), "other_y": (x[0] + 1, *y[1:])}
        many |= {"x1": x[1:], "hessian": (*y[1:], *y[1:]), "weight_n": (x[0], *weight)}
        return many | {f"{name}_m": (VECTORS, *shape) for name, shape in many.items()}

    def operand(self, name: str, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.shapes[name], generator=generator, dtype=torch.float64)

    @property
    def diagram(self) -> TensorNetwork:
        """Whose legs have names."""
        names = ("stride", "padding", "dilation", "groups", "transposed", "output_padding")
        settings = {name: self.kwargs[name] for name in names if name in self.kwargs}
        return layer(self.shapes["x"], self.shapes["weight"], Hyperparameters(**settings))

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """What torch computes, with a batch."""
        if self.linear:
            return F.linear(x, weight, bias)
        layer = self.case.conv if self.kind == "conv" else self.case.conv_transpose
        y = layer(x, weight)
        return y if bias is None else y + bias.reshape(-1, *[1] * self.case.dims)

    def patches(self, x: Tensor) -> Tensor:
        """``U[n, g, ck, o]``."""
        if self.linear:
            return x.reshape(len(x), prod(x.shape[1:-1]), x.shape[-1]).mT[:, None]
        if self.kind == "conv":
            return self.case.patches(x).flatten(2, 2 + self.case.dims).flatten(3)
        return self.case.transposed_patches(x)

    def pulled(self, x: Tensor, weight: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Both gradients."""
        dx, dw = vjp(self, x, weight)[1](v)
        return dx, dw

    def gradients(self, x: Tensor, v: Tensor) -> Tensor:
        """``J[m, n, *weight]`` (or without m) by one backward pass for each row."""
        weight = torch.zeros(self.shapes["weight"], dtype=x.dtype)
        if v.dim() > x.dim():
            return torch.stack([self.gradients(x, each) for each in v])
        rows = [self.pulled(x[n : n + 1], weight, v[n : n + 1])[1] for n in range(len(x))]
        return torch.stack(rows) if rows else torch.zeros(self.shapes["weight_n"], dtype=x.dtype)

    def weights(self, like: Tensor) -> Tensor:
        return torch.zeros(self.shapes["weight"], dtype=like.dtype)

    def inputs(self, like: Tensor) -> Tensor:
        return torch.zeros(self.shapes["x"], dtype=like.dtype)


@dataclass(frozen=True)
class Row:
    """``ours(layer)(*operands)`` and what is expected, for operands named as in `Layer.shapes`."""

    operands: str
    ours: Callable[[Layer], Value]
    expected: Value
    kinds: Sequence[str] = ("conv", "conv_transpose", "linear", "linear_positions")
    dense: bool = False

    def __call__(self, layer: Layer) -> tuple[Value, Value, tuple[Tensor, ...]]:
        """Both functions of the operands, and operands."""
        given = tuple(layer.operand(name, seed) for seed, name in enumerate(self.operands.split()))
        return (
            self.ours(layer),
            lambda *operands: self.expected(layer, *operands),
            given,
        )


def layers(row: Row, max_dims: int = 3) -> st.SearchStrategy[Layer]:
    return st.builds(Layer, geometries(max_dims), st.sampled_from(row.kinds))


def each(value: Value) -> Value:
    """The value for each of several last operands, stacked."""
    return lambda layer, *given: torch.stack([value(layer, *given[:-1], v) for v in given[-1]])


def factor(reduce: bool, ones: bool = False, average: bool = False) -> Value:
    def value(layer: Layer, x: Tensor) -> Tensor:
        u = layer.patches(x)
        u = torch.cat([u, torch.ones_like(u[:, :, :1])], 2) if ones else u
        u = u.mean(-1, keepdim=True) if reduce else u
        a = torch.einsum("ngao,ngbo->gab", u, u) / max(1, len(u) * u.shape[-1])
        return a.mean(0, keepdim=True) if average else a

    return value


def grad_factor(reduce: bool) -> Value:
    def value(layer: Layer, v: Tensor) -> Tensor:
        v = v.unflatten(1, (layer.case.groups, -1)).flatten(3)
        v = v.sum(-1, keepdim=True) if reduce else v
        return torch.einsum("ngdo,ngeo->gde", v, v)

    return value


def of_gradients(value: Value) -> Value:
    """A function of ``J[m, n, p]``, where there is one cotangent with m = 1."""

    def function(layer: Layer, x: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        j = layer.gradients(x, v)
        j = j if v.dim() > x.dim() else j[None]
        return value(layer.shapes["weight"], j.flatten(2), *rest)

    return function


def dots(_: object, j: Tensor) -> Tensor:
    return torch.einsum("mnp,kqp->mnkq", j, j)


def ntk_block(layer: Layer, x: Tensor, v: Tensor, other_x: Tensor, other_v: Tensor) -> Tensor:
    dims = len(layer.shapes["weight"])
    first, other = layer.gradients(x, v), layer.gradients(other_x, other_v)
    return torch.tensordot(first.flatten(-dims), other.flatten(-dims), ([-1], [-1]))


def norms(_: object, j: Tensor) -> Tensor:
    return j.square().sum(-1)


def diagonal(shape: Sequence[int], j: Tensor) -> Tensor:
    return j.square().sum((0, 1)).reshape(shape)


def diagonals(shape: Sequence[int], j: Tensor) -> Tensor:
    return j.square().sum(0).reshape(-1, *shape)


def block(shape: Sequence[int], j: Tensor) -> Tensor:
    return torch.einsum("mnp,mnq->pq", j, j).reshape(*shape, *shape)


def product(shape: Sequence[int], j: Tensor, vector: Tensor) -> Tensor:
    return torch.einsum("mnp,mnq,q->p", j, j, vector.flatten()).reshape(shape)


def hessian(at: int) -> Value:
    """``Jᵀ B J`` of one sample in input (0) or weight (1)."""

    def value(layer: Layer, given: Tensor, b: Tensor) -> Tensor:
        both = [torch.zeros(layer.shapes[n], dtype=b.dtype) for n in ("x1", "weight")]
        both[1 - at] = given
        j = jacrev(lambda x, w: layer(x[None], w)[0], argnums=at)(*both)
        j = j.reshape(-1, both[at].numel())
        return (j.T @ b.reshape(len(j), len(j)) @ j).reshape(2 * both[at].shape)

    return value


def jacobian(at: int) -> Value:
    def value(layer: Layer, given: Tensor) -> Tensor:
        both = [layer.inputs(given), layer.weights(given)]
        both[1 - at] = given
        return jacrev(layer, argnums=at)(*both)

    return value


def squared_vjp(at: int) -> Value:
    """``Σ_y h[y] (∂y / ∂θ)²`` from the whole Jacobian."""

    def value(layer: Layer, given: Tensor, h: Tensor) -> Tensor:
        j = jacobian(at)(layer, given)
        return torch.tensordot(h, j.square(), h.dim())

    return value


def bias_jvp(layer: Layer, tangent: Tensor) -> Tensor:
    return tangent.reshape(-1, *[1] * layer.case.dims).expand(layer.shapes["y"])


def in_torch(layer: Layer, *given: Tensor) -> Tensor:
    return layer(*given)


def input_vjp(layer: Layer, weight: Tensor, v: Tensor) -> Tensor:
    return layer.pulled(layer.inputs(v), weight, v)[0]


def weight_vjp(layer: Layer, x: Tensor, v: Tensor) -> Tensor:
    return layer.pulled(x, layer.weights(v), v)[1]


def mixed(layer: Layer, tangent_weight: Tensor, v: Tensor) -> Tensor:
    """``∂²(v·y) / ∂x ∂w`` times a tangent of the weight, forward over reverse."""
    x, weight = layer.inputs(v), layer.weights(v)
    return jvp(lambda w: layer.pulled(x, w, v)[0], (weight,), (tangent_weight,))[1]


def mixed_weight(layer: Layer, tangent_x: Tensor, v: Tensor) -> Tensor:
    """``∂²(v·y) / ∂w ∂x`` times a tangent of the input, forward over reverse."""
    x, weight = layer.inputs(v), layer.weights(v)
    return jvp(lambda y: layer.pulled(y, weight, v)[1], (x,), (tangent_x,))[1]


def per_sample_weight_jvp(layer: Layer, x: Tensor, tangents: Tensor) -> Tensor:
    rows = [layer(x[n : n + 1], tangent) for n, tangent in enumerate(tangents)]
    return torch.cat(rows) if rows else torch.zeros(layer.shapes["y"], dtype=x.dtype)


def bias_vjp(layer: Layer, v: Tensor) -> Tensor:
    return v.transpose(0, 1).flatten(1).sum(1)


def per_sample_bias_grad(layer: Layer, v: Tensor) -> Tensor:
    return v.flatten(2).sum(2)


def unfolded(layer: Layer, x: Tensor) -> Tensor:
    return layer.patches(x).flatten(1, 2)


def fold(layer: Layer, u: Tensor) -> Tensor:
    return vjp(lambda x: unfolded(layer, x), layer.inputs(u))[1](u)[0]


def avg_pool(layer: Layer, x: Tensor) -> Tensor:
    native = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[layer.case.dims - 1]
    return native(layer.case.padded(x), layer.kernel_size, layer.case.stride)


def our_avg_pool(layer: Layer) -> Value:
    return partial(T.avg_pool, **window(layer))


def window(layer: Layer) -> dict[str, Any]:
    case = layer.case
    return {"kernel_size": case.kernel_size, "stride": case.stride, "padding": case.pads}


def own_avg_pool(layer: Layer, x: Tensor) -> Tensor:
    """Each window's own entries only: sums of entries over sums of ones."""
    entries = avg_pool(layer, torch.ones_like(x))
    return torch.where(entries > 0, avg_pool(layer, x) / entries, 0.0)


def our_own_avg_pool(layer: Layer) -> Value:
    return partial(T.avg_pool, **window(layer), count_include_pad=False)


def unfolded_kernel(layer: Layer, weight: Tensor) -> Tensor:
    x = torch.zeros(layer.shapes["x1"], dtype=weight.dtype)
    j = jacrev(lambda x: layer(x[None], weight)[0])(x)
    return j.reshape(-1, x.numel())


def listed(layer: Layer, legs: str) -> dict[str, Tensor]:
    """Positions of legs of a layer, about half as many as there are."""
    generator = torch.Generator().manual_seed(5)
    sizes = layer.diagram.sizes
    draws = {leg: (max(1, sizes[leg] // 2),) for leg in legs.split() if sizes.get(leg)}
    return {leg: torch.randint(sizes[leg], n, generator=generator) for leg, n in draws.items()}


def our_sampled(name: str, legs: str, **options: object) -> Callable[[Layer], Value]:
    def of(layer: Layer) -> Value:
        index = listed(layer, legs)

        def function(*operands: Tensor) -> Tensor:
            moved = {leg: positions.to(operands[0].device) for leg, positions in index.items()}
            return ours(name, index=moved, **options)(layer)(*operands)

        return function

    return of


def sampled(at: int, legs: str, scale: float | None = None) -> Value:
    """Torch's product with the listed positions of each leg counted where torch has that leg."""

    def value(layer: Layer, given: Tensor, v: Tensor) -> Tensor:
        both = [layer.inputs(v), layer.weights(v)]
        both[1 - at] = given
        index = listed(layer, legs)
        net, factor = layer.diagram, 1.0
        counted = {"x": both[0], "weight": both[1], "y": v}
        after = []  # legs of the result
        for leg, positions in index.items():
            size = net.sizes[leg]
            counts = torch.bincount(positions, minlength=size).to(v.dtype)
            factor *= size / len(positions) if scale is None else 1.0
            views = {n.name: n.view for n in net.tensors} | {"y": net.result}
            holder = next(name for name in ("y", "x", "weight") if leg in views[name].legs)
            sizes = [axis.size for axis in views[holder].axes]
            place = [axis.plain(net.sizes) for axis in views[holder].axes].index(leg)
            mask = counts.reshape([-1 if p == place else 1 for p in range(len(sizes))])
            mask = mask.expand(sizes).reshape(views[holder].shape)
            if holder == ("x", "weight")[at]:
                after.append(mask)
            else:
                counted[holder] = counted[holder] * mask
        pulled = layer.pulled(counted["x"], counted["weight"], counted["y"])[at]
        for mask in after:
            pulled = pulled * mask
        return (factor if scale is None else scale) * pulled

    return value


SHAPES = {"input_shape": "x", "weight_shape": "weight", "output_shape": "y"}


def ours(name: str, input_shape: str = "x", **options: object) -> Callable[[Layer], Value]:
    """The function with the layer's shapes and settings; operands are its other arguments."""
    arguments = list(inspect.signature(getattr(T, name)).parameters)
    names = SHAPES | {"input_shape": input_shape}

    def of(layer: Layer) -> Value:
        settings = layer.kwargs | {"kernel_size": layer.kernel_size} | options
        settings |= {"output_size": layer.case.input_shape[2:]}
        settings |= {at: layer.shapes[shape] for at, shape in names.items()}
        settings = {at: setting for at, setting in settings.items() if at in arguments}
        free = [at for at in arguments if at not in settings]
        function: Value = getattr(T, name)
        return lambda *operands: function(**dict(zip(free, operands)), **settings)  # noqa: B905

    return of


CONV, TRANSPOSE, LINEAR = ("conv",), ("conv_transpose",), ("linear", "linear_positions")
SPATIAL = (*CONV, *TRANSPOSE)
ONE_SAMPLE = (*SPATIAL, "linear")

ROWS: dict[str, Row] = {
    "conv": Row("x weight", ours("conv"), in_torch, CONV),
    "conv bias": Row("x weight bias", ours("conv"), in_torch, CONV),
    "conv_transpose": Row("x weight", ours("conv_transpose"), in_torch, TRANSPOSE),
    "conv_transpose bias": Row("x weight bias", ours("conv_transpose"), in_torch, TRANSPOSE),
    "linear": Row("x weight", ours("linear"), in_torch, LINEAR),
    "linear bias": Row("x weight bias", ours("linear"), in_torch, LINEAR),
    "unfold": Row("x", ours("unfold"), unfolded, SPATIAL),
    "fold": Row("unfolded", ours("fold"), fold, CONV),
    "avg_pool": Row("x", our_avg_pool, avg_pool, CONV),
    "avg_pool without padding": Row("x", our_own_avg_pool, own_avg_pool, CONV),
    "unfolded_kernel": Row("weight", ours("unfolded_kernel", "x1"), unfolded_kernel, CONV, True),
    "weight_vjp": Row("x y", ours("weight_vjp"), weight_vjp),
    "weight_vjp several": Row("x y_m", ours("weight_vjp"), each(weight_vjp)),
    "weight_vjp mixed": Row("x y", ours("weight_vjp"), mixed_weight),
    "per_sample_weight_grad": Row("x y", ours("per_sample_weight_grad"), Layer.gradients),
    "per_sample_weight_grad several": Row("x y_m", ours("per_sample_weight_grad"), Layer.gradients),
    "input_vjp": Row("weight y", ours("input_vjp"), input_vjp),
    "input_vjp several": Row("weight y_m", ours("input_vjp"), each(input_vjp)),
    "input_vjp mixed": Row("weight y", ours("input_vjp"), mixed),
    "sampled_weight_vjp": Row("x y", our_sampled("sampled_weight_vjp", "n c"), sampled(1, "n c")),
    "sampled_weight_vjp positions": Row(
        "x y", our_sampled("sampled_weight_vjp", "i1 o1 d"), sampled(1, "i1 o1 d")
    ),
    "sampled_weight_vjp several": Row(
        "x y_m",
        our_sampled("sampled_weight_vjp", "g o1 k1", scale=0.3),
        each(sampled(1, "g o1 k1", 0.3)),
    ),
    "sampled_input_vjp": Row(
        "weight y", our_sampled("sampled_input_vjp", "d o1"), sampled(0, "d o1")
    ),
    "sampled_input_vjp several": Row(
        "weight y_m",
        our_sampled("sampled_input_vjp", "n i1 c", scale=Fraction(1, 3)),
        each(sampled(0, "n i1 c", 1 / 3)),
    ),
    "bias_vjp": Row("y", ours("bias_vjp"), bias_vjp, SPATIAL),
    "bias_vjp several": Row("y_m", ours("bias_vjp"), each(bias_vjp), SPATIAL),
    "per_sample_bias_grad": Row("y", ours("per_sample_bias_grad"), per_sample_bias_grad, SPATIAL),
    "per_sample_bias_grad several": Row(
        "y_m", ours("per_sample_bias_grad"), each(per_sample_bias_grad), SPATIAL
    ),
    "input_jvp": Row("weight x", ours("input_jvp"), lambda layer, w, x: layer(x, w)),
    "input_jvp several": Row(
        "weight x_m", ours("input_jvp"), each(lambda layer, w, x: layer(x, w))
    ),
    "weight_jvp": Row("x weight", ours("weight_jvp"), in_torch),
    "weight_jvp several": Row("x weight_m", ours("weight_jvp"), each(in_torch)),
    "per_sample_weight_jvp": Row(
        "x weight_n", ours("per_sample_weight_jvp"), per_sample_weight_jvp
    ),
    "per_sample_weight_jvp several": Row(
        "x weight_n_m", ours("per_sample_weight_jvp"), each(per_sample_weight_jvp)
    ),
    "bias_jvp": Row("bias", ours("bias_jvp"), bias_jvp, SPATIAL),
    "bias_jvp several": Row("bias_m", ours("bias_jvp"), each(bias_jvp), SPATIAL),
    "input_jacobian": Row("weight", ours("input_jacobian"), jacobian(0), dense=True),
    "weight_jacobian": Row("x", ours("weight_jacobian"), jacobian(1), dense=True),
    "kfac_expand": Row("x", ours("kfac_expand"), factor(reduce=False)),
    "kfac_reduce": Row("x", ours("kfac_reduce"), factor(reduce=True)),
    "kfac_expand joint": Row("x", ours("kfac_expand", joint=True), factor(False, ones=True)),
    "kfac_reduce joint": Row("x", ours("kfac_reduce", joint=True), factor(True, ones=True)),
    "kfac_expand average": Row(
        "x", ours("kfac_expand", per_group=False), factor(False, average=True)
    ),
    "kfac_reduce joint average": Row(
        "x",
        ours("kfac_reduce", joint=True, per_group=False),
        factor(True, ones=True, average=True),
    ),
    "kfac_expand scale": Row(
        "x",
        ours("kfac_expand", scale=0.3),
        lambda layer, x: (
            0.3 * max(1, len(x)) * layer.patches(x).shape[-1] * factor(False)(layer, x)
        ),
    ),
    "kfac_expand kfc": Row(
        "x",
        ours("kfac_expand", scale="kfc", joint=True),
        lambda layer, x: layer.patches(x).shape[-1] * factor(False, ones=True)(layer, x),
    ),
    "kfac_reduce kfc": Row("x", ours("kfac_reduce", scale="kfc"), factor(reduce=True)),
    "grad_expand kfc": Row(
        "y",
        ours("grad_expand", scale="kfc"),
        lambda layer, y: grad_factor(False)(layer, y) / prod(y.shape[2:]),
        SPATIAL,
    ),
    "kfac_reduce joint scale": Row(
        "x",
        ours("kfac_reduce", joint=True, scale=Fraction(1, 3)),
        lambda layer, x: (
            max(1, len(x)) * layer.patches(x).shape[-1] ** 2 / 3 * factor(True, ones=True)(layer, x)
        ),
    ),
    "grad_expand": Row("y", ours("grad_expand"), grad_factor(reduce=False), SPATIAL),
    "grad_reduce": Row("y", ours("grad_reduce"), grad_factor(reduce=True), SPATIAL),
    "grad_expand average scale": Row(
        "y",
        ours("grad_expand", per_group=False, scale=0.7),
        lambda layer, y: 0.7 * grad_factor(False)(layer, y).mean(0, keepdim=True),
        SPATIAL,
    ),
    "mean_patches": Row("x", ours("mean_patches"), lambda layer, x: layer.patches(x).mean(-1)),
    "gradient_dots": Row(
        "x y", ours("gradient_dots"), of_gradients(lambda _, j: dots(_, j)[0, :, 0])
    ),
    "gradient_dots several": Row("x y_m", ours("gradient_dots"), of_gradients(dots)),
    "ntk_block": Row("x y other_x other_y", ours("ntk_block"), ntk_block),
    "ntk_block several": Row("x y_m other_x other_y", ours("ntk_block"), ntk_block),
    "ntk_block several both": Row("x y_m other_x other_y_m", ours("ntk_block"), ntk_block),
    "gradient_norms": Row("x y", ours("gradient_norms"), of_gradients(lambda _, j: norms(_, j)[0])),
    "gradient_norms several": Row("x y_m", ours("gradient_norms"), of_gradients(norms)),
    "ggn_diagonal": Row("x y", ours("ggn_diagonal"), of_gradients(diagonal)),
    "ggn_diagonal several": Row("x y_m", ours("ggn_diagonal"), of_gradients(diagonal)),
    "per_sample_ggn_diagonal": Row("x y", ours("per_sample_ggn_diagonal"), of_gradients(diagonals)),
    "per_sample_ggn_diagonal several": Row(
        "x y_m", ours("per_sample_ggn_diagonal"), of_gradients(diagonals)
    ),
    "ggn_block": Row("x y", ours("ggn_block"), of_gradients(block)),
    "ggn_block several": Row("x y_m", ours("ggn_block"), of_gradients(block)),
    "ggn_vector_product": Row("x y weight", ours("ggn_vector_product"), of_gradients(product)),
    "ggn_vector_product several": Row(
        "x y_m weight", ours("ggn_vector_product"), of_gradients(product)
    ),
    "input_diagonal_vjp": Row("weight y", ours("input_diagonal_vjp"), squared_vjp(0), dense=True),
    "weight_diagonal_vjp": Row("x y", ours("weight_diagonal_vjp"), squared_vjp(1), dense=True),
    "input_hessian_vjp": Row(
        "weight hessian", ours("input_hessian_vjp", "x1"), hessian(0), ONE_SAMPLE, True
    ),
    "weight_hessian_vjp": Row(
        "x1 hessian", ours("weight_hessian_vjp"), hessian(1), ONE_SAMPLE, True
    ),
}
"""All operations; the first word of a key is the function's name."""
