"""Forced orders of contraction: nests of tensors, each of which becomes one dense tensor."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

from tnconv.codegen.lowering.covers import Cover
from tnconv.codegen.lowering.plans import Plan
from tnconv.codegen.lowering.values import Value
from tnconv.diagrams.affine import Pattern, Tensor, View
from tnconv.diagrams.network import TensorNetwork

Search = Callable[[Cover, str | None], Plan]
"""From a part of a network, and the name of a route to cover it by if it can, to the best plan."""


@dataclass(frozen=True)
class Nest:
    """Tensors, and nests of them, that are contracted to one dense tensor before any others.

    Tensors are positions among a network's tensors. Patterns belong to the first nest, from the
    inside out and from left to right, that has a tensor which shares a leg with them.

    Args:
        parts: Positions of tensors, and inner nests.
        route: A route of `ROUTES` that covers this nest's patterns where it can.
    """

    parts: tuple["int | Nest", ...]
    route: str | None = None

    @property
    def tensors(self) -> tuple[int, ...]:
        """The positions of all tensors inside."""
        inner = (part.tensors if isinstance(part, Nest) else (part,) for part in self.parts)
        return tuple(at for some in inner for at in some)


def check_nest(order: Nest, network: TensorNetwork) -> None:
    """Raise unless an order has every tensor of a network once.

    Raises:
        ValueError: it has not.
    """
    count = len(list(network.tensors))
    if sorted(order.tensors) != list(range(count)):
        raise ValueError(f"order has tensors {order.tensors}; expected 0 to {count - 1}, each once")


def nested(cover: Cover, order: Nest, search: Search) -> Cover:
    """The inner nests of an order contracted in turn, each by the best plan for it alone."""
    tensors = iter(range(len(cover.network.nodes)))
    keys = [next(tensors) if isinstance(n, Tensor) else None for n in cover.network.nodes]
    state = _Nested(cover, keys, search)
    for part in order.parts:
        if isinstance(part, Nest):
            state, _ = state.contracted(part)
    return state.cover


def same_tensors(form: TensorNetwork, network: TensorNetwork) -> bool:
    """Whether positions of tensors in a network are those in a form of it."""
    return [t.name for t in form.tensors] == [t.name for t in network.tensors]


@dataclass(frozen=True)
class _Nested:
    """A cover some of whose nests are dense; ``keys`` say what each node of it is."""

    cover: Cover
    keys: Sequence[Hashable]  # a tensor's position, or the nest that it was made of
    search: Search = field(repr=False)

    def contracted(self, nest: Nest) -> "tuple[_Nested, Hashable]":
        """With a nest as one dense tensor, and the key of that."""
        state, inner = self, []
        for part in nest.parts:
            key: Hashable = part
            if isinstance(part, Nest):
                state, key = state.contracted(part)
            inner.append(key)
        nodes = state.cover.network.nodes
        held = [at for at, key in enumerate(state.keys) if key is not None and key in inner]
        legs = {leg for at in held for leg in nodes[at].legs}
        joined = [
            at
            for at, node in enumerate(nodes)
            if isinstance(node, Pattern) and not legs.isdisjoint(node.legs)
        ]
        covered = tuple(sorted((*held, *joined)))
        best = self.search(_body(state.cover, covered), nest.route)
        writer = replace(state.cover.writer, steps=best.steps)
        value = Value(best.output, _kept(state.cover, covered))
        cover = state.cover.put(writer, covered, value, "")
        cover = replace(cover, routes=(*state.cover.routes, *best.routes))
        rest = [key for at, key in enumerate(state.keys) if at not in covered]
        return replace(state, cover=cover, keys=(nest, *rest)), nest


def _kept(cover: Cover, covered: tuple[int, ...]) -> tuple[str, ...]:
    """The legs of some nodes that others hold as well, or the result."""
    held = dict.fromkeys(leg for at in covered for leg in cover.network.nodes[at].legs)
    return tuple(leg for leg in held if cover.needed(leg, *covered))


def _body(cover: Cover, covered: tuple[int, ...]) -> Cover:
    """Some nodes as a network of their own, after what was written already."""
    network = cover.network
    nodes = tuple(network.nodes[at] for at in covered)
    held = {leg for node in nodes for leg in node.legs}
    sizes = {leg: size for leg, size in network.sizes.items() if leg in held}
    body = TensorNetwork(nodes, View.of(sizes, *_kept(cover, covered)), sizes)
    names = {node.name for node in body.tensors}
    arrays = {name: array for name, array in cover.arrays.items() if name in names}
    return replace(cover, network=body, arrays=arrays, routes=())
