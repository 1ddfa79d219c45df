"""Gradients of samples where the batch meets what all samples share.

A table of positions, a class token, the weight of a projection: autograd gives the sum over samples
of their gradients. Just above, at the operation that joins the shared tensor with the batch, the
gradient still belongs to samples. There it is split, handed through that one operation for every
sample, and pulled through the shared part below, all in the backward pass that is going on: the
model does not run again.

The engine, not an operation, sums a gradient over broadcast dimensions, so an operation that is
called by itself shows the gradient before that sum.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from tnconv.models.coded import all_owned
from tnconv.models.operation_graph import Graph
from tnconv.models.sample_maps import (
    Batch,
    Maps,
    Owned,
    SampleMap,
    Silent,
    along,
    front,
    owners,
    resized,
    unfolded,
)
from tnconv.recursions.step import node_name

LIGHT = ("Repeat", "Cat", "Stack", "Slice", "Select", "Index", "Embedding", "View", "Sum", "Where")


class Unsupported(NotImplementedError):
    """A graph whose meeting points cannot be used, and why."""


@dataclass(frozen=True)
class Point:
    """An operation whose outputs belong to samples, and its input that belongs to all of them."""

    node: Node
    at: int
    maps: Maps

    @property
    def below(self) -> GradientEdge:
        """Where the gradient of that input goes."""
        node, output = self.node.next_functions[self.at]
        assert node is not None
        return GradientEdge(node, output)


def points(graph: Graph, end: Node, maps: Mapping[Node, Maps]) -> tuple[list[Point], set[Node]]:
    """Where gradients to an end stop to belong to samples: every way there has one such point.

    And the operations below these, which all samples share.

    Raises:
        KeyError: an operation whose maps are needed, and not given.
        Unsupported: a way without one, or with several.
    """
    found, shared, waiting = [], {end}, [end]
    while waiting:
        node = waiting.pop()
        if not graph.parents[node]:
            raise Unsupported("an output of the model that belongs to no sample depends on it")
        for parent, at in graph.parents[node]:
            if all_owned(maps[parent]):
                found.append(Point(parent, at, maps[parent]))
            elif parent not in shared:
                shared.add(parent)
                waiting.append(parent)
    beside = {
        below
        for node in shared - {end}
        for below, _ in node.next_functions
        if below is not None and below not in shared
    }
    if beside and not beside.isdisjoint(graph.above([end])):
        raise Unsupported("samples are put together and taken apart again on the way to it")
    return list(dict.fromkeys(found)), shared


def is_light(point: Point) -> bool:
    """Whether an operation moves entries about, so that a call for each sample takes no time."""
    return node_name(point.node).startswith(LIGHT)


def cotangent(
    point: Point, grads: Sequence[Tensor | None], samples: int
) -> tuple[Tensor | None, bool]:
    """``(n, *x)``: the gradient of an operation's input x for every sample.

    And whether the operation was called for one sample after another.

    Raises:
        Unsupported: private parts of torch that are not as they were, or sizes that do not fit.
    """
    shape, given = _shape(point.below), [g for g in grads if g is not None]
    if not given:
        return None, False
    if samples == 1:
        alone = _input(point, grads)
        return None if alone is None else alone.sum_to_size(shape)[None], False
    if len(grads) != len(point.maps):
        raise Unsupported(f"{node_name(point.node)} has another number of outputs")
    pairs = zip(point.maps, grads, strict=True)
    known = [resized(m, tuple(g.shape), samples) for m, g in pairs if g is not None]
    if any(each is None for each in known):
        raise Unsupported(f"a gradient after {node_name(point.node)} has another size than before")
    (g, *others), own = given, known[0]
    if not others and isinstance(own, Owned):
        if node_name(point.node).startswith("Expand") and _sums_over(own, g, shape):
            return _reduced(unfolded(g, own, samples), shape), False
        if (product := _product(point, g, own, samples)) is not None:
            return product, False
        if _sums_over(own, g, shape) and not _is_product(point):
            whole = _input(point, grads)
            if whole is None:
                return None, False
            if whole.shape == g.shape != shape:
                return _reduced(unfolded(whole, own, samples), shape), False
    return _one_by_one(point, grads, shape, samples), True


def pulled(point: Point, each: Tensor, ends: Sequence[GradientEdge]) -> list[Tensor | None]:
    """Gradients ``(n, *end)`` at some ends of what samples share."""
    below, found = point.below, dict[int, Tensor | None]()
    rest = []
    for at, end in enumerate(ends):
        if (end.node, end.output_nr) == (below.node, below.output_nr):
            found[at] = each
        elif _is_transpose(below, end):
            found[at] = each.mT
        else:
            rest.append(at)
    if rest:
        inputs = [ends[at] for at in rest]
        found.update(zip(rest, _batched_pull(below, inputs, each), strict=True))
    return [found[at] for at in range(len(ends))]


def _is_transpose(start: GradientEdge, end: GradientEdge) -> bool:
    """Whether a matrix is the transpose of another one, as weights are in products."""
    (below,) = start.node.next_functions if node_name(start.node) == "TBackward0" else (None,)
    return below == (end.node, end.output_nr)


def _batched_pull(
    start: GradientEdge, ends: Sequence[GradientEdge], each: Tensor
) -> list[Tensor | None]:
    how = {"retain_graph": True, "allow_unused": True}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            got = torch.autograd.grad([start], ends, [each], is_grads_batched=True, **how)
        return list(got)
    except (RuntimeError, NotImplementedError):  # no rule for a batch of gradients
        rows = [torch.autograd.grad([start], ends, [g], **how) for g in each]
    columns = zip(*rows, strict=True)
    return [None if any(g is None for g in column) else torch.stack(column) for column in columns]


def _input(point: Point, grads: Sequence[Tensor | None]) -> Tensor | None:
    """What an operation called by itself makes of gradients, for the point's input.

    Where that was broadcast, in the shape of the output: an entry for each of the output's.
    """
    found = point.node(*grads)  # type: ignore[operator]
    result = found[point.at] if isinstance(found, tuple) else found
    return result if isinstance(result, Tensor) else None


def _shape(edge: GradientEdge) -> tuple[int, ...]:
    variable = getattr(edge.node, "variable", None)
    if variable is not None:
        return tuple(variable.shape)
    try:
        return tuple(edge.node._input_metadata[edge.output_nr].shape)
    except AttributeError:
        raise Unsupported("this version of torch does not show the shapes in its graph") from None


def _sums_over(known: Owned, g: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a shape, broadcast to a gradient's, had no dimension of samples."""
    at = known.dim - (g.dim() - len(shape))
    return len(shape) <= g.dim() and (at < 0 or shape[at] == 1)


