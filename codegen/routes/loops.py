"""Loops: a network that falls apart along one leg, computed one position at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from tnconv.codegen.lowering.constants import constant_steps
from tnconv.codegen.lowering.covers import Cover
from tnconv.codegen.lowering.strided import Strided, strided
from tnconv.codegen.lowering.turns import (
    ADDED,
    ADDED_TOGETHER,
    FREE,
    JOINED,
    PART,
    PICKED,
    Turns,
    held,
)
from tnconv.codegen.lowering.values import Value
from tnconv.codegen.lowering.writer import Choices, Step, Writer
from tnconv.codegen.prices import cost
from tnconv.diagrams.affine import Leg, Sizes, Tensor, View
from tnconv.diagrams.network import TensorNetwork


@dataclass(frozen=True)
class Loop:
    """``cover`` for one position of ``leg``: operands are parts of size one along ``dims``.

    An ``inner`` loop is one of a turn, over a leg that some operands do not have: what is made of
    these alone is computed before it.
    """

    cover: Cover
    leg: Leg
    dims: dict[str, int]  # for each operand that has the leg its dimension
    joined: bool  # whether the parts of the result are joined, or added
    inner: bool = False

    @property
    def body(self) -> Cover:
        """The network of one position; its result holds the open legs, each as a dimension.

        If the loop's cover follows a script, so does that.
        """
        network, nodes = self.cover.network, []
        for node in network.tensors:
            axes = tuple(x for x in node.view.axes if x.plain(network.sizes) != self.leg)
            if node.name in self.dims:
                view = View(_single(node.view.shape, self.dims, node), axes)
                node = Tensor(node.name, view)
            nodes.append(node)
        patterns = (pattern for _, pattern in network.patterns)
        held = {leg for node in network.nodes for leg in node.legs} - {self.leg}
        sizes = {leg: size for leg, size in network.sizes.items() if leg in held}
        result = View.of(sizes, *self._legs)
        if self.joined:
            result = View((1, *result.shape), result.axes)
        arrays = {name: self._part(name) if name in self.dims else array
                  for name, array in self.cover.arrays.items()}  # fmt: skip
        writer = Writer(script=self.cover.writer.scripted("body") or ())
        return Cover(TensorNetwork((*nodes, *patterns), result, sizes), arrays, writer)

    @property
    def _legs(self) -> tuple[Leg, ...]:
        """The open legs of the body in the result's order."""
        network = self.cover.network
        return tuple(x for x in network.result.legs if network.holders[x] and x != self.leg)

    @property
    def _outermost(self) -> bool:
        """Whether turns are samples: the dimension by which torch's kernels share out a batch."""
        return not any(self.dims.values())

    def _part(self, name: str) -> Strided:
        whole, dim = self.cover.arrays[name], self.dims[name]
        shape = (*whole.shape[:dim], 1, *whole.shape[dim + 1 :])
        return strided(PART, (whole,), (dim,), shape, whole.strides)

    def around(
        self,
        steps: tuple[Step, ...],
        output: Strided,
        routes: tuple[str, ...] = (),
        choices: Choices = (),
    ) -> Cover:
        """The loop over steps for one position that end in ``output``, found by ``routes``.

        The steps were written by these ``choices``.
        """
        parts = tuple(map(self._part, self.dims))
        writer, constants = self.cover.writer.choosing("body", choices), constant_steps(steps)
        if self.inner:
            constants = _apart(steps, parts)
        for step in constants:  # what is the same for all positions comes before the loop
            writer = writer.with_step(step)
        steps = tuple(step for step in steps if step not in constants)
        turns = Turns(parts, steps, (output,))
        network = self.cover.network
        count = network.sizes[self.leg]
        sizes = [network.sizes[leg] for leg in self._legs]
        shape = (count, *sizes) if self.joined else tuple(sizes)
        products = {*turns.products} if self.inner else ()
        timed = tuple(step for step in steps if step.value not in products)
        kernel = _kernel(timed, output, count, prod(sizes), self.joined, self._outermost)
        comment = f"one {self.leg} at a time"
        if products:  # which are added without being computed first
            together = ADDED_TOGETHER, turns.reads, (0,), kernel
            writer, sums = writer.run(*together, comment, (turns,), (1,))
            writer, array = writer.run(PICKED, [sums], shape, FREE, "", (0,))
        else:
            call = JOINED if self.joined else ADDED, turns.reads, shape, kernel
            writer, array = writer.run(*call, comment, (turns,))
        legs = (self.leg, *self._legs) if self.joined else self._legs
        every = tuple(range(len(network.nodes)))
        cover = self.cover.put(writer, every, Value(array, legs), "loop")
        return replace(cover, routes=(*cover.routes, *routes))


