"""Pooling: sums and means over windows as depthwise convolutions with a constant weight."""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from tnconv.codegen.lowering.covers import Cover
from tnconv.codegen.lowering.operations import Operation
from tnconv.codegen.lowering.strided import LIKE
from tnconv.codegen.prices import cost
from tnconv.codegen.routes.native import native
from tnconv.codegen.routes.window import window_on
from tnconv.diagrams.affine import Leg, Tensor, View

MOST_TAPS = 16  # per dimension
FULL = Operation("full", lambda like, shape, value: f"{like}.new_full({shape}, {value!r})")


def pooling(cover: Cover) -> Iterator[Cover]:
    """``scale Σ_k x[c, i(o, k)] = Σ_k x[c, i(o, k)] w[c, k]``: tap legs that only patterns hold.

    Every entry of w is the scale. On CPUs torch's depthwise kernels take a half to a tenth of the
    time of its average pooling.
    """
    first = cover.pattern
    assert first is not None
    if (found := _box(cover, first)) is None:
        return
    at, network = found[0], cover.network
    others = (_box(cover, other) for other, _ in network.patterns)
    boxes = [box for box in others if box is not None and box[0] == at]
    summed = {i for _, i, _ in boxes}
    held = (leg for leg in network.nodes[at].legs if leg not in summed)
    channels = [leg for leg in held if cover.needed(leg, at)]  # samples as well: torch pads to 16
    legs = (*channels, *(k for *_, k in boxes))
    shape = tuple(network.sizes[leg] for leg in legs)
    if 0 in shape:
        return
    call = FULL, [LIKE], shape, cost.copy(prod(shape), prod(shape)), "weight"
    writer, weight = cover.writer.run(*call, (shape, float(network.scale)))
    name, arrays = cover.named(weight)
    node = Tensor(name, View.of(network.sizes, *legs))
    weighted = network.with_((*network.nodes, node), scale=1)
    for after in native(replace(cover, network=weighted, arrays=arrays, writer=writer)):
        yield replace(after, routes=(*cover.routes, "pooling"))


def _box(cover: Cover, at: int) -> tuple[int, Leg, Leg] | None:
    """A tensor, its leg i, and the tap leg k that nothing holds but this pattern of o, k and i."""
    network = cover.network
    if (window := window_on(network, at)) is None:
        return None
    tensor, i, steps, _ = window
    free = [leg for leg in steps if network.holders[leg] == (at,) and leg not in network.open_legs]
    if len(free) != 1 or not 1 < network.sizes[free[0]] <= MOST_TAPS:
        return None
    return tensor, i, free[0]
