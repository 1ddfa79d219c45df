"""The diagrams of layers: what goes forward. Derivatives come from the calculus on networks."""

from collections.abc import Sequence
from math import prod

from tnconv.diagrams.affine import Tensor, View
from tnconv.diagrams.expression import Sum
from tnconv.diagrams.geometry import Geometry, geometry, layer_geometry
from tnconv.diagrams.hyperparameters import (
    Hyperparameters,
    IntOrTuple,
    Padding,
    checked_shape,
    per_dimension,
)
from tnconv.diagrams.network import TensorNetwork


def layer(
    input_shape: Sequence[int], weight_shape: Sequence[int], h: Hyperparameters
) -> TensorNetwork:
    """The layer that these shapes and hyper-parameters mean: one diagram for all three kinds.

    A weight matrix and an input with positions in front of its channels are a linear layer's;
    all others are those of a convolution, transposed or not.

    >>> layer((8, 4, 9), (4, 3, 2), Hyperparameters(stride=2, transposed=True)).shape
    (8, 3, 18)
    >>> layer((8, 5, 3), (4, 3), Hyperparameters()).shape
    (8, 5, 4)

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    if len(weight_shape) == 2 < len(input_shape):
        _check_default(h)
        return linear(input_shape, weight_shape)
    return convolution(input_shape, weight_shape, h)


def convolution(
    input_shape: Sequence[int], weight_shape: Sequence[int], h: Hyperparameters
) -> TensorNetwork:
    """`conv` or `conv_transpose`, as the hyper-parameters say.

    >>> convolution((8, 4, 9), (4, 3, 2), Hyperparameters(stride=2, transposed=True)).shape
    (8, 3, 18)

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    return of_geometry(layer_geometry(input_shape, weight_shape, h))


def patch_layer(
    input_shape: Sequence[int], kernel_size: IntOrTuple, h: Hyperparameters
) -> TensorNetwork:
    """The `layer` with one output channel per group: what its patches are read from.

    ``kernel_size=()`` and positions in front of the channels mean a linear layer.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    if not isinstance(kernel_size, int) and len(kernel_size) == 0 and len(input_shape) > 2:
        return layer(input_shape, (1, input_shape[-1]), h)
    return of_geometry(geometry(input_shape, kernel_size, h))


def of_geometry(h: Geometry) -> TensorNetwork:
    """The convolution of these sizes: input, patterns and weight."""
    sizes = h.sizes | {"d": h.out_channels}
    channels = (("g", "c"), "d") if h.transposed else (("g", "d"), "c")
    weight = Tensor("weight", View.of(sizes, *channels, *h.legs("k")))
    result = View.of(sizes, *h.samples, ("g", "d"), *h.legs("o"))
    return TensorNetwork((_input(h), *h.patterns, weight), result, sizes)


def _input(h: Geometry) -> Tensor:
    return Tensor("x", View.of(h.sizes, *h.samples, ("g", "c"), *h.legs("i")))


def _check_default(h: Hyperparameters) -> None:
    for name, value, default in zip(h._fields, h, Hyperparameters(), strict=True):
        if value not in (default, (default,)):
            raise ValueError(f"{name} is {value!r} for a linear layer; expected {default!r}")


def conv(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> TensorNetwork:
    """``y[n, gd, o] = Σ_{c,k,i} x[n, gc, i] Π[k, o, i] w[gd, c, k]``.

    Operands ``x`` of shape ``(n, gc, *i)`` or ``(gc, *i)`` and ``weight`` of shape ``(gd, c, *k)``;
    any number of spatial dimensions. Hyper-parameters as in ``torch.nn.functional.conv2d``;
    ``padding`` also takes (left, right) pairs.

    >>> net = conv((8, 4, 32, 32), (6, 2, 3, 3), stride=2, padding=1, groups=2)
    >>> net.shape, net.vjp("weight", per_sample=True).shape
    ((8, 6, 16, 16), (8, 6, 2, 3, 3))

    Args:
        input_shape: of operand ``x``, with or without batch.
        weight_shape: of operand ``weight``.
        stride: distance of neighbouring windows, one int or one for each spatial dimension.
        padding: zeros around the input: ints, (left, right) pairs, "same" or "valid".
        dilation: distance of neighbouring taps of a window.
        groups: number of groups of channels.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    h = Hyperparameters(stride, padding, dilation, groups)
    return convolution(input_shape, weight_shape, h)


