"""Kronecker factors: two copies of a layer's patches, or of its output gradient, connected."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from math import prod

from tnconv.diagrams.affine import Axis, Leg, Node, Pattern, Tensor, View
from tnconv.diagrams.expression import Sum
from tnconv.diagrams.geometry import (
    Geometry,
    IntOrTuple,
    Padding,
    checked_shape,
    geometry,
    transposed_geometry,
)
from tnconv.diagrams.layers import patches
from tnconv.diagrams.network import TensorNetwork


def kfac_expand(
    input_shape: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    scale: Fraction | int | None = None,
) -> TensorNetwork:
    """The input-based KFAC-expand (KFC) factor ``A[g, ck, c'k'] = 1/N Σ_{n,o} U U'``.

    ``U[n, g, c, k, o]`` is the unfolded input, operand ``x`` of shape ``(n, gc, *i)``; the two
    copies share n, g and o. Result ``(g, c·K, c·K)``: one factor per group. ``scale`` replaces 1/N.
    Unbatched input counts as one sample, and the factor of an empty batch is zero. Source: Grosse &
    Martens 2016 (KFC); Eschenhagen et al. 2023 for the name.

    >>> kfac_expand((8, 4, 32, 32), 3, groups=2).shape
    (2, 18, 18)

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    h = geometry(input_shape, kernel_size, stride, padding, dilation, groups)
    return _factor(h, "expand", scale)


def kfac_reduce(
    input_shape: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    scale: Fraction | int | None = None,
) -> TensorNetwork:
    """The input-based KFAC-reduce factor ``A[g, ck, c'k'] = 1/(N O²) Σ_n (Σ_o U)(Σ_o' U')``.

    As `kfac_expand`, but each copy is averaged over its own output positions. Source: Eschenhagen
    et al. 2023.

    >>> kfac_reduce((8, 4, 32, 32), 3, groups=2).shape
    (2, 18, 18)

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    h = geometry(input_shape, kernel_size, stride, padding, dilation, groups)
    return _factor(h, "reduce", scale)


def kfac_expand_transpose(
    input_shape: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    output_padding: IntOrTuple = 0,
    groups: int = 1,
    dilation: IntOrTuple = 1,
    scale: Fraction | int | None = None,
) -> TensorNetwork:
    """`kfac_expand` of a transposed convolution: Π has i and o exchanged in the patches U.

    >>> kfac_expand_transpose((8, 4, 16, 16), 2, stride=2).shape
    (1, 16, 16)

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    h = transposed_geometry(
        input_shape, kernel_size, stride, padding, dilation, groups, output_padding
    )
    return _factor(h, "expand", scale)


