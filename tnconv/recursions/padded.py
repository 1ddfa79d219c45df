"""Convolutions of padded inputs, of which one window can read an entry twice.

Where a border repeats entries, J is not the convolution with squared weights, but

    ``J[o, i]² = Σ_{k,k'} w[k] w[k'] [src(o, k) = i] [src(o, k') = i]``,

with src the entry that tap k at position o reads. Pairs of different taps meet at borders alone.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from tnconv.recursions.memory_saving import torch_step
from tnconv.recursions.multilinear import convolution
from tnconv.recursions.step import Flow, Flows, Rule, Step, operation

MODES = {"ReflectionPad": "reflect", "ReplicationPad": "replicate"}
Pair = tuple[int, int, tuple[int, ...], tuple[int, ...]]
"""Taps k and k', the positions o at which both read one entry, and that entry."""


def rule(node: Any, pad: Any) -> Rule | None:
    """How flows go backwards through a padded convolution, if its padding repeats entries.

    Raises:
        NotImplementedError: a circular padding by which a window sees an entry twice.
    """
    name = operation(pad)
    mode = MODES.get(name[:-2])
    if mode is not None and not node._saved_transposed:
        return partial(_padded, pad, mode)
    if name == "CopySlices":
        extents = [
            d * (k - 1) + 1
            for d, k in zip(node._saved_dilation, node._saved_weight.shape[2:], strict=True)
        ]
        sizes = _before_copies(pad)[-len(extents) :]
        if any(extent > size for extent, size in zip(extents, sizes, strict=True)):
            raise NotImplementedError(
                f"a circular convolution over windows of {tuple(extents)} reads entries of an "
                f"input of {tuple(sizes)} twice; expected windows as large as the input at most"
            )
    return None


def _padded(pad: Any, mode: str, step: Step) -> Flows:
    step = torch_step(step)
    inner, *parameters = convolution(step)
    if inner is None:
        return (None, *parameters)
    through = Step(pad, (), (), ())
    (s,) = through.pulled([inner.diagonal])[:1]
    assert s is not None
    s, g = s.contiguous(), inner.gradient
    if g is not None:
        (g,) = through.pulled([g])[:1]
    _add_pairs(s, step, _taps(step.node, s, step.flow.diagonal, pad, mode))
    return (Flow(g, s), *parameters)


def _taps(node: Any, before: Tensor, after: Tensor, pad: Any, mode: str) -> list[list[Pair]]:
    """The pairs of taps of each dimension."""
    sides, sizes = pad._saved_padding, node._saved_weight.shape[2:]
    dims, found = len(sizes), []
    for at, kernel in enumerate(sizes):
        left, right = sides[2 * (dims - 1 - at) :][:2]
        inputs, outputs = before.shape[2 + at], after.shape[2 + at]
        how = node._saved_stride[at], node._saved_dilation[at], node._saved_padding[at]
        found.append(_pairs(mode, inputs, left, right, kernel, outputs, *how))
    return found


@lru_cache(maxsize=1024)
def _pairs(
    mode: str, inputs: int, left: int, right: int, kernel: int, outputs: int, *how: int
) -> list[Pair]:
    stride, dilation, padding = how
    last = inputs - 1

    def source(o: int, k: int) -> int | None:
        at = o * stride + k * dilation - padding
        if not 0 <= at < left + inputs + right:
            return None
        at -= left
        if mode == "replicate":
            return min(max(at, 0), last)
        return last - abs(last - abs(at))

    def met(k: int, other: int) -> Iterator[tuple[int, int]]:
        for o in range(outputs):
            at = source(o, k)
            if at is not None and at == source(o, other):
                yield o, at

    found = []
    for k, other in product(range(kernel), repeat=2):
        where = list(met(k, other))
        if where:
            positions, entries = zip(*where, strict=True)
            found.append((k, other, positions, entries))
    return found


def _add_pairs(s: Tensor, step: Step, taps: Sequence[Sequence[Pair]]) -> None:
    """Add what pairs of different taps add to the sum of squares."""
    w, after, groups = step.saved("weight"), step.flow.diagonal, step.node._saved_groups
    flat, sizes = s.flatten(2), s.shape[2:]
    for each in product(*taps):
        if all(k == other for k, other, _, _ in each):
            continue
        first, second, positions, entries = zip(*each, strict=True)
        both = w[(..., *first)] * w[(..., *second)]  # (g·d, c)
        at = torch.meshgrid(*[torch.tensor(p, device=s.device) for p in positions], indexing="ij")
        index: Any = (slice(None), slice(None), *at)
        read = after[index]
        read = read.reshape(len(read), groups, read.shape[1] // groups, -1)
        both = both.reshape(groups, both.shape[0] // groups, -1)
        added = torch.einsum("ngdo,gdc->ngco", read, both)
        to = torch.zeros((), dtype=torch.long, device=s.device)
        for size, one in zip(sizes, entries, strict=True):
            to = to.unsqueeze(-1) * size + torch.tensor(one, device=s.device)
        flat.index_add_(2, to.flatten(), added.flatten(1, 2))


def _before_copies(node: Node) -> tuple[int, ...]:
    """The shape of what was copied, slice by slice."""
    at = 0
    while operation(node) in ("CopySlices", "Slice"):
        node, at = [(n, number) for n, number in node.next_functions if n is not None][-1]
        if hasattr(node, "variable"):
            return tuple(node.variable.shape)
    return tuple(node._input_metadata[at].shape)
