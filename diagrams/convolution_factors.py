"""Kronecker factors of convolutions and linear layers, from shapes and hyper-parameters.

Their scales are those of the table in `tnconv.diagrams.kronecker`.
"""

from collections.abc import Sequence
from fractions import Fraction

from tnconv.diagrams.affine import Tensor, View
from tnconv.diagrams.expression import Sum
from tnconv.diagrams.hyperparameters import Hyperparameters, IntOrTuple, Padding, checked_shape
from tnconv.diagrams.kronecker import Flavour, Scale, input_factor, output_factor
from tnconv.diagrams.layer_networks import patch_layer
from tnconv.diagrams.network import TensorNetwork
from tnconv.diagrams.roles import Roles, input_half


def kfac_expand(
    input_shape: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
    joint: bool = False,
    per_group: bool = True,
    scale: Scale = "ggn",
) -> TensorNetwork | Sum:
    """The input-based KFAC-expand factor ``A[g, ck, c'k'] = 1/(N·O) Σ_{n,o} U U'``.

    ``U[n, g, c, k, o]`` is the unfolded input, operand ``x`` of shape ``(n, gc, *i)``; the two
    copies share n, g and o. Result ``(g, c·K, c·K)``: one factor per group. With
    ``kernel_size=()`` it is a linear layer's, and ``x`` has shape ``(n, *o, c)``. Unbatched input
    counts as one sample, and the factor of an empty batch is zero.

    >>> kfac_expand((8, 4, 32, 32), 3, groups=2).shape
    (2, 18, 18)
    >>> kfac_expand((8, 5, 3), (), joint=True).shape
    (1, 4, 4)

    Args:
        input_shape: of operand ``x``, with or without batch.
        kernel_size: an int, or one for each spatial dimension; () for a linear layer.
        stride: see `Hyperparameters`, as for the next five.
        padding: zeros around the input.
        dilation: distance between taps.
        groups: number of groups of channels.
        transposed: the patches that a transposed convolution sees.
        output_padding: further outputs of a transposed convolution.
        joint: end every patch with an entry 1: the factor of weight and bias.
        per_group: False averages over groups, which other libraries do (inexact).
        scale: a convention of `tnconv.diagrams.kronecker`, or what multiplies the sum instead.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    h = Hyperparameters(stride, padding, dilation, groups, transposed, output_padding)
    return _patch_factor(
        patch_layer(input_shape, kernel_size, h), "expand", joint, per_group, scale
    )


def kfac_reduce(
    input_shape: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
    joint: bool = False,
    per_group: bool = True,
    scale: Scale = "ggn",
) -> TensorNetwork | Sum:
    """The input-based KFAC-reduce factor ``A[g, ck, c'k'] = 1/(N·O²) Σ_n (Σ_o U)(Σ_o' U')``.

    As `kfac_expand`, with the same arguments, but each copy is averaged over its own positions.

    >>> kfac_reduce((8, 4, 32, 32), 3, groups=2).shape
    (2, 18, 18)

    Args:
        input_shape: of operand ``x``, with or without batch.
        kernel_size: an int, or one for each spatial dimension; () for a linear layer.
        stride: distance of neighbouring windows.
        padding: zeros around the input.
        dilation: distance between taps.
        groups: number of groups of channels.
        transposed: the patches that a transposed convolution sees.
        output_padding: further outputs of a transposed convolution.
        joint: end every patch with an entry 1: the factor of weight and bias.
        per_group: False averages over groups, which other libraries do (inexact).
        scale: a convention of `tnconv.diagrams.kronecker`, or what multiplies the sum instead.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    h = Hyperparameters(stride, padding, dilation, groups, transposed, output_padding)
    return _patch_factor(
        patch_layer(input_shape, kernel_size, h), "reduce", joint, per_group, scale
    )


