"""Random convolutions, random networks, and what their values must be, from the definitions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from math import prod
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor as Array

from tnconv import diagrams
from tnconv.diagrams import (
    Axis,
    Pattern,
    Selection,
    Sum,
    Tensor,
    TensorNetwork,
    View,
    delta,
    exactly,
    index_pattern,
)


@dataclass(frozen=True)
class Case:
    """One legal convolution, in torch's words; ``padding`` in every form that `conv` takes."""

    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: Any = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keywords of `conv`, and, with ``kernel_size``, of the Kronecker factors."""
        return self.unfold_kwargs | {"groups": self.groups}

    @property
    def unfold_kwargs(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self.weight_shape[2:]

    @property
    def dims(self) -> int:
        return len(self.kernel_size)

    @property
    def batched(self) -> bool:
        return len(self.input_shape) == self.dims + 2

    @property
    def strides(self) -> tuple[int, ...]:
        return (self.stride,) * self.dims if isinstance(self.stride, int) else self.stride

    @property
    def dilations(self) -> tuple[int, ...]:
        return (self.dilation,) * self.dims if isinstance(self.dilation, int) else self.dilation

    @property
    def pads(self) -> tuple[tuple[int, int], ...]:
        """Left and right padding per dimension."""
        if self.padding == "same":
            totals = [d * (k - 1) for k, d in zip(self.kernel_size, self.dilations, strict=True)]
            return tuple((t // 2, t - t // 2) for t in totals)
        given = 0 if self.padding == "valid" else self.padding
        each = (given,) * self.dims if isinstance(given, int) else given
        return tuple((p, p) if isinstance(p, int) else p for p in each)

    def padded(self, x: Array) -> Array:
        return F.pad(x, [side for pair in reversed(self.pads) for side in pair])

    def conv(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        """What torch computes, for up to three dimensions."""
        native = (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]
        return native(self.padded(x), weight, bias, self.stride, 0, self.dilation, self.groups)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of what `conv` gives: what its transpose takes."""
        return (*self.input_shape[: -self.dims - 1], self.weight_shape[0], *self._spatial[0])

    @property
    def output_padding(self) -> tuple[int, ...]:
        """How many inputs `conv` leaves over to the right, which its transpose gives back."""
        return self._spatial[1]

    @property
    def _spatial(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        sizes = zip(
            self.input_shape[-self.dims :],
            self.pads,
            self.kernel_size,
            self.strides,
            self.dilations,
            strict=True,
        )
        both = [divmod(i + sum(pad) - d * (k - 1) - 1, s) for i, pad, k, s, d in sizes]
        return tuple(steps + 1 for steps, _ in both), tuple(rest for _, rest in both)

    def conv_transpose(self, x: Array, weight: Array, groups: int | None = None) -> Array:
        """What torch computes for the transpose of this convolution, up to three dimensions."""
        native = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.dims - 1]
        rest, groups = self.output_padding, groups or self.groups
        full = native(x, weight, None, self.stride, 0, rest, groups, self.dilation)
        inside = [
            slice(left, left + i)
            for (left, _), i in zip(self.pads, self.input_shape[-self.dims :], strict=True)
        ]
        return full[(..., *inside)]

    def transposed_patches(self, x: Array) -> Array:
        """``U[n, g, ck, o]`` of the transpose: one channel and one tap at a time."""
        x = x if self.batched else x[None]
        taps = prod(self.kernel_size)
        unit = torch.eye(taps, dtype=x.dtype).reshape(1, taps, *self.kernel_size)
        y = self.conv_transpose(x, unit.expand(x.shape[1], -1, *self.kernel_size), x.shape[1])
        return y.flatten(2).unflatten(1, (self.groups, y.shape[1] // self.groups))

    def patches(self, x: Array) -> Array:
        """``U[n, g, c, *k, *o]`` by one slice per tap, for any number of dimensions."""
        x = self.padded(x if self.batched else x[None])
        x = x.unflatten(1, (self.groups, x.shape[1] // self.groups))
        outs = [
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip(
                x.shape[3:], self.kernel_size, self.strides, self.dilations, strict=True
            )
        ]
        taps = [
            x[
                (
                    ...,
                    *(
                        slice(d * at, d * at + s * (out - 1) + 1, s)
                        for at, out, s, d in zip(
                            tap, outs, self.strides, self.dilations, strict=True
                        )
                    ),
                )
            ]
            for tap in product(*map(range, self.kernel_size))
        ]
        stacked = torch.stack(taps, 3)
        return stacked.reshape(*x.shape[:3], *self.kernel_size, *outs)


def _rarely(draw: Any) -> bool:
    return draw(st.sampled_from((False,) * 24 + (True,)))


@st.composite
def geometries(
    draw: Any,
    max_dims: int = 3,
    groups: bool = True,
    unbatched: bool = False,
    empty: bool = True,
    min_dims: int = 1,
) -> Case:
    """A legal convolution: the kernel is cut to what the padded input can hold."""
    dims = draw(st.integers(min_dims, max_dims))
    small = st.integers(1, 7 if dims < 3 else 4)

    def each(values: st.SearchStrategy[Any]) -> Any:
        """One value for all dimensions, or one for each."""
        return draw(values) if draw(st.booleans()) else draw(st.tuples(*[values] * dims))

    kind = draw(st.sampled_from(("ints", "ints", "pairs", "same", "valid")))
    pad = st.integers(0, 3 if dims < 3 else 2)
    padding: Any = kind
    if kind == "ints":
        padding = each(pad)
    elif kind == "pairs":
        padding = draw(st.tuples(*[st.tuples(pad, pad)] * dims))
    stride = 1 if kind == "same" else each(st.integers(1, 4))
    dilation = each(st.integers(1, 3))
    spatial = draw(st.tuples(*[small] * dims))
    kernel = draw(st.tuples(*[st.integers(1, 4 if dims < 3 else 3)] * dims))
    probe = Case((), (1, 1, *kernel), stride, padding, dilation)
    if kind != "same":
        kernel = tuple(
            min(k, (size + sum(pair) - 1) // d + 1)
            for k, size, pair, d in zip(kernel, spatial, probe.pads, probe.dilations, strict=True)
        )
    g = draw(st.integers(1, 3)) if groups else 1
    c, d = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    batch = (0,) if empty and _rarely(draw) else (draw(st.integers(1, 3)),)
    if unbatched and draw(st.sampled_from((False, False, False, True))):
        batch = ()
    return Case((*batch, g * c, *spatial), (g * d, c, *kernel), stride, padding, dilation, g)


COEFFICIENTS = st.sampled_from((1, 1, -1, -1, 2, -2, 3, -3))
SCALES = (Fraction(1), Fraction(1), Fraction(-2, 3), Fraction(5), Fraction(1, 7))


@st.composite
def _value_ranges(draw: Any) -> range:
    start = draw(st.integers(-4, 6))
    match draw(st.sampled_from(("single", "single", "run", "run", "steps", "down", "empty"))):
        case "single":
            return range(start, start + 1)
        case "run":
            return range(start, start + draw(st.integers(2, 6)))
        case "steps":
            return range(start, start + draw(st.integers(2, 9)), draw(st.integers(2, 4)))
        case "down":
            return range(start, start - draw(st.integers(1, 6)), -draw(st.integers(1, 3)))
    return range(start, start - draw(st.integers(0, 2)))


@st.composite
def _patterns(draw: Any, legs: list[str], sizes: Mapping[str, int]) -> Pattern:
    """A convolution's pattern, a delta, one exact value, or anything."""
    some = draw(st.permutations(legs))
    kind = draw(st.sampled_from(("index", "index", "delta", "exact", "any", "any")))
    if kind == "index" and len(legs) >= 3:
        return index_pattern(
            *some[:3], draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 3))
        )
    if kind == "delta" and len(legs) >= 2:
        return delta(*some[:2])
    held = some[: draw(st.integers(0, 4))]
    terms = [(leg, draw(COEFFICIENTS)) for leg in held]
    if kind == "exact":  # a value that the form takes somewhere
        return exactly(
            terms, sum(a * draw(st.integers(0, max(0, sizes[leg] - 1))) for leg, a in terms)
        )
    return Pattern(tuple(terms), draw(_value_ranges()))


@st.composite
def _axes(draw: Any, legs: list[str], sizes: Mapping[str, int], size: int | None = None) -> Axis:
    """A plain axis two times out of three, else any affine one, also wholly out of range."""
    pick = st.sampled_from(legs)
    if size is None and draw(st.sampled_from((True, True, False))):
        leg = draw(pick)
        return Axis(sizes[leg], 0, ((leg, 1),))
    if size is None:
        size = draw(st.integers(1, 6))
    if (fits := [leg for leg in legs if sizes[leg] == size]) and draw(st.booleans()):
        return Axis(size, 0, ((draw(st.sampled_from(fits)), 1),))
    held = draw(st.lists(pick, max_size=2, unique=True))
    terms = tuple(sorted((leg, draw(COEFFICIENTS)) for leg in held))
    return Axis(size, draw(st.integers(-3, 4)), terms)


@st.composite
def _shapes(draw: Any, axes: list[Axis]) -> tuple[int, ...]:
    """Array dimensions for these axes: one each, or some neighbours merged."""
    shape: list[int] = []
    for axis in axes:
        if shape and draw(st.sampled_from((False, False, True))):
            shape[-1] *= axis.size
        else:
            shape.append(axis.size)
    return tuple(shape)


@st.composite
def networks(
    draw: Any,
    max_nodes: int = 4,
    max_legs: int = 6,
    max_points: int = 3000,
    plain_result: bool = False,
    min_tensors: int = 0,
    selections: bool = False,
) -> TensorNetwork:
    """Any network that a user may write; ``max_points`` bounds the product of all leg sizes.

    With ``plain_result`` the result's axes are legs, each once. Operands are named x, weight, v,
    and, with ``selections``, index where it lists positions.
    """
    legs = list("abcdef"[: draw(st.integers(1, max_legs))])
    sizes: dict[str, int] = {}
    for leg in legs:
        room = max(1, max_points // prod(sizes.values()))
        sizes[leg] = min(room, draw(st.sampled_from((2, 3, 4, 1, 2, 3, 5))))
    if _rarely(draw):
        sizes[draw(st.sampled_from(legs))] = 0
    nodes: list[Tensor | Pattern] = []
    known: dict[str, tuple[tuple[int, ...], list[Axis]]] = {}
    counts = (0, 1, 2, 2, 3, 3, 3, 4, 4, 4, *range(5, max_nodes + 1))
    count = draw(st.sampled_from([n for n in counts if min_tensors <= n <= max_nodes]))
    for at in range(count):
        kinds = ("tensor", "tensor", "again", "pattern", "pattern", "pattern", "copy")
        kinds += ("selection", "selection") if selections else ()
        kind = "tensor" if at < min_tensors else draw(st.sampled_from(kinds))
        if kind == "copy" and nodes:
            nodes.append(draw(st.sampled_from(nodes)))
        elif kind == "pattern":
            nodes.append(draw(_patterns(legs, sizes)))
        elif kind == "selection":
            rows, axis = draw(_axes(legs, sizes)), draw(_axes(legs, sizes))
            shapes = {node.shape for node in nodes if isinstance(node, Selection)}
            if axis.size and shapes <= {(rows.size,)}:
                nodes.append(Selection("index", View((rows.size, axis.size), (rows, axis))))
        elif kind == "again" and known:  # the same operand, read through other axes
            name = draw(st.sampled_from(sorted(known)))
            shape, axes = known[name]
            other = tuple(draw(_axes(legs, sizes, axis.size)) for axis in axes)
            nodes.append(Tensor(name, View(shape, other)))
        elif len(known) < 3:
            name = ("x", "weight", "v")[len(known)]
            axes = draw(st.lists(_axes(legs, sizes), max_size=3))
            known[name] = draw(_shapes(axes)), axes
            nodes.append(Tensor(name, View(known[name][0], tuple(axes))))
    nodes = draw(st.permutations(nodes))
    if plain_result:
        shown = draw(st.lists(st.sampled_from(legs), max_size=3, unique=True))
        axes = [Axis(sizes[leg], 0, ((leg, 1),)) for leg in shown]
        shape: tuple[int, ...] = tuple(axis.size for axis in axes)
    else:
        axes = draw(st.lists(_axes(legs, sizes), max_size=3))
        shape = draw(_shapes(axes))
    scale = Fraction(0) if _rarely(draw) else draw(st.sampled_from(SCALES))
    return TensorNetwork(tuple(nodes), View(shape, tuple(axes)), sizes, scale)


def transposed(case: Case) -> dict[str, Any]:
    """The keywords of the transpose of a convolution."""
    return {
        "stride": case.stride,
        "padding": case.pads,
        "dilation": case.dilation,
        "groups": case.groups,
        "output_padding": case.output_padding,
    }


def other_batch(case: Case) -> Case:
    """The same layer at one sample more."""
    return replace(case, input_shape=(case.input_shape[0] + 1, *case.input_shape[1:]))


ZOO: dict[str, Callable[[Case], TensorNetwork]] = {
    "conv": lambda c: diagrams.conv(c.input_shape, c.weight_shape, **c.kwargs),
    "unfold": lambda c: diagrams.unfold(c.input_shape, c.kernel_size, **c.unfold_kwargs),
    "kfac_expand": lambda c: diagrams.kfac_expand(c.input_shape, c.kernel_size, **c.kwargs),
    "kfac_reduce": lambda c: diagrams.kfac_reduce(c.input_shape, c.kernel_size, **c.kwargs),
    "conv_transpose": lambda c: diagrams.conv_transpose(
        c.output_shape, c.weight_shape, **transposed(c)
    ),
    "fold": lambda c: diagrams.fold(
        diagrams.unfold(c.input_shape, c.kernel_size, **c.unfold_kwargs).shape,
        c.input_shape[-c.dims :],
        c.kernel_size,
        **c.unfold_kwargs,
    ),
    "avg_pool": lambda c: diagrams.avg_pool(c.input_shape, c.kernel_size, c.stride, c.pads),
    "avg_pool_counts": lambda c: diagrams.avg_pool(
        c.input_shape, c.kernel_size, c.stride, c.pads, ceil_mode=True, count_include_pad=False
    ),
    "unfolded_kernel": lambda c: diagrams.unfolded_kernel(
        c.input_shape[-c.dims - 1 :], c.weight_shape, **c.kwargs
    ),
    "kfac_expand_transposed": lambda c: diagrams.kfac_expand(
        c.output_shape, c.kernel_size, **transposed(c), transposed=True
    ),
    "kfac_reduce_transposed": lambda c: diagrams.kfac_reduce(
        c.output_shape, c.kernel_size, **transposed(c), transposed=True
    ),
    "grad_expand": lambda c: diagrams.grad_expand(c.output_shape, c.groups),
    "grad_reduce": lambda c: diagrams.grad_reduce(c.output_shape, c.groups),
    "kfac_expand_average": lambda c: diagrams.kfac_expand(
        c.input_shape, c.kernel_size, **c.kwargs, per_group=False
    ),
    "mean_patches": lambda c: diagrams.mean_patches(c.input_shape, c.kernel_size, **c.kwargs),
    "mean_patches_transposed": lambda c: diagrams.mean_patches(
        c.output_shape, c.kernel_size, **transposed(c), transposed=True
    ),
    "unfold_transposed": lambda c: diagrams.unfold(
        c.output_shape,
        c.kernel_size,
        **{name: at for name, at in transposed(c).items() if name != "groups"},
        transposed=True,
    ),
    "gradient_dots": lambda c: diagrams.gradient_dots(ZOO["conv"](c), vectors=2),
    "ntk_block": lambda c: diagrams.ntk_block(
        ZOO["conv"](c), ZOO["conv"](other_batch(c)), vectors=2, other_vectors=1
    ),
    "combined_gradients": lambda c: diagrams.combined_gradients(
        ZOO["conv"](c), vectors=2, combinations=2
    ),
    "gradient_projections": lambda c: diagrams.gradient_projections(
        ZOO["conv"](c), vectors=2, directions=2
    ),
    "gradient_norms": lambda c: diagrams.gradient_norms(ZOO["conv"](c)),
    "ggn_diagonal": lambda c: diagrams.ggn_diagonal(ZOO["conv"](c), vectors=2),
    "ggn_block": lambda c: diagrams.ggn_block(ZOO["conv"](c)),
    "ggn_vector_product": lambda c: diagrams.ggn_vector_product(ZOO["conv"](c), vectors=2),
    "input_half": lambda c: diagrams.input_half(ZOO["conv"](c)),
    "output_half": lambda c: diagrams.output_half(ZOO["conv"](c), vectors=2),
    "input_factor": lambda c: diagrams.input_factor(ZOO["conv"](c)).terms[0],
    "output_factor": lambda c: diagrams.output_factor(ZOO["conv"](c), vectors=2).terms[0],
    "diagonal_vjp": lambda c: diagrams.diagonal_vjp(ZOO["conv"](c)),
    "hessian_vjp": lambda c: diagrams.hessian_vjp(
        diagrams.conv(c.input_shape[-c.dims - 1 :], c.weight_shape, **c.kwargs)
    ),
    "linear": lambda c: diagrams.linear(
        (*c.input_shape[:1], *c.input_shape[2:], c.input_shape[1]),
        (c.weight_shape[0], c.input_shape[1]),
    ),
    "bilinear": lambda c: diagrams.bilinear(
        (*c.input_shape[:1], c.input_shape[1]),
        (*c.input_shape[:1], c.input_shape[2]),
        (c.weight_shape[0], c.input_shape[1], c.input_shape[2]),
    ),
    "lookup": lambda c: diagrams.lookup(
        (*c.input_shape[:1], *c.input_shape[2:], c.input_shape[1]),
        (c.input_shape[1], c.weight_shape[0]),
    ),
    "scale": lambda c: diagrams.scale(c.input_shape, c.input_shape[1:2]),
    "bias": lambda c: diagrams.bias(c.input_shape, c.input_shape[1:]),
    "repeated": lambda c: diagrams.repeated(ZOO["conv"](c), 2),
    "per_sample_gradients": lambda c: diagrams.per_sample_gradients(ZOO["conv"](c), vectors=2),
    "gradient_sum": lambda c: diagrams.gradient_sum(ZOO["conv"](c), vectors=2),
    "gradient_sums": lambda c: diagrams.gradient_sum(ZOO["conv"](c), vectors=2, per_vector=True),
    "input_vjp": lambda c: ZOO["conv"](c).vjp("x").terms[0],
    "weight_vjp": lambda c: ZOO["conv"](c).vjp("weight").terms[0],
    "per_sample": lambda c: ZOO["conv"](c).vjp("weight", per_sample=True).terms[0],
    "jvp": lambda c: ZOO["conv"](c).jvp("x").terms[0],
    "jacobian": lambda c: ZOO["conv"](c).jacobian("weight").terms[0],
}
"""Every shipped diagram, and the derivatives of `conv`, for a batched case."""


def bounded(case: Case) -> tuple[tuple[int, int], ...]:
    """Padding in the first dimension that no mode refuses, and none in the others."""
    size, (left, right) = case.input_shape[-case.dims], case.pads[0]
    return ((min(left, size - 1), min(right, size - 1)), *[(0, 0)] * (case.dims - 1))


def padded_conv(case: Case, mode: str) -> Sum:
    """A convolution of a padded input; padding that the mode does not take stays with Π."""
    pads = bounded(case)
    inner = diagrams.pad(case.input_shape, pads, mode)
    rest = tuple((a - c, b - d) for (a, b), (c, d) in zip(case.pads, pads, strict=True))
    outer = diagrams.conv(inner.shape, case.weight_shape, **case.kwargs | {"padding": rest})
    return diagrams.compose(outer, "x", inner)


MODES = ("zeros", "reflect", "replicate", "circular")
SUMS: dict[str, Callable[[Case], Sum | TensorNetwork]] = {
    **{
        f"pad_{mode}": lambda c, mode=mode: diagrams.pad(c.input_shape, bounded(c), mode)
        for mode in MODES
    },
    **{f"conv_{mode}": lambda c, mode=mode: padded_conv(c, mode) for mode in MODES[1:]},
    **{
        f"diagonal_vjp_{mode}": lambda c, mode=mode: diagrams.diagonal_vjp(padded_conv(c, mode))
        for mode in MODES[1:]
    },
    "with_bias": lambda c: diagrams.with_bias(ZOO["conv"](c)),
    "hessian_vjp_reflect": lambda c: diagrams.hessian_vjp(
        padded_conv(replace(c, input_shape=c.input_shape[1:]), "reflect")
    ),
}
"""Shipped diagrams that are sums of networks, for a batched case."""


@st.composite
def shipped(draw: Any, max_dims: int = 2, **options: Any) -> TensorNetwork:
    """A shipped diagram, or a term of one, small enough for the dense oracle."""
    diagram = (ZOO | SUMS)[draw(st.sampled_from(sorted(ZOO | SUMS)))]
    return draw(st.sampled_from(diagram(draw(geometries(max_dims, **options))).terms))


def operands_for(network: TensorNetwork | Sum, seed: int = 0) -> dict[str, Array]:
    """A random float64 tensor for every operand; for an index, positions that all can have."""
    generator = torch.Generator().manual_seed(seed)
    most: dict[str, int] = {}
    for node in (node for term in network.terms for node in term.tensors):
        if isinstance(node, Selection):
            most[node.name] = min(most.get(node.name, node.view.shape[1]), node.view.shape[1])
    return {
        name: torch.randint(most[name], shape, generator=generator)
        if name in most
        else torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in sorted(network.operands.items())
    }


def brute_force(network: TensorNetwork | Sum, operands: Mapping[str, Array]) -> Array:
    """The value by the definitions alone: a loop over all assignments of all legs."""
    if isinstance(network, Sum):
        return sum(brute_force(term, operands) for term in network.terms)  # type: ignore[return-value]
    arrays = [
        _dense(node, operands[node.name]).reshape([axis.size for axis in node.view.axes])
        if isinstance(node, Tensor)
        else None
        for node in network.nodes
    ]
    total = numpy.zeros([axis.size for axis in network.result.axes])
    for values in product(*map(range, network.sizes.values())):
        at = dict(zip(network.sizes, values, strict=True))
        if (target := _position(network.result, at)) is None:
            continue
        term = float(network.scale)
        for node, array in zip(network.nodes, arrays, strict=True):
            if isinstance(node, Pattern):
                term *= sum(a * at[leg] for leg, a in node.terms) in node.values
            else:
                place = _position(node.view, at)
                term *= 0.0 if place is None else array[place]
        total[target] += term
    return torch.from_numpy(total.reshape(network.shape))


def _dense(node: Tensor, array: Array) -> Any:
    if not isinstance(node, Selection):
        return array.numpy()
    rows, size = node.view.shape
    listed = numpy.zeros((rows, size))
    listed[numpy.arange(rows), array.numpy()] = 1
    return listed


def _position(view: View, at: Mapping[str, int]) -> tuple[int, ...] | None:
    """Where the axes point; None outside the array."""
    found = tuple(axis.offset + sum(a * at[leg] for leg, a in axis.terms) for axis in view.axes)
    inside = all(0 <= p < axis.size for p, axis in zip(found, view.axes, strict=True))
    return found if inside else None


def assert_close(actual: Array, expected: Array, tol: float = 1e-12) -> None:
    """Equal shapes, and values up to ``tol`` relative to the largest."""
    assert actual.shape == expected.shape
    if expected.numel():
        error = (actual - expected).abs().max().item()
        assert error <= tol * (1 + expected.abs().max().item()), f"values differ by {error}"


def assert_same(
    a: TensorNetwork | Sum, b: TensorNetwork | Sum, tol: float = 1e-12, seed: int = 0
) -> None:
    """Two networks have one value; either may have lost operands that do not count."""
    common = a.operands.keys() & b.operands.keys()
    assert {n: a.operands[n] for n in common} == {n: b.operands[n] for n in common}
    given = operands_for(a, seed)
    given |= {n: x for n, x in operands_for(b, seed + 1).items() if n not in given}
    expected = a.reference(**{name: given[name] for name in a.operands})
    assert_close(b.reference(**{name: given[name] for name in b.operands}), expected, tol)
