"""Windows: a pattern that solves for a leg becomes an affine view of the tensor that holds it."""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from tnconv.codegen.lowering.covers import Cover
from tnconv.codegen.lowering.values import overlaps
from tnconv.codegen.routes.displaced_products import laid_out
from tnconv.diagrams.affine import Leg, Pattern, Tensor
from tnconv.diagrams.network import TensorNetwork
from tnconv.simplify.rules import implied
from tnconv.simplify.view_rules import solve_for

GROWN = 2  # products before windows are added up: entries, in times of the largest operand (0006)
MOST_OVERLAPS = 128  # shifted parts to add, one line of source for each


def window(cover: Cover) -> Iterator[Cover]:
    """Patterns that solve for a leg of one tensor (or of the result) become its windows.

    Reading overlapping windows is a strided view (im2col, copied only where a kernel needs it);
    writing them is shift and accumulate (col2im). Both can be had for a convolution: products of
    few channels are made at every input, and then added into place. Windows of an image with its
    channels last can be read from a contiguous copy of it, which is smaller than they are.
    """
    yield from _windows(cover)
    if (copied := _copied(cover)) is not None:
        yield from _windows(copied)


def _windows(cover: Cover) -> Iterator[Cover]:
    tn, first = cover.network, cover.pattern
    assert first is not None
    largest = max((prod(shape) for shape in tn.operands.values()), default=0)
    for network in (tn, *_in_reverse(tn)):
        solved = _solved(network, first)
        if solved is None or overlaps(solved.result, solved.sizes) > MOST_OVERLAPS:
            continue
        products = prod(solved.sizes[leg] for leg in solved.result.legs)
        if network is tn or products <= GROWN * largest:
            yield replace(cover, network=solved, routes=(*cover.routes, "window"))


def _copied(cover: Cover) -> Cover | None:
    """With a contiguous copy of the tensor that the first pattern reads, if channels are last."""
    assert cover.pattern is not None
    _, at = window_of(cover.network, cover.pattern) or ("", None)
    node = None if at is None else cover.network.nodes[at]
    if not isinstance(node, Tensor) or not cover.arrays[node.name].is_channels_last:
        return None
    writer, copy = laid_out(cover.writer, cover.arrays[node.name])
    return replace(cover, arrays={**cover.arrays, node.name: copy}, writer=writer)


def _solved(tn: TensorNetwork, first: int) -> TensorNetwork | None:
    """With windows of one tensor, or of the result, in place of a pattern and others like it."""
    if (found := window_of(tn, first)) is None:
        return None
    holder = found[1]
    at: int | None = first
    while at is not None:
        leg, _ = window_of(tn, at) or ("", None)
        tn = solve_for(tn, at, leg)
        if holder is not None and at < holder:
            holder -= 1
        windows = ((p, window_of(tn, p)) for p, _ in tn.patterns)
        at = next((p for p, found in windows if found and found[1] == holder), None)
    return _without_implied_masks(tn)


def _in_reverse(tn: TensorNetwork) -> Iterator[TensorNetwork]:
    """With kernels in reverse, so that patterns of inputs are windows of the result.

    ``i = o + d·k - p`` is ``o = i + d·(K - 1 - k) - (d·(K - 1) - p)``.
    """
    reverse: dict[Leg, int] = {}
    for at, pattern in tn.patterns:
        alone = [leg for leg in pattern.legs if tn.holders[leg] == (at,) and leg in tn.open_legs]
        steps = dict(pattern.terms)
        if pattern.value is None or len(steps) < 3 or len(alone) != 1 or abs(steps[alone[0]]) != 1:
            return
        alike = [leg for leg, a in pattern.terms if a * steps[alone[0]] > 0 and leg not in alone]
        reverse |= {leg: tn.sizes[leg] - 1 for leg in alike}
    if reverse and not reverse.keys() & {*tn.open_legs}:
        for leg, last in reverse.items():
            tn = tn.substitute(leg, last, {leg: -1}, {leg: last + 1})
        yield tn


def window_of(tn: TensorNetwork, at: int) -> tuple[Leg, int | None] | None:
    """The leg i of ``i = Σ a·leg - p``, all a > 0, and the one other node that holds it.

    None stands for the result.
    """
    pattern = tn.nodes[at]
    assert isinstance(pattern, Pattern)
    if pattern.value is None or len(pattern.terms) < 2:
        return None
    for leg, a in pattern.terms:
        if abs(a) == 1 and all(a * b < 0 for other, b in pattern.terms if other != leg):
            others = [p for p in tn.holders[leg] if p != at]
            if leg in tn.open_legs and not others:
                return leg, None
            if leg not in tn.open_legs and len(others) == 1:
                if isinstance(tn.nodes[others[0]], Tensor):
                    return leg, others[0]
    return None


def window_on(tn: TensorNetwork, at: int) -> tuple[int, Leg, dict[Leg, int], int] | None:
    """For a pattern ``i = Σ step·leg - padding`` of three legs: i's tensor, i, steps, padding."""
    pattern = tn.nodes[at]
    if not isinstance(pattern, Pattern) or len(pattern.terms) != 3:
        return None
    i, tensor = window_of(tn, at) or ("", None)
    if tensor is None or pattern.value is None:
        return None
    sign = -dict(pattern.terms)[i]
    steps = {leg: sign * a for leg, a in pattern.terms if leg != i}
    return tensor, i, steps, sign * pattern.value


def _without_implied_masks(tn: TensorNetwork) -> TensorNetwork:
    while (after := implied(tn)) is not None:
        tn = after
    return tn