def conv_transpose(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    output_padding: IntOrTuple = 0,
    groups: int = 1,
    dilation: IntOrTuple = 1,
) -> TensorNetwork:
    """``y[n, gd, o] = Σ_{c,k,i} x[n, gc, i] Π[k, i, o] w[gc, d, k]``: i and o change places in Π.

    Operands ``x`` of shape ``(n, gc, *i)`` or ``(gc, *i)`` and ``weight`` of shape ``(gc, d, *k)``;
    any number of spatial dimensions. Hyper-parameters (every legal ``output_padding``) as in
    ``torch.nn.functional.conv_transpose2d``; ``padding`` also takes (left, right) pairs.

    >>> conv_transpose((8, 4, 16, 16), (4, 3, 2, 2), stride=2, groups=2).shape
    (8, 6, 32, 32)

    Args:
        input_shape: of operand ``x``, with or without batch.
        weight_shape: of operand ``weight``.
        stride: distance of neighbouring windows, one int or one for each spatial dimension.
        padding: rows of the result that are cut at its borders: ints, or (left, right) pairs.
        output_padding: further positions at the end of each dimension of the result.
        groups: number of groups of channels.
        dilation: distance of neighbouring taps of a window.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    h = Hyperparameters(stride, padding, dilation, groups, True, output_padding)
    return convolution(input_shape, weight_shape, h)


def linear(input_shape: Sequence[int], weight_shape: Sequence[int]) -> TensorNetwork:
    """``y[n, o, d] = Σ_c x[n, o, c] w[d, c]``, with any number of dimensions o1, o2, ... between.

    Operands ``x`` of shape ``(n, *o, c)`` or ``(c,)`` and ``weight`` of shape ``(d, c)``.

    >>> linear((8, 5, 3), (4, 3)).shape
    (8, 5, 4)

    Raises:
        ValueError: a weight that is no matrix or does not fit the input.
    """
    shape = checked_shape("input", input_shape)
    weight = checked_shape("weight", weight_shape)
    if len(weight) != 2:
        raise ValueError(f"weight has shape {weight}; expected (out_features, in_features)")
    if not shape or shape[-1] != weight[1]:
        raise ValueError(f"input has shape {shape}; expected {weight[1]} in its last dimension")
    leading = ("n", *(f"o{at}" for at in range(1, len(shape) - 1)))[: len(shape) - 1]
    sizes = dict(zip((*leading, "c", "d"), (*shape, weight[0]), strict=True))
    nodes = (Tensor("x", View.of(sizes, *leading, "c")), Tensor("weight", View.of(sizes, "d", "c")))
    return TensorNetwork(nodes, View.of(sizes, *leading, "d"), sizes)


def bilinear(
    input_shape: Sequence[int], other_shape: Sequence[int], weight_shape: Sequence[int]
) -> TensorNetwork:
    """``y[n, o, d] = Σ_{a,b} x[n, o, a] w[d, a, b] z[n, o, b]``, for positions o.

    Operands ``x`` of shape ``(n, *o, a)``, ``other`` (z) of shape ``(n, *o, b)``, and ``weight`` of
    shape ``(d, a, b)``: ``torch.nn.Bilinear``.

    >>> bilinear((8, 5, 3), (8, 5, 2), (4, 3, 2)).shape
    (8, 5, 4)

    Raises:
        ValueError: inputs that differ before their last dimension, or a weight that does not fit.
    """
    x, z = checked_shape("input", input_shape), checked_shape("other input", other_shape)
    weight = checked_shape("weight", weight_shape)
    if not x or x[:-1] != z[:-1]:
        raise ValueError(f"inputs have shapes {x} and {z}; expected equal ones but for the last")
    if len(weight) != 3 or weight[1:] != (x[-1], z[-1]):
        raise ValueError(f"weight has shape {weight}; expected (out_features, {x[-1]}, {z[-1]})")
    leading = ("n", *(f"o{at}" for at in range(1, len(x) - 1)))[: len(x) - 1]
    sizes = dict(zip((*leading, "a", "b", "d"), (*x, z[-1], weight[0]), strict=True))
    nodes = (
        Tensor("x", View.of(sizes, *leading, "a")),
        Tensor("other", View.of(sizes, *leading, "b")),
        Tensor("weight", View.of(sizes, "d", "a", "b")),
    )
    return TensorNetwork(nodes, View.of(sizes, *leading, "d"), sizes)


def patches(h: Geometry) -> TensorNetwork:
    """``U[n, g, c, k, o] = Σ_i x[n, gc, i] Π[k, o, i]`` with one result dimension per leg."""
    result = View.of(h.sizes, *h.samples, "g", "c", *h.legs("k"), *h.legs("o"))
    return TensorNetwork((_input(h), *h.patterns), result, h.sizes)


def unfold(
    input_shape: Sequence[int],
    kernel_size: IntOrTuple,
    dilation: IntOrTuple = 1,
    padding: Padding = 0,
    stride: IntOrTuple = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
) -> TensorNetwork:
    """The unfolded input ``U[n, ck, o] = Σ_i x[n, c, i] Π[k, o, i]`` (im2col).

    Operand ``x`` of shape ``(n, c, *i)`` or ``(c, *i)``; result ``(n, c·K, O)`` as
    ``torch.nn.functional.unfold``, for any number of spatial dimensions; its vjp is ``fold``. With
    ``transposed``, the patches that a transposed convolution sees: i and o exchanged in Π.

    >>> unfold((8, 3, 32, 32), 5).shape
    (8, 75, 784)
    >>> unfold((8, 3, 16, 16), 2, stride=2, transposed=True).shape
    (8, 12, 1024)

    Args:
        input_shape: of operand ``x``, with or without batch.
        kernel_size: taps of a window: an int, or one for each spatial dimension.
        dilation: distance of neighbouring taps of a window.
        padding: zeros around the input: ints, (left, right) pairs, "same" or "valid".
        stride: distance of neighbouring windows, one int or one for each spatial dimension.
        transposed: whether the patches are those of a transposed convolution.
        output_padding: further outputs of a transposed convolution.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    h = Hyperparameters(stride, padding, dilation, 1, transposed, output_padding)
    sizes = geometry(input_shape, kernel_size, h)
    batch = () if sizes.batch is None else (sizes.batch,)
    return patches(sizes).reshape(*batch, sizes.patch, sizes.positions)


