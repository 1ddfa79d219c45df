"""What torch's convolution kernels hold beside their results, on processors.

Single precision is oneDNN's, but for single small samples; the rest is unfolded and multiplied.
"""

from collections.abc import Iterator, Mapping
from math import prod

from tnconv.codegen.prices import onednn
from tnconv.codegen.prices.native_shapes import Convolution, Shape
from tnconv.codegen.prices.onednn import Held

SMALL = 20480  # entries of a single sample that oneDNN is not given ...
SHORT = 3  # ... if its kernel has at most so many taps in the last dimensions
MANY = 16  # samples that oneDNN is always given
SINGLE = 4  # bytes of an entry in single precision; halves are oneDNN's on some processors only


def scratch(kind: str, c: Convolution, item: int, threads: int) -> int:
    """Bytes that a kernel of a kind holds beside its result, for items of a size.

    Gradients also hold an empty tensor of their size, which tells torch the shape.
    """
    result = c.entries.of(kind)
    held = [result]
    if item <= SINGLE and _is_onednns(c, threads):
        held += ONEDNN[kind](c, threads)
    if item != SINGLE or not _is_onednns(c, threads):
        held += UNFOLDING[kind](c, threads)
    return item * (max(held) - result + (0 if kind == "convolution" else result))


def _is_onednns(c: Convolution, threads: int) -> bool:
    """Torch's own conditions."""
    several = c.samples >= MANY or _last(c.k) != (1, 1) or threads > 1
    return not is_small(c) and (several or c.strided or c.dilated)


def is_small(c: Convolution) -> bool:
    """Whether torch unfolds a single sample and multiplies matrices: of volumes slices count."""
    single = c.samples == 1 and not c.grouped and min(_last(c.k)) <= SHORT
    return single and prod(c.x[:4]) <= SMALL


def _last(kernel: Shape) -> Shape:
    """Two dimensions: signals are images of one row to torch."""
    return (1, *kernel)[-2:]


def _forward(c: Convolution, threads: int) -> Iterator[int]:
    part = c.entries.x // c.groups if c.samples > 1 else 0
    return _by_groups(c, c.entries.y, part, _unfolded(c))


def _weight_gradient(c: Convolution, threads: int) -> Iterator[int]:
    part = (c.entries.x + c.entries.y) // c.groups if c.samples > 1 else 0
    return _by_groups(c, c.entries.w, part, _unfolded(c))


def _input_gradient(c: Convolution, threads: int) -> Iterator[int]:
    """Images are unfolded in place of the result."""
    part = (c.entries.x + c.entries.y) // c.groups if c.samples > 1 else 0
    return _by_groups(c, c.entries.x, part, _columns(c) if c.volumes or c.dilated else 0)


def _by_groups(c: Convolution, result: int, part: int, unfolded: int) -> Iterator[int]:
    """Groups, but of volumes, are computed from parts of the operands in turn, then joined."""
    if not c.grouped or (c.volumes and not c.dilated):
        yield result + unfolded
    else:
        yield from (result + part + unfolded, 2 * result)


def _unfolded(c: Convolution) -> int:
    """What single pixels are read from is as good as unfolded, but for groups of volumes."""
    as_it_is = c.pointwise and not (c.strided or c.dilated or (c.volumes and c.grouped))
    return 0 if as_it_is else _columns(c)


def _columns(c: Convolution) -> int:
    """All samples at once, but dilated ones in turn; a group, but of volumes all."""
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
