"""Covers: routes replace patterns, with the tensors they join, by dense tensors."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from tnconv.codegen.lowering.arrays import Array, Writer, contiguous
from tnconv.codegen.lowering.constants import LIKE
from tnconv.codegen.lowering.values import Value, overlaps, read
from tnconv.codegen.prices import cost
from tnconv.diagrams.affine import Leg, Pattern, Selection, Tensor, View
from tnconv.diagrams.network import TensorNetwork
from tnconv.simplify.rules import implied
from tnconv.simplify.view_rules import solve_for

GROWN = 2  # products before windows are added up: entries, in times of the largest operand
MOST_OVERLAPS = 128  # shifted parts to add, one line of source for each


@dataclass(frozen=True)
class Cover:
    """A network part of which is done: what is left, what was written, and by which routes.

    The tensors of ``network`` are read from ``arrays``: operands, or results of earlier steps.
    ``indices`` are the operands of its selections.
    """

    network: TensorNetwork
    arrays: Mapping[str, Array]
    writer: Writer = field(default_factory=Writer)
    routes: tuple[str, ...] = ()
    indices: Mapping[str, Array] = field(default_factory=dict)

    @classmethod
    def of(cls, network: TensorNetwork, arguments: Mapping[str, str]) -> "Cover":
        """Nothing is done yet; ``arguments`` names the variable of each operand.

        Its tensors take that name, which no result of a step has.
        """
        operands = {
            name: Array(arguments[name], shape, contiguous(shape))
            for name, shape in network.operands.items()
        }
        indices = {name: operands[name] for name in network.indices}
        arrays = {array.code: array for name, array in operands.items() if name not in indices}
        return cls(network.rename_operands(arguments), arrays, indices=indices)

    @property
    def selection(self) -> int | None:
        """The position of the first selection: they are lowered before patterns are covered."""
        nodes = enumerate(self.network.nodes)
        return next((at for at, node in nodes if isinstance(node, Selection)), None)

    @property
    def pattern(self) -> int | None:
        """The position of the first pattern: the one that the next route has to cover."""
        return next((at for at, _ in self.network.patterns), None)

    def turned_to(self, at: int) -> "Cover":
        """With the node at a position first, so that the next route has to cover it."""
        nodes = self.network.nodes
        order = (nodes[at], *nodes[:at], *nodes[at + 1 :])
        return replace(self, network=self.network.with_(order))

    def value(self, at: int) -> tuple["Cover", Value]:
        """The tensor node at a position as a dense value."""
        node = self.network.nodes[at]
        assert isinstance(node, Tensor)
        array, sizes = self.arrays[node.name], self.network.sizes
        writer, value = read(self.writer, array, node.view, sizes)
        return replace(self, writer=writer), value

    def needed(self, leg: Leg, *but: int) -> bool:
        """Whether the result or a node that is not one of ``but`` holds the leg."""
        held = self.network.holders[leg]
        return leg in self.network.open_legs or any(at not in but for at in held)

    def put(self, writer: Writer, covered: tuple[int, ...], value: Value, route: str) -> "Cover":
        """The nodes at ``covered`` become the tensor ``value``; legs of theirs alone are gone."""
        tn = self.network
        sizes = {
            leg: size
            for leg, size in tn.sizes.items()
            if leg in value.legs or not tn.holders[leg] or self.needed(leg, *covered)
        }
        node = Tensor(value.array.code, View.of(sizes, *value.legs))
        nodes = (node, *(n for at, n in enumerate(tn.nodes) if at not in covered))
        arrays = {**self.arrays, value.array.code: value.array}
        network, routes = tn.with_(nodes, sizes=sizes), (*self.routes, route)
        return replace(self, network=network, arrays=arrays, writer=writer, routes=routes)


MASKING = 25  # bytes of an entry while a pattern is made: three int64 tensors, and a boolean one
Route = Callable[[Cover], Iterator[Cover]]


def window(cover: Cover) -> Iterator[Cover]:
    """Patterns that solve for a leg of one tensor (or of the result) become its windows.

    Reading overlapping windows is a strided view (im2col, copied only where a kernel needs it);
    writing them is shift and accumulate (col2im). Both can be had for a convolution: products of
    few channels are made at every input, and then added into place.
    """
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


def _solved(tn: TensorNetwork, first: int) -> TensorNetwork | None:
    """With windows of one tensor, or of the result, in place of a pattern and others like it."""
    if (found := window_of(tn, first)) is None:
        return None
    holder = found[1]
    at: int | None = first
    while at is not None:
        leg, _ = window_of(tn, at) or ("", None)
        tn = _without_implied_masks(solve_for(tn, at, leg))
        if holder is not None and at < holder:
            holder -= 1
        windows = {p: window_of(tn, p) for p, _ in tn.patterns}
        at = next((p for p, found in windows.items() if found and found[1] == holder), None)
    return tn


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


def dense(cover: Cover) -> Iterator[Cover]:
    """Every pattern becomes a dense 0/1 array: always possible, the others have to match it."""
    while (at := cover.pattern) is not None:
        node = cover.network.nodes[at]
        assert isinstance(node, Pattern)
        sizes = tuple(cover.network.sizes[leg] for leg in node.legs)
        steps, v = tuple(a for _, a in node.terms), node.values
        code = f"pattern({steps}, {sizes}, {v.start}, {v.stop}, {v.step}, {LIKE})"
        kernel = replace(cost.copy(prod(sizes), prod(sizes[-1:])), scratch=MASKING * prod(sizes))
        comment = f"pattern over {', '.join(node.legs)}"
        writer, array = cover.writer.run(code, sizes, kernel, comment)
        cover = cover.put(writer, (at,), Value(array, node.legs), "dense")
    yield cover
