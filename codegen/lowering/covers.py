"""Covers: routes replace patterns, with the tensors they join, by dense tensors."""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from math import inf

from tnconv.codegen.lowering.strided import Strided, operand
from tnconv.codegen.lowering.values import Value, read
from tnconv.codegen.lowering.writer import Choices, Writer
from tnconv.diagrams.affine import Leg, Node, Selection, Tensor, View
from tnconv.diagrams.network import TensorNetwork


@dataclass(unsafe_hash=True)  # in place of frozen, which takes three times as long to make
class Cover:
    """A partly lowered network: what is left, the steps written so far, and the routes used.

    Args:
        network: What is left. Its tensors have names of the cover's own.
        arrays: What each name stands for: an operand, or the result of a step.
        writer: The steps.
        routes: The routes used so far.
        indices: The index operands of the network's selections.
        most: The seconds of all steps beyond which routes need not continue this cover.
    """

    network: TensorNetwork
    arrays: Mapping[str, Strided]
    writer: Writer = field(default_factory=Writer)
    routes: tuple[str, ...] = ()
    indices: Mapping[str, Strided] = field(default_factory=dict)
    most: float = inf

    @classmethod
    def of(
        cls,
        network: TensorNetwork,
        positions: Mapping[str, int],
        script: Choices = (),
        channels_last: Collection[str] = (),
    ) -> "Cover":
        """Nothing is done yet; ``positions`` are those of the operands in a call.

        Operands that ``channels_last`` names lie so in memory, and all others are contiguous.
        """
        names = {name: f"operand {at}" for name, at in positions.items()}
        given = {
            names[name]: operand(positions[name], shape, name in channels_last)
            for name, shape in network.operands.items()
        }
        indices = {names[name]: given.pop(names[name]) for name in network.indices}
        writer = Writer(script=script)
        return cls(network.rename_operands(names), given, writer, indices=indices)

    def choosing(self, kind: str, what: Hashable) -> "Cover":
        """With one more choice made: see `Writer`."""
        return self.after(self.writer.choosing(kind, what))

    def after(self, writer: Writer) -> "Cover":
        """The same cover after further steps."""
        return Cover(self.network, self.arrays, writer, self.routes, self.indices, self.most)

    def named(self, array: Strided) -> tuple[str, Mapping[str, Strided]]:
        """The name of an array, and all arrays with it."""
        for name, known in self.arrays.items():
            if known is array:
                return name, self.arrays
        names = (f"result {number}" for number in count())
        name = next(name for name in names if name not in self.arrays)
        return name, {**self.arrays, name: array}

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
        return self if writer is self.writer else self.after(writer), value

    def needed(self, leg: Leg, *but: int) -> bool:
        """Whether the result or a node that is not one of ``but`` holds the leg."""
        held = self.network.holders[leg]
        return leg in self.network.open_legs or any(at not in but for at in held)

    def put(self, writer: Writer, covered: tuple[int, ...], value: Value, route: str) -> "Cover":
        """The nodes at ``covered`` become the tensor ``value``; legs that they alone hold go."""
        tn = self.network
        sizes = {
            leg: size
            for leg, size in tn.sizes.items()
            if leg in value.legs or not tn.holders[leg] or self.needed(leg, *covered)
        }
        name, arrays = self.named(value.array)
        node: Node = Tensor(name, View.of(sizes, *value.legs))
        nodes = (node, *(n for at, n in enumerate(tn.nodes) if at not in covered))
        network, routes = tn.with_(nodes, sizes=sizes), (*self.routes, route)
        return Cover(network, arrays, writer, routes, self.indices)


Route = Callable[[Cover], Iterator[Cover]]
