"""What one of torch's convolution kernels costs, for the shapes that it is given."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch

from tnconv.codegen.lowering.strided import Strided
from tnconv.codegen.prices import cost
from tnconv.codegen.prices.native_shapes import Convolution, Shape
from tnconv.codegen.prices.onednn import by_vectors, few_as_they_are
from tnconv.codegen.prices.scratch import is_small, scratch
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
    """The price of one kernel: every channel pair of a group meets at every (o, k).

    Operands in another order are copied first. Weight gradients are brought in order after, and the
    weights of input gradients of one tap before.
    """
    legs = (*roles.group, *roles.summed, *roles.a, *roles.b)
    flops = 2 * match.size(*legs) * prod(match.sizes("o")) * prod(match.sizes("k"))
    channels = {
        "convolution": (roles.summed, roles.b),
        "weight gradient": (roles.a, roles.b),
        "input gradient": (roles.summed, roles.a),
    }[kind]
    layer = _layer(match, roles, kind, (first.shape, second.shape), shape, padding)
    kernel = cost.convolution(
        kind,
        flops,
        (match.size(*channels[0]), match.size(*channels[1])),
        match.size(*roles.group),
        prod(match.sizes("k")),
        first.size + second.size + prod(shape),
        prod(shape),
        by_vectors(kind, layer),
        few_as_they_are(kind, layer) and not is_small(layer),
    )
    copies = [cost.copy(x.size, *x.innermost).seconds for x in (first, second) if x.run < x.size]
    seconds = sum(copies) + _longer(layer, kind, bool(copies)) * kernel.seconds
    if is_small(layer):
        entries = match.size(*roles.summed, *roles.a) * prod(layer.o) * prod(layer.k)
        seconds += cost.copy(entries, layer.o[-1]).seconds
    else:
        seconds += cost.now().primitive
        apart = "input gradient" if prod(layer.k) == 1 else "weight gradient"
        seconds += cost.now().weight_entry * layer.entries.w if kind == apart else 0.0
    copied = sum(array.size for array in (first, second) if array.run < array.size)
    held = cost.item() * copied + scratch(kind, layer, cost.item(), torch.get_num_threads())
    return replace(kernel, seconds=seconds, scratch=held)


def _longer(layer: Convolution, kind: str, copied: bool) -> float:
    """How many times as long as its flops a kernel takes.

    A kernel with more positions than outputs takes torch's slow paths; with a single output it is a
    matrix product, if nothing is in the way. Input gradients of strided windows take longer, and
    longest where these lie apart.
    """
    outputs, taps = prod(layer.o), prod(layer.k)
    in_the_way = outputs > 1 or layer.dilated or copied
    if taps > outputs and in_the_way and layer.channels != (1, 1):
        return 5.0
    if kind != "input gradient" or not layer.strided:
        return 1.0
    far = all(stride >= size for stride, size in zip(layer.strides, layer.k, strict=True))
    return 1.6 if far else 1.3


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