def fold(
    input_shape: Sequence[int],
    output_size: Sequence[int],
    kernel_size: IntOrTuple,
    dilation: IntOrTuple = 1,
    padding: Padding = 0,
    stride: IntOrTuple = 1,
) -> TensorNetwork:
    """The folded input ``y[n, c, i] = Σ_{k,o} x[n, ck, o] Π[k, o, i]`` (col2im), unfold's adjoint.

    Operand ``x`` of shape ``(n, c·K, O)`` or ``(c·K, O)``, result ``(n, c, *output_size)`` as
    ``torch.nn.functional.fold``, for any number of spatial dimensions.

    >>> fold((8, 75, 784), (32, 32), 5).shape
    (8, 3, 32, 32)

    Args:
        input_shape: of operand ``x``, ``(n, c·K, O)``, with or without batch.
        output_size: spatial sizes of the result.
        kernel_size: taps of a window: an int, or one for each spatial dimension.
        dilation: distance of neighbouring taps of a window.
        padding: zeros around the input: ints, (left, right) pairs, "same" or "valid".
        stride: distance of neighbouring windows, one int or one for each spatial dimension.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together.
    """
    shape, size = checked_shape("input", input_shape), checked_shape("output", output_size)
    taps = prod(per_dimension("kernel_size", kernel_size, len(size), 1))
    if len(shape) not in (2, 3) or shape[-2] % taps:
        raise ValueError(
            f"input has shape {shape}; expected (batch, channels * {taps}, positions), or without "
            "batch"
        )
    kernel = (kernel_size,) * len(size) if isinstance(kernel_size, int) else kernel_size
    folded = (*shape[:-2], shape[-2] // taps, *size)
    unfolded = unfold(folded, kernel, dilation, padding, stride)
    if unfolded.shape != shape:
        raise ValueError(f"input has shape {shape}; expected {unfolded.shape} for output {size}")
    return unfolded.vjp("x", cotangent="x").terms[0]


def unfolded_kernel(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> TensorNetwork:
    """A convolution's matrix ``T[gdo, gci] = Σ_k Π[k, o, i] w[gd, c, k]``, Toeplitz by blocks.

    ``y.flatten() = T @ x.flatten()`` for x of shape ``input_shape`` = ``(gc, *i)``, without batch.

    >>> unfolded_kernel((3, 32), (4, 3, 3)).shape
    (120, 96)

    Args:
        input_shape: of the input, ``(gc, *i)``.
        weight_shape: of operand ``weight``.
        stride: distance of neighbouring windows, one int or one for each spatial dimension.
        padding: zeros around the input: ints, (left, right) pairs, "same" or "valid".
        dilation: distance of neighbouring taps of a window.
        groups: number of groups of channels.

    Raises:
        ValueError: as `conv`, or an input shape with a batch dimension.
    """
    layer = conv(input_shape, weight_shape, stride, padding, dilation, groups)
    if "n" in layer.sizes:
        raise ValueError(f"input has shape {tuple(input_shape)}; expected one without batch")
    return layer.jacobian("x").terms[0].reshape(prod(layer.shape), prod(layer.operands["x"]))


def with_bias(network: TensorNetwork) -> Sum:
    """A layer's network plus ``y[n, gd, o] = b[gd]``, for ``conv`` and ``linear``.

    >>> with_bias(conv((8, 3, 9), (4, 3, 3))).operands["bias"]
    (4,)

    Raises:
        ValueError: a network without an out-channel leg ``d``.
    """
    if "d" not in network.sizes:
        raise ValueError(f"no out-channel leg 'd' among the legs {sorted(network.sizes)}")
    held = next(t for t in network.tensors if t.name == "weight").view.legs
    legs = tuple(leg for leg in held if leg in ("g", "d"))
    sizes = {leg: network.sizes[leg] for leg in network.result.legs}
    bias = Tensor("bias", View.of(sizes, legs))
    return network + TensorNetwork((bias,), network.result, sizes)
