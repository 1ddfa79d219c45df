"""Products of patches with themselves, by our own kernel, on devices where it runs.

``A[g, c, k, c', k'] = Σ_{n,o} x[n, g, c, s·o + d·k - p] x[n, g, c', s·o + d·k' - p]`` of one tensor
x: the kernel finds patches in x, and computes the upper triangle alone. See decision 0030.
"""

from collections.abc import Iterator, Sequence
from math import prod

from tnconv.codegen.lowering.covers import Cover
from tnconv.codegen.lowering.operations import Operation
from tnconv.codegen.lowering.strided import Strided
from tnconv.codegen.lowering.values import Value
from tnconv.codegen.lowering.writer import CONTIGUOUS, Writer
from tnconv.codegen.prices import cost
from tnconv.codegen.routes.shared_windows import shared_dimension
from tnconv.codegen.routes.tap_pairs import Dimension
from tnconv.diagrams.affine import Leg

MOST_DIMENSIONS = 3
HALF = 2  # bytes of numbers that are to be loaded in vectors
VECTOR = 16  # channels that a vector's alignment asks for


def _call(x: str, *numbers: object) -> str:
    names = ("kernel_size", "positions", "stride", "padding", "dilation", "groups")
    pairs = zip(names, numbers, strict=True)
    return f"patch_gram({', '.join([x, *(f'{name}={value}' for name, value in pairs)])})"


PATCH_GRAM = Operation("patch_gram", _call, imports=("patch_gram",))
"""Of an input: taps, positions, strides, zeros before it, dilations; groups."""


def patch_products(cover: Cover) -> Iterator[Cover]:
    """The two equal tensors whose patterns share the first pattern's output leg, and all of these.

    There are two plans where windows leave the input: the kernel masks what is outside, or reads
    an input that was padded before, which makes it faster.
    """
    first = cover.pattern
    assert first is not None
    if not cost.in_use().machine.own_kernels or (found := shared_dimension(cover, first)) is None:
        return
    tensors = found[0]
    others = [shared_dimension(cover, at) for at, _ in cover.network.patterns if at > first]
    dimensions = [found[1], *(other[1] for other in others if other and other[0] == tensors)]
    covered = (*tensors, *(at for x in dimensions for at in x.at))
    cover, a = cover.value(tensors[0])
    cover, b = cover.value(tensors[1])
    if (roles := _roles(cover, a, b, dimensions, covered)) is None:
        return
    samples, group, channels = roles
    inputs = [x.i[0] for x in dimensions]
    lies = a.arranged([*samples, *group, *channels[0], *inputs])
    size = dict(zip(a.legs, a.array.shape, strict=True))
    shape = prod(size[leg] for leg in samples), prod(size[leg] for leg in (*group, *channels[0]))
    writer, array = cover.writer.reshape(lies, [*shape, *(size[leg] for leg in inputs)])
    groups = prod(size[leg] for leg in group)
    writer, array = _in_vectors(writer, array, shape[1] // max(1, groups))
    legs = (*group, *channels[0], *(x.k[0] for x in dimensions))
    legs = (*legs, *channels[1], *(x.k[1] for x in dimensions))
    for padded in (False, True):
        if padded and not any(map(_leaves, dimensions)):
            return
        after, result = _product(writer, array, dimensions, groups, padded)
        after, result = after.reshape(result, [cover.network.sizes[leg] for leg in legs])
        yield cover.put(after, covered, Value(result, legs), "patch gram")


Roles = tuple[list[Leg], list[Leg], tuple[list[Leg], list[Leg]]]
"""Summed samples, groups, and the channels of both tensors."""


def _roles(
    cover: Cover, a: Value, b: Value, dimensions: Sequence[Dimension], covered: tuple[int, ...]
) -> Roles | None:
    """What legs are for, if both tensors are one and have the same legs in the same places."""
    if a.array is not b.array or len(dimensions) > MOST_DIMENSIONS:
        return None
    samples, group, channels = list[Leg](), list[Leg](), (list[Leg](), list[Leg]())
    inputs = {x.i for x in dimensions}
    for one, other in zip(a.legs, b.legs, strict=True):
        if one == other:
            (group if cover.needed(one, *covered) else samples).append(one)
        elif cover.needed(one, *covered) and cover.needed(other, *covered):
            channels[0].append(one)
            channels[1].append(other)
        elif (one, other) not in inputs:
            return None
    return samples, group, channels


def _leaves(x: Dimension) -> bool:
    """Whether windows read zeros around the input."""
    return x.padding > 0 or x.span - x.padding > x.inputs


def _in_vectors(writer: Writer, array: Strided, channels: int) -> tuple[Writer, Strided]:
    """Numbers of sixteen bits with channels innermost, where these fill vectors: a copy."""
    if cost.bytes_per_entry() != HALF or channels % VECTOR or not _is_scattered(array):
        return writer, array
    there = array.channels_moved()
    kernel = cost.copy(there.size, *there.innermost)
    writer, there = writer.run(CONTIGUOUS, [there], there.shape, kernel, "channels innermost")
    return writer, there.channels_moved(back=True)


def _is_scattered(array: Strided) -> bool:
    """Whether these are numbers of sixteen bits that cannot be loaded in vectors of channels."""
    return cost.bytes_per_entry() == HALF and array.channels_moved().run < array.size


def _product(
    writer: Writer, array: Strided, dimensions: Sequence[Dimension], groups: int, padded: bool
) -> tuple[Writer, Strided]:
    """The call, on the input or on one that is padded before."""
    padding = [x.padding for x in dimensions]
    if padded:
        sides = [(p, x.span - p - x.inputs) for p, x in zip(padding, dimensions, strict=True)]
        writer, array = writer.pad(array, [(0, 0), (0, 0), *sides])
        padding = [0] * len(dimensions)
    taps, positions = [x.taps for x in dimensions], [x.outputs for x in dimensions]
    rows = array.shape[1] // max(1, groups) * prod(taps)
    borders = 0 if padded else sum(map(_leaves, dimensions))
    sizes = groups, rows, array.shape[0] * prod(positions), array.size
    kernel = cost.patch_gram(*sizes, borders, _is_scattered(array))
    steps = [x.stride for x in dimensions], padding, [x.dilation for x in dimensions]
    numbers = (*map(tuple, (taps, positions, *steps)), groups)
    comment = "products of patches"
    return writer.run(PATCH_GRAM, [array], (groups, rows, rows), kernel, comment, numbers)