def loops(cover: Cover, pairs: bool = False) -> Iterator[Loop]:
    """The leg that all tensors hold as a dimension and no pattern holds: samples, mostly.

    Per-sample gradients become one native call for each sample; norms, diagonals and sums of
    squares never hold them all. Sums of products of two tensors have better routes, unless another
    network needs the same products: then ``pairs`` are looped, too.
    """
    network = cover.network
    tensors = list(network.tensors)
    if cover.selection is not None:
        return
    for leg, at in network.holders.items():
        open_ = leg in network.open_legs
        if len(tensors) < 2 or network.sizes[leg] < 2:
            continue
        if not (open_ or pairs or len(tensors) > 2):
            continue
        if len(at) == len(tensors) and all(isinstance(network.nodes[p], Tensor) for p in at):
            places = {(t.name, _dimension(t.view, leg, network.sizes)) for t in tensors}
            dims = {name: dim for name, dim in places if dim is not None}
            if len(dims) == len(places):
                order = {t.name: dims[t.name] for t in tensors}
                yield Loop(cover, leg, order, open_)
                return


def inner_loops(cover: Cover) -> Iterator[Loop]:
    """The leg over which a turn sums squares, held by some tensors: several vectors, mostly.

    A turn then computes one product of the size of the sum, which stays in a cache, where all of
    them would not.
    """
    network = cover.network
    for leg, at in network.holders.items():
        nodes = [network.nodes[p] for p in at]
        tensors = [node for node in nodes if isinstance(node, Tensor)]
        names = {node.name for node in tensors}
        others = {node.name for node in network.tensors if leg not in node.legs}
        some = 1 < len(tensors) == len(nodes) and others and not names & others
        if leg in network.open_legs or network.sizes[leg] < 2 or not some:
            continue
        places = [(node.name, _dimension(node.view, leg, network.sizes)) for node in tensors]
        dims = {name: dim for name, dim in places if dim is not None}
        if len({*places}) == len(dims) == len(names):
            yield Loop(cover.choosing("inner", leg), leg, dims, False, inner=True)


def _apart(steps: tuple[Step, ...], parts: tuple[Strided, ...]) -> list[Step]:
    """The steps that read none of the parts, nor what is made of them."""
    varying, found = {*parts}, []
    for step in steps:
        if varying.isdisjoint(step.value.reads):
            found.append(step)
        else:
            varying.add(step.value)
    return found


def _dimension(view: View, leg: Leg, sizes: Sizes) -> int | None:
    """The array dimension that a leg is by itself, if it is in no other axis."""
    at = [p for p, axis in enumerate(view.axes) if leg in dict(axis.terms)]
    if len(at) != 1 or view.axes[at[0]].plain(sizes) != leg:
        return None
    before = prod(axis.size for axis in view.axes[: at[0]])
    for dim, size in enumerate(view.shape):
        if prod(view.shape[:dim]) == before and size == sizes[leg]:
            return dim
    return None


def _single(shape: tuple[int, ...], dims: dict[str, int], node: Tensor) -> tuple[int, ...]:
    return (*shape[: dims[node.name]], 1, *shape[dims[node.name] + 1 :])


def _kernel(
    steps: tuple[Step, ...],
    output: Strided,
    count: int,
    entries: int,
    joined: bool,
    outermost: bool,
) -> cost.Kernel:
    """The price of all turns, and of joining or adding what they give."""
    turn = sum(step.kernel.seconds for step in steps)
    seconds = cost.loop(count, turn, alone=joined and outermost)
    end = cost.copy(count * entries, entries) if joined else cost.added(entries)
    origin = [step.value.size for step in steps if step.value is output.origin]
    kept = count * max([entries, *origin]) if joined else 0  # a part keeps what it is a view of
    return cost.Kernel(
        "loop",
        count * sum(step.kernel.flops for step in steps),
        count * sum(step.kernel.bytes for step in steps) + end.bytes,
        seconds + end.seconds * (1 if joined else count),
        held(steps, 0 if joined else entries) + cost.bytes_per_entry() * kept,
    )
