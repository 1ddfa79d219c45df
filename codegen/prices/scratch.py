"""Memory of torch's convolution kernels on processors, beside their results.

oneDNN computes float32, except for single small samples; everything else is im2col with GEMM.
"""

from collections.abc import Iterator, Mapping
from math import prod

from tnconv.codegen.prices import onednn
from tnconv.codegen.prices.native_shapes import Convolution, Shape
from tnconv.codegen.prices.onednn import Held

SMALL = 20480  # entries up to which a single sample is not given to oneDNN ...
SHORT = 3  # ... if its kernel has at most so many taps in one of the last dimensions
MANY = 16  # samples from which on oneDNN computes every geometry
SINGLE = 4  # bytes of an entry in float32; oneDNN computes halves on some processors only


def scratch(kind: str, c: Convolution, item: int, threads: int) -> int:
    """Bytes that a kernel holds beside its result.

    Gradients also hold an empty tensor of their size, which tells torch the shape.

    Args:
        kind: ``"convolution"``, ``"weight gradient"`` or ``"input gradient"``.
        c: the shapes.
        item: bytes of an entry.
        threads: that compute.
    """
    result = c.entries.of(kind)
    held = [result]
    if item <= SINGLE and _is_onednns(c, threads):
        held += ONEDNN[kind](c, threads)
    if item != SINGLE or not _is_onednns(c, threads):
        held += UNFOLDING[kind](c, threads)
    return item * (max(held) - result + (0 if kind == "convolution" else result))


def _is_onednns(c: Convolution, threads: int) -> bool:
    """Whether torch gives it to oneDNN, by its own conditions."""
    several = c.samples >= MANY or _last(c.k) != (1, 1) or threads > 1
    return not is_small(c) and (several or c.strided or c.dilated)


def is_small(c: Convolution) -> bool:
    """Whether torch computes a single sample by im2col and GEMM; volumes count by their slices."""
    single = c.samples == 1 and not c.grouped and min(_last(c.k)) <= SHORT
    return single and prod(c.x[:4]) <= SMALL


def _last(kernel: Shape) -> Shape:
    """The last two dimensions: signals are images of one row to torch."""
    return (1, *kernel)[-2:]


def _forward(c: Convolution, threads: int) -> Iterator[int]:
    part = c.entries.x // c.groups if c.samples > 1 else 0
    return _by_groups(c, c.entries.y, part, _unfolded(c))


def _weight_gradient(c: Convolution, threads: int) -> Iterator[int]:
    part = (c.entries.x + c.entries.y) // c.groups if c.samples > 1 else 0
    return _by_groups(c, c.entries.w, part, _unfolded(c))


def _input_gradient(c: Convolution, threads: int) -> Iterator[int]:
    """Only volumes and dilated convolutions hold columns before they are added into the result."""
    part = (c.entries.x + c.entries.y) // c.groups if c.samples > 1 else 0
    return _by_groups(c, c.entries.x, part, _columns(c) if c.volumes or c.dilated else 0)


def _by_groups(c: Convolution, result: int, part: int, unfolded: int) -> Iterator[int]:
    """Groups are computed from slices of the operands in turn, then joined; not so for volumes."""
    if not c.grouped or (c.volumes and not c.dilated):
        yield result + unfolded
    else:
        yield from (result + part + unfolded, 2 * result)


def _unfolded(c: Convolution) -> int:
    """Windows of one pixel need no im2col matrix, except in groups of volumes."""
    as_it_is = c.pointwise and not (c.strided or c.dilated or (c.volumes and c.grouped))
    return 0 if as_it_is else _columns(c)


def _columns(c: Convolution) -> int:
    """The im2col matrix of all samples and one group.

    Dilated convolutions take one sample at a time, volumes all groups at once.
    """
    groups = c.groups if c.volumes and not c.dilated else 1
    samples = 1 if c.dilated else c.samples
    return samples * groups * c.channels[0] * prod(c.k) * prod(c.o)


ONEDNN: Mapping[str, Held] = {
    "convolution": onednn.forward,
    "weight gradient": onednn.weight_gradient,
    "input gradient": onednn.input_gradient,
}
UNFOLDING: Mapping[str, Held] = {
    "convolution": _forward,
    "weight gradient": _weight_gradient,
    "input gradient": _input_gradient,
}