def _reduced(each: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sums over what was broadcast, for every sample."""
    extra = each.dim() - 1 - len(shape)
    each = each.sum(tuple(range(1, 1 + extra))) if extra else each
    dims = tuple(at for at, size in enumerate(shape, 1) if size == 1 and each.shape[at] != 1)
    return each.sum(dims, keepdim=True) if dims else each


def _is_product(point: Point) -> bool:
    name = node_name(point.node)
    factors = {"MmBackward0": 0, "AddmmBackward0": 1}
    return name in factors and point.at >= factors[name]


def _product(point: Point, g: Tensor, known: Owned, samples: int) -> Tensor | None:
    """``gw[n] = x[n]ᵀ g[n]`` of ``x w``, or ``g[n] x[n]ᵀ`` of ``w x``, with x the samples' rows."""
    if not _is_product(point):
        return None
    node: torch.autograd.graph.Node = point.node
    plain = node_name(node) == "MmBackward0"
    second = point.at == (1 if plain else 2)
    other = ("_saved_self" if plain else "_saved_mat1") if second else "_saved_mat2"
    x, alpha = getattr(node, other, None), getattr(node, "_saved_alpha", 1)
    if not isinstance(x, Tensor) or known.dim != (0 if second else 1):
        return None
    dim = known.dim
    x, g = (t if t.dtype == g.dtype else t.to(g.dtype) for t in (x, g))
    rows, after = _columns(x, known, dim, samples), _columns(g, known, dim, samples)
    if second:  # (n, t, c), (n, t, d)
        return alpha * (rows.mT.conj() @ after)
    return alpha * (after.mT @ rows.conj())  # w x: (n, t, d), (n, t, c)


def _columns(matrix: Tensor, known: Owned, dim: int, samples: int) -> Tensor:
    """``(n, t, c)``: a sample's rows of a matrix whose dimension ``dim`` has the samples."""
    rows = matrix if dim == 0 else matrix.mT
    at = Batch(0) if isinstance(known, Batch) else type(known)(0, known.t, known.order)
    each = front(rows, at, samples)
    return each.unsqueeze(1) if isinstance(known, Batch) else each


def _one_by_one(
    point: Point, grads: Sequence[Tensor | None], shape: tuple[int, ...], samples: int
) -> Tensor | None:
    """An operation called with each sample's part of the gradients, the others zero."""
    device = next(g.device for g in grads if g is not None)
    rows = []
    for n in range(samples):
        masked = [
            g if g is None or isinstance(m, Silent) else g * _mask(m, g, n, samples, device)
            for m, g in zip(point.maps, grads, strict=True)
        ]
        found = _input(point, masked)
        if found is None:
            return None
        rows.append(found.sum_to_size(shape))
    return torch.stack(rows)


def _mask(m: SampleMap, g: Tensor, n: int, samples: int, device: torch.device) -> Tensor:
    known = resized(m, tuple(g.shape), samples)
    assert isinstance(known, Owned)
    own = owners(known, tuple(g.shape), samples, device) == n
    return along(own, known, tuple(g.shape)).to(g.dtype)