def kfac_reduce_transpose(
    input_shape: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    output_padding: IntOrTuple = 0,
    groups: int = 1,
    dilation: IntOrTuple = 1,
    scale: Fraction | int | None = None,
) -> TensorNetwork:
    """`kfac_reduce` of a transposed convolution: Π has i and o exchanged in the patches U.

    >>> kfac_reduce_transpose((8, 4, 16, 16), 2, stride=2).shape
    (1, 16, 16)

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    h = transposed_geometry(
        input_shape, kernel_size, stride, padding, dilation, groups, output_padding
    )
    return _factor(h, "reduce", scale)


def grad_expand(
    output_shape: Sequence[int], groups: int = 1, scale: Fraction | int = 1
) -> TensorNetwork:
    """The gradient-based KFAC-expand factor ``B[g, d, d'] = Σ_{n,o} v[n, gd, o] v[n, gd', o]``.

    Operand ``grad_output`` of shape ``output_shape`` = ``(n, gd, *o)``; ``scale`` multiplies.

    >>> grad_expand((8, 4, 32, 32), groups=2).shape
    (2, 2, 2)

    Raises:
        ValueError: an output without batch and channels, or groups that do not divide them.
    """
    return _grad_factor(output_shape, groups, "expand", scale)


def grad_reduce(
    output_shape: Sequence[int], groups: int = 1, scale: Fraction | int = 1
) -> TensorNetwork:
    """The gradient-based KFAC-reduce factor ``B[g, d, d'] = Σ_n (Σ_o v[n, gd, o]) (Σ_o' v')``.

    Operand ``grad_output`` of shape ``output_shape`` = ``(n, gd, *o)``; ``scale`` multiplies.

    >>> grad_reduce((8, 4, 32, 32), groups=2).shape
    (2, 2, 2)

    Raises:
        ValueError: an output without batch and channels, or groups that do not divide them.
    """
    return _grad_factor(output_shape, groups, "reduce", scale)


def mean_patches(
    input_shape: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> TensorNetwork:
    """``m[n, g, ck] = 1/O Σ_o U[n, g, c, k, o]``: averaged patches, half of `kfac_reduce`.

    >>> mean_patches((8, 4, 32, 32), 3, groups=2).shape
    (8, 2, 18)

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    return _averaged(geometry(input_shape, kernel_size, stride, padding, dilation, groups))


def mean_patches_transpose(
    input_shape: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    output_padding: IntOrTuple = 0,
    groups: int = 1,
    dilation: IntOrTuple = 1,
) -> TensorNetwork:
    """`mean_patches` of a transposed convolution: Π has i and o exchanged in the patches U.

    >>> mean_patches_transpose((8, 4, 16, 16), 2, stride=2).shape
    (8, 1, 16)

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    return _averaged(
        transposed_geometry(
            input_shape, kernel_size, stride, padding, dilation, groups, output_padding
        )
    )


def group_average(factor: TensorNetwork) -> TensorNetwork:
    """``1/G Σ_g A[g, a, a']``: one factor ``(1, a, a)`` for all groups, an approximation.

    >>> group_average(kfac_expand((8, 4, 32, 32), 3, groups=2)).shape
    (1, 18, 18)

    Raises:
        ValueError: a network without a group leg in its result.
    """
    (_, *shape), groups = factor.shape, factor.sizes["g"]
    return factor.marginal("g").reshape(1, *shape).scaled(Fraction(1, groups))


def with_ones(factor: TensorNetwork, groups: int = 1) -> Sum:
    """A Kronecker factor of patches with a last entry 1: weight and bias as one block.

    From ``A[g, a, a'] = s Σ_q U[q, g, a] U[q, g, a']`` to ``(g, a + 1, a + 1)``, with
    ``s Σ_q U[q, g, a]`` in the last row and column and ``s Σ_q 1`` in the corner. So many axes in
    front are ``groups``, each a leg of its own.

    >>> with_ones(kfac_expand((8, 4, 32, 32), 3, groups=2)).shape
    (2, 19, 19)

    Raises:
        ValueError: a network that is no Kronecker factor with one block per group.
    """
    axes, half = factor.result.axes, len(factor.nodes) // 2
    entries = (len(axes) - groups) // 2
    sides = (axes[groups : groups + entries], axes[groups + entries :])
    blocks = all(axis.plain(factor.sizes) for axis in axes[:groups])
    square = [axis.size for axis in sides[0]] == [axis.size for axis in sides[1]]
    if len(factor.nodes) % 2 or not blocks or not square or not factor.nodes:
        raise ValueError(f"not a Kronecker factor with one block per group: {factor}")
    halves = (factor.nodes[:half], factor.nodes[half:])
    return Sum(
        tuple(
            _with_ones_for(factor, axes[:groups], sides, halves, kept)
            for kept in product((True, False), repeat=2)
        )
    )


def _with_ones_for(
    factor: TensorNetwork,
    groups: Sequence[Axis],
    sides: Sequence[tuple[Axis, ...]],
    halves: Sequence[tuple[Node, ...]],
    kept: tuple[bool, ...],
) -> TensorNetwork:
    """One block of `with_ones`: halves that are not kept are the entry 1 of every patch."""
    width = prod(axis.size for axis in sides[0])
    nodes: list[Node] = []
    axes, gone = list(groups), set[Leg]()
    for side, half, keep in zip(sides, halves, kept, strict=True):
        axes.append(Axis(width + 1, 0, _flattened(side)) if keep else Axis(width + 1, width))
        if keep:
            nodes += half
        else:
            read = {leg for node in half if isinstance(node, Tensor) for leg in node.legs}
            met = {leg for node in half if isinstance(node, Pattern) for leg in node.legs}
            gone |= (read & met) | {leg for axis in side for leg, _ in axis.terms}
    sizes = {leg: size for leg, size in factor.sizes.items() if leg not in gone}
    shape = (prod(axis.size for axis in groups), width + 1, width + 1)
    return factor.with_(nodes, View(shape, tuple(axes)), sizes)


def _flattened(side: tuple[Axis, ...]) -> tuple[tuple[Leg, int], ...]:
    """The linear form that flattens plain axes, the last one fastest."""
    strides = [prod(axis.size for axis in side[at + 1 :]) for at in range(len(side))]
    return tuple((leg, a) for axis, a in zip(side, strides, strict=True) for leg, _ in axis.terms)


def _averaged(h: Geometry) -> TensorNetwork:
    """The patches of each group, averaged over output positions."""
    batch = () if h.batch is None else (h.batch,)
    return _half(h, "reduce").reshape(*batch, h.groups, h.patch)


def _half(h: Geometry, flavour: str) -> TensorNetwork:
    """The patches, for KFAC-reduce averaged over output positions."""
    if flavour == "expand":
        return patches(h)
    return patches(h).marginal(*h.legs("o")).scaled(Fraction(1, max(1, h.positions)))


def _factor(h: Geometry, flavour: str, scale: Fraction | int | None) -> TensorNetwork:
    """Two halves that share g, and sum n and what is left of o."""
    positions = h.legs("o") if flavour == "expand" else ()
    factor = _half(h, flavour).gram(over=(*h.samples, *positions), keep=("g",))
    total = Fraction(1, max(1, h.batch or 1)) if scale is None else scale / factor.scale
    return factor.reshape(h.groups, h.patch, h.patch).scaled(total)


def _grad_factor(
    output_shape: Sequence[int], groups: int, flavour: str, scale: Fraction | int
) -> TensorNetwork:
    """The factor of patches of one tap, read from ``grad_output``."""
    shape = checked_shape("output", output_shape)
    if len(shape) < 2:
        raise ValueError(f"output has shape {shape}; expected (batch, channels, *positions)")
    h = geometry(shape, (1,) * (len(shape) - 2), groups=groups)
    return _factor(h, flavour, scale).rename_operands({"x": "grad_output"})
