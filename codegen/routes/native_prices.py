"""The price of one of torch's convolution kernels, for a matched part of a network, and layouts."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from tnconv.codegen.lowering import layouts
from tnconv.codegen.lowering.layouts import Ints
from tnconv.codegen.lowering.strided import Strided
from tnconv.codegen.prices import cost
from tnconv.codegen.prices.native_shapes import Convolution, Shape
from tnconv.codegen.prices.scratch import scratch
from tnconv.codegen.routes.matches import Match, Roles


def price(
    match: Match,
    roles: Roles,
    kind: str,
    first: Strided,
    second: Strided,
    shape: tuple[int, ...],
    padding: Sequence[int],
) -> cost.Kernel:
    """The price of one kernel, with the copies of operands that are in another order.

    Args:
        match: the two tensors and the patterns that join them.
        roles: the legs of the match that are groups, summed, and kept.
        kind: ``"convolution"``, ``"weight gradient"`` or ``"input gradient"``.
        first: image, or the kernel of an input gradient.
        second: kernel, or the output of a gradient.
        shape: of the result.
        padding: that the kernel adds, for each dimension.
    """
    last = is_channels_last(kind, first, second)
    layer = _layer(match, roles, kind, (first.shape, second.shape), shape, padding)
    layer = replace(layer, channels_last=last)
    wanted = [array.channels_moved() if last else array for array in (first, second)]
    copied = [array for array in wanted if array.run < array.size]
    copies = [cost.copy(array.size, *array.innermost).seconds for array in copied]
    kernel = cost.convolution(kind, layer, copies)
    held = cost.bytes_per_entry() * sum(array.size for array in copied)
    return replace(kernel, scratch=held + _workspace(kind, layer))


def is_channels_last(kind: str, first: Strided, second: Strided) -> bool:
    """Whether torch computes with channels last, as its image or its kernel lies.

    Of gradients it is told a kernel's shape, or an image in the layout of the output's gradient.
    """
    told = {"weight gradient": (second,), "convolution": (first, second)}
    return any(array.is_channels_last for array in told.get(kind, (first, second)))


def strides(kind: str, first: Strided, second: Strided, shape: tuple[int, ...]) -> Ints:
    """The strides in which a kernel writes a result of this shape."""
    if is_channels_last(kind, first, second):
        return layouts.channels_last(shape)
    return layouts.contiguous(shape)


def _workspace(kind: str, layer: Convolution) -> int:
    """Bytes beside the result: as oneDNN holds, or what the device's libraries may take at most."""
    bound = cost.in_use().machine.workspace
    if bound is not None:
        return bound
    return scratch(kind, layer, cost.bytes_per_entry(), torch.get_num_threads())


def _layer(
    match: Match,
    roles: Roles,
    kind: str,
    operands: tuple[Shape, Shape],
    result: Shape,
    padding: Sequence[int],
) -> Convolution:
    """The shapes of image, kernel and output, of which two are operands."""
    first, second = operands
    x, w, y = {
        "convolution": (first, second, result),
        "weight gradient": (first, result, second),
        "input gradient": (result, second, first),
    }[kind]
    strides = tuple(joint.stride for joint in match.joints)
    dilations = tuple(joint.dilation for joint in match.joints)
    return Convolution(x, w, y, match.size(*roles.group), strides, dilations, tuple(padding))