def mean_patches(
    input_shape: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
) -> TensorNetwork:
    """``m[n, g, ck] = 1/O Σ_o U[n, g, c, k, o]``: averaged patches, half of `kfac_reduce`.

    >>> mean_patches((8, 4, 32, 32), 3, groups=2).shape
    (8, 2, 18)
    >>> mean_patches((8, 4, 16, 16), 2, stride=2, transposed=True).shape
    (8, 1, 16)

    Args:
        input_shape: of operand ``x``, with or without batch.
        kernel_size: an int, or one for each spatial dimension; () for a linear layer.
        stride: distance of neighbouring windows.
        padding: zeros around the input.
        dilation: distance between taps.
        groups: number of groups of channels.
        transposed: the patches that a transposed convolution sees.
        output_padding: further outputs of a transposed convolution.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    h = Hyperparameters(stride, padding, dilation, groups, transposed, output_padding)
    layer = patch_layer(input_shape, kernel_size, h)
    roles, half = Roles.of(layer), input_half(layer)
    groups, entries, positions = map(layer.size, (roles.groups, roles.patch, roles.positions))
    batch = (layer.sizes["n"],) if "n" in layer.sizes else ()
    summed = half.marginal(*roles.positions).scaled(Fraction(1, max(1, positions)))
    return summed.reshape(*batch, groups, entries)


def grad_expand(
    output_shape: Sequence[int], groups: int = 1, per_group: bool = True, scale: Scale = "ggn"
) -> TensorNetwork:
    """The gradient-based KFAC-expand factor ``B[g, d, d'] = Σ_{n,o} v[n, gd, o] v[n, gd', o]``.

    >>> grad_expand((8, 4, 32, 32), groups=2).shape
    (2, 2, 2)

    Args:
        output_shape: ``(n, gd, *o)``, the shape of operand ``grad_output``.
        groups: number of groups of channels.
        per_group: False averages over groups.
        scale: a convention of `tnconv.diagrams.kronecker`, or what multiplies the sum.

    Raises:
        ValueError: an output without batch and channels, or groups that do not divide them.
    """
    return output_factor(
        _output_layer(output_shape, groups), "weight", None, "expand", per_group, scale
    )


def grad_reduce(
    output_shape: Sequence[int], groups: int = 1, per_group: bool = True, scale: Scale = "ggn"
) -> TensorNetwork:
    """The gradient-based KFAC-reduce factor ``B[g, d, d'] = Σ_n (Σ_o v[n, gd, o]) (Σ_o' v')``.

    As `grad_expand`, with the same arguments.

    >>> grad_reduce((8, 4, 32, 32), groups=2).shape
    (2, 2, 2)

    Args:
        output_shape: ``(n, gd, *o)``, the shape of operand ``grad_output``.
        groups: number of groups of channels.
        per_group: False averages over groups.
        scale: a convention of `tnconv.diagrams.kronecker`, or what multiplies the sum.

    Raises:
        ValueError: an output without batch and channels, or groups that do not divide them.
    """
    return output_factor(
        _output_layer(output_shape, groups), "weight", None, "reduce", per_group, scale
    )


def _patch_factor(
    layer: TensorNetwork, flavour: Flavour, joint: bool, per_group: bool, scale: Scale
) -> TensorNetwork | Sum:
    """The `input_factor`, averaged over samples unless a number replaces the whole scale."""
    factor = input_factor(layer, "weight", flavour, joint, per_group, scale)
    samples = layer.sizes.get("n", 1) if isinstance(scale, str) else 1
    return factor.scaled(Fraction(1, max(1, samples)))


def _output_layer(output_shape: Sequence[int], groups: int) -> TensorNetwork:
    """A layer with this output: one input channel per group, and a weight for each output one."""
    shape = checked_shape("output", output_shape)
    if len(shape) < 2:
        raise ValueError(f"output has shape {shape}; expected (batch, channels, *positions)")
    if groups < 1 or shape[1] % groups:
        raise ValueError(f"groups={groups} does not divide the {shape[1]} output channels")
    legs = ("n", "g", "d", *(f"o{at}" for at in range(1, len(shape) - 1)))
    sizes = dict(zip(legs, (shape[0], groups, shape[1] // groups, *shape[2:]), strict=True))
    x, weight = View.of(sizes, "n", "g", *legs[3:]), View.of(sizes, ("g", "d"))
    result = View.of(sizes, "n", ("g", "d"), *legs[3:])
    return TensorNetwork((Tensor("x", x), Tensor("weight", weight)), result, sizes)
