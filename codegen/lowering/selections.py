"""Selections lowered: slices gathered early and scattered late, counts, or dense 0/1 matrices."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from tnconv.codegen.lowering.covers import Cover
from tnconv.codegen.lowering.operations import Operation
from tnconv.codegen.lowering.pairs import pair
from tnconv.codegen.lowering.strided import LIKE, Strided
from tnconv.codegen.lowering.values import Value, read
from tnconv.codegen.lowering.writer import Writer
from tnconv.codegen.prices import cost
from tnconv.diagrams.affine import Axis, Leg, Node, Selection, Tensor, View

SELECT_ROWS = Operation("index_select", lambda x, index, dim: f"{x}.index_select({dim}, {index})")
SCATTER = Operation(
    "scatter",
    lambda x, index, shape, dim: f"{x}.new_zeros({shape}).index_add({dim}, {index}, {x})",
)
COUNTS = Operation(
    "counts",
    lambda like, index, size, rows: (
        f"{like}.new_zeros({size}).index_add(0, {index}, {like}.new_ones({rows}))"
    ),
)
ONE_HOT = Operation(
    "one_hot",
    lambda like, index, shape: f"{like}.new_zeros({shape}).scatter(1, {index}.unsqueeze(1), 1.0)",
)


@dataclass(frozen=True)
class Selected:
    """The node ``S[r, i] = [index[r] = i]`` at a position, read by r and by the axis of i."""

    cover: Cover
    at: int
    index: Strided
    r: Leg
    axis: Axis

    @property
    def alone(self) -> bool:
        """Whether nothing else holds r: then S counts how often positions are listed."""
        return not self.cover.needed(self.r, self.at)

    @property
    def plain(self) -> Leg | None:
        """The leg i, if the axis is it."""
        return self.axis.plain(self.cover.network.sizes)

    def holders(self, leg: Leg) -> tuple[int, ...]:
        """The other nodes that hold a leg."""
        return tuple(at for at in self.cover.network.holders[leg] if at != self.at)


def selected(cover: Cover) -> Iterator[Cover]:
    """Covers without the first selection whose result needs no `scatter` in the end."""
    at = cover.selection
    assert at is not None
    found: list[Cover] = []
    if (one := _recognised(cover, at)) is not None:
        gathered = [gather(one)] if one.plain not in cover.network.open_legs else []
        ways = (*gathered, _masked(one), _spread(one))
        found = [after for after in ways if after is not None]
    yield from found or [_one_hot(cover, at)]


def _recognised(cover: Cover, at: int) -> Selected | None:
    """The selection at a position, if its first axis is r, plainly."""
    node = cover.network.nodes[at]
    assert isinstance(node, Selection)
    if len(node.view.axes) != 2:
        return None
    rows, axis = node.view.axes
    r = rows.plain(cover.network.sizes)
    if r is None or rows.size != node.shape[0] or r in dict(axis.terms):
        return None
    return Selected(cover, at, cover.indices[node.name], r, axis)


def gather(one: Selected) -> Cover | None:
    """``Σ_r S[r, i] Π T[i, ..] = Σ_r Π T[index[r], ..]`` where tensors hold i, and no pattern.

    Where i is open in the result, so is r: `scatter` puts its slices where they belong.
    """
    cover, tn, i = one.cover, one.cover.network, one.plain
    if i is None or not one.alone or not (holders := one.holders(i)):
        return None
    if not all(type(tn.nodes[at]) is Tensor for at in holders):
        return None
    sizes = {leg: size for leg, size in tn.sizes.items() if leg != i}
    nodes: dict[int, Node] = dict(enumerate(tn.nodes))
    for at in holders:
        cover, whole = cover.value(at)
        dim = whole.legs.index(i)
        shape = (*whole.array.shape[:dim], sizes[one.r], *whole.array.shape[dim + 1 :])
        kernel = cost.copy(prod(shape), prod(shape[dim + 1 :]))
        call = SELECT_ROWS, [whole.array, one.index], shape, kernel, f"listed positions of {i}"
        writer, array = cover.writer.run(*call, (dim,))
        legs = (one.r if leg == i else leg for leg in whole.legs)
        name, arrays = cover.named(array)
        nodes[at] = Tensor(name, View.of(sizes, *legs))
        cover = replace(cover, writer=writer, arrays=arrays)
    del nodes[one.at]
    result = tn.result
    if i in tn.open_legs:
        held = {leg for node in nodes.values() for leg in node.legs}
        sizes = {leg: size for leg, size in sizes.items() if leg in held}
        result = View.of(sizes, *_slices(one))
    network = tn.with_(nodes.values(), result, sizes)
    return replace(cover, network=network, routes=(*cover.routes, "gather"))


def _slices(one: Selected) -> list[Leg]:
    """The open legs that nodes hold, in the result's order, with r in the place of i."""
    tn = one.cover.network
    return [one.r if leg == one.plain else leg for leg in tn.result.legs if tn.holders[leg]]


