"""The price of one of torch's convolution kernels, for a matched part of a network."""

from collections.abc import Sequence
from dataclasses import replace

import torch

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
    layer = _layer(match, roles, kind, (first.shape, second.shape), shape, padding)
    copied = [array for array in (first, second) if array.run < array.size]
    copies = [cost.copy(array.size, *array.innermost).seconds for array in copied]
    kernel = cost.convolution(kind, layer, copies)
    held = cost.bytes_per_entry() * sum(array.size for array in copied)
    return replace(kernel, scratch=held + _workspace(kind, layer))


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