def opened(cover: Cover) -> tuple[Selected, Cover] | None:
    """The first selection and the network of its slices, where the result holds i."""
    assert cover.selection is not None
    one = _recognised(cover, cover.selection)
    if one is None or one.plain not in cover.network.open_legs:
        return None
    body = gather(one)
    return None if body is None else (one, replace(body, network=body.network.with_(scale=1)))


def scatter(one: Selected, writer: Writer, slices: Value) -> Cover:
    """``Σ_r S[r, i] T[r, ..]`` for the slices T of the whole network: added where they belong."""
    writer, value = _added(one, writer, slices)
    every = tuple(range(len(one.cover.network.nodes)))
    return one.cover.put(writer, every, value, "gather")


def _added(one: Selected, writer: Writer, slices: Value) -> tuple[Writer, Value]:
    """``Σ_r S[r, i] T[r, ..]``, read through the axis of i."""
    array, dim, sizes = slices.array, slices.legs.index(one.r), one.cover.network.sizes
    shape = (*array.shape[:dim], one.axis.size, *array.shape[dim + 1 :])
    kernel = cost.copy(prod(shape) + array.size, prod(shape[dim + 1 :]))
    call = SCATTER, [array, one.index], shape, kernel, "slices at the listed positions"
    writer, array = writer.run(*call, (shape, dim))
    axes = (one.axis if leg == one.r else Axis(sizes[leg], 0, ((leg, 1),)) for leg in slices.legs)
    return read(writer, array, View(array.shape, tuple(axes)), sizes)


def _spread(one: Selected) -> Cover | None:
    """``Σ_r S[r, i] T[r, ..]`` for the one tensor that holds r: it is given at some positions."""
    cover, tn, holders = one.cover, one.cover.network, one.holders(one.r)
    if one.r in tn.open_legs or len(holders) != 1 or type(tn.nodes[holders[0]]) is not Tensor:
        return None
    if set(tn.nodes[holders[0]].legs) & dict(one.axis.terms).keys():
        return None
    cover, slices = cover.value(holders[0])
    writer, value = _added(one, cover.writer, slices)
    return cover.put(writer, (one.at, *holders), value, "scatter")


def _masked(one: Selected) -> Cover | None:
    """``m[i] = Σ_r S[r, i]``, how often i is listed, multiplied into a tensor that holds i.

    Routes join two tensors, so that m had better not be a third; without one, m stays.
    """
    if not one.alone:
        return None
    cover, tn = one.cover, one.cover.network
    size, rows = one.axis.size, tn.sizes[one.r]
    kernel = cost.copy(size + rows, rows)
    call = COUNTS, [LIKE, one.index], (size,), kernel, "how often positions are listed"
    writer, array = cover.writer.run(*call, (size, rows))
    writer, counts = read(writer, array, View(array.shape, (one.axis,)), tn.sizes)
    cover = replace(cover, writer=writer)
    for at, node in enumerate(tn.nodes):
        if type(node) is Tensor and counts.legs and set(counts.legs) <= set(node.legs):
            cover, held = cover.value(at)
            writer, held = pair(cover.writer, held, counts, tuple(tn.sizes))
            return cover.put(writer, (at, one.at), held, "mask")
    return cover.put(writer, (one.at,), counts, "mask")


def _one_hot(cover: Cover, at: int) -> Cover:
    """S as a dense matrix: always possible."""
    node = cover.network.nodes[at]
    assert isinstance(node, Selection)
    index, shape = cover.indices[node.name], node.view.shape
    kernel = cost.copy(prod(shape), shape[-1])
    call = ONE_HOT, [LIKE, index], shape, kernel, "listed positions as a 0/1 matrix"
    writer, array = cover.writer.run(*call, (shape,))
    writer, value = read(writer, array, node.view, cover.network.sizes)
    return cover.put(writer, (at,), value, "one-hot")
