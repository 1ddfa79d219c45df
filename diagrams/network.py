"""The intermediate representation: a tensor network."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING

from tnconv.diagrams.affine import (
    Axis,
    Leg,
    Node,
    Pattern,
    Selection,
    Sizes,
    Tensor,
    Terms,
    View,
    fresh,
    linear,
    mask,
    reach,
)
from tnconv.diagrams.canonical import canonical_names
from tnconv.diagrams.expression import Expression

if TYPE_CHECKING:
    import networkx


@dataclass(frozen=True, eq=False, repr=False)
class TensorNetwork(Expression):
    """``result[legs] = scale · Σ Π nodes``: add the product of all nodes where ``result`` points.

    Every leg in ``sizes`` runs over its range; legs that the result does not hold are summed. A leg
    that nothing holds counts its size, an open leg that no node holds broadcasts. Nodes are
    identified by position, so equal factors are legal. Networks that differ in leg names only
    compare equal and hash alike.

    Args:
        nodes: tensors and patterns, which are multiplied.
        result: the view through which the result is written.
        sizes: the size of each leg.
        scale: an exact number, times which everything is.

    Raises:
        ValueError: a leg without a size, a negative size, or one operand of two shapes.
    """

    nodes: tuple[Node, ...]
    result: View
    sizes: Sizes
    scale: Fraction = Fraction(1)

    def __post_init__(self) -> None:
        sizes = dict(self.sizes)
        object.__setattr__(self, "sizes", MappingProxyType(sizes))
        if type(self.scale) is not Fraction:
            object.__setattr__(self, "scale", Fraction(self.scale))
        for legs in (*[node.legs for node in self.nodes], self.result.legs):
            for leg in legs:
                if leg not in sizes:
                    raise ValueError(f"leg {leg!r} has no size; sized legs are {sorted(sizes)}")
        if sizes and min(sizes.values()) < 0:
            leg, size = next((leg, size) for leg, size in sizes.items() if size < 0)
            raise ValueError(f"leg {leg!r} has size {size}; expected at least 0")
        shapes: dict[str, tuple[int, ...]] = {}
        indices = set()
        for node in self.nodes:
            if not isinstance(node, Tensor):
                continue
            if shapes.setdefault(node.name, node.shape) != node.shape:
                raise ValueError(
                    f"operand {node.name!r} appears with shapes {shapes[node.name]} and "
                    f"{node.shape}; expected one shape"
                )
            if isinstance(node, Selection):
                indices.add(node.name)
        for node in self.tensors if indices else ():
            if node.name in indices and not isinstance(node, Selection):
                raise ValueError(f"operand {node.name!r} is a tensor and an index; name another")

    @staticmethod
    def from_einsum(
        equation: str, /, *shapes: Sequence[int], **named: Sequence[int]
    ) -> "TensorNetwork":
        """The network of an equation as of ``torch.einsum``, for operands of these shapes.

        Operands are named by their keywords or, if shapes are given by position, a, b, c, ...

        >>> net = TensorNetwork.from_einsum("ab,bc->ac", left=(3, 4), right=(4, 5))
        >>> print(net)
        [a, c] = Σ_{b} left[a, b] · right[b, c]
        >>> list(TensorNetwork.from_einsum("ab,bc->ac", (3, 4), (4, 5)).operands)
        ['a', 'b']

        Raises:
            ValueError: the equation and the shapes do not fit, or it has an ellipsis.
        """
        from tnconv.diagrams.einsum import from_einsum

        return from_einsum(equation, shapes, named)

    @property
    def terms(self) -> tuple["TensorNetwork"]:  # type: ignore[override]  # it never changes
        """This network alone."""
        return (self,)

    @property
    def tensors(self) -> Iterator[Tensor]:
        return (node for node in self.nodes if isinstance(node, Tensor))

    @property
    def patterns(self) -> Iterator[tuple[int, Pattern]]:
        """The patterns with their positions."""
        return ((at, node) for at, node in enumerate(self.nodes) if isinstance(node, Pattern))

    @cached_property
    def holders(self) -> dict[Leg, tuple[int, ...]]:
        """For every leg the positions of the nodes that hold it; the result does not count."""
        held: dict[Leg, list[int]] = {leg: [] for leg in self.sizes}
        for at, node in enumerate(self.nodes):
            for leg in node.legs:
                held[leg].append(at)
        return {leg: tuple(at) for leg, at in held.items()}

    def size(self, legs: Iterable[Leg]) -> int:
        """The number of values that the legs take together."""
        return prod(self.sizes[leg] for leg in legs)

    @cached_property
    def open_legs(self) -> frozenset[Leg]:
        """The legs that the result holds; all others are summed."""
        return frozenset(self.result.legs)

    @cached_property
    def graph(self) -> "networkx.Graph[object]":
        """The bipartite graph of nodes (positions, and ``"result"``) and legs."""
        import networkx  # takes a while; only some rules and drawings ask the graph

        graph: networkx.Graph[object] = networkx.Graph()
        graph.add_nodes_from(range(len(self.nodes)), kind="node")
        graph.add_node("result", kind="result")
        graph.add_nodes_from((("leg", leg) for leg in self.sizes), kind="leg")
        for at, node in enumerate(self.nodes):
            graph.add_edges_from((at, ("leg", leg)) for leg in node.legs)
        graph.add_edges_from(("result", ("leg", leg)) for leg in self.result.legs)
        return graph

    def __reduce__(self) -> tuple[object, ...]:
        return TensorNetwork, (self.nodes, self.result, dict(self.sizes), self.scale)

    @cached_property
    def canonical(self) -> "TensorNetwork":
        """This network with legs named by where they are held: equal networks become the same."""
        return self.rename(canonical_names(self.nodes, self.result, self.sizes))

    @cached_property
    def _key(self) -> tuple[object, ...]:
        same = self.canonical
        return same.nodes, same.result, tuple(sorted(same.sizes.items())), same.scale

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorNetwork) or self._size != other._size:
            return False
        return self._parts == other._parts or self._key == other._key

    @property
    def _parts(self) -> tuple[object, ...]:
        return self.nodes, self.result, dict(self.sizes)

    @cached_property
    def _size(self) -> tuple[object, ...]:
        """What equal networks have in common and is told at once: most others differ in it."""
        return self.shape, len(self.nodes), self.scale, sorted(self.sizes.values())

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self._key)  # programs are looked up by it at every call of `contract`

    def with_(
        self,
        nodes: Iterable[Node] | None = None,
        result: View | None = None,
        sizes: Sizes | None = None,
        scale: Fraction | int | None = None,
    ) -> "TensorNetwork":
        """A copy with some parts replaced.

        Args:
            nodes: other nodes.
            result: another view of the result.
            sizes: other sizes, of all legs.
            scale: another scale.
        """
        return TensorNetwork(
            self.nodes if nodes is None else tuple(nodes),
            self.result if result is None else result,
            self.sizes if sizes is None else sizes,
            self.scale if scale is None else Fraction(scale),
        )

    def without(self, *positions: int) -> "TensorNetwork":
        """A copy without the nodes at ``positions``; their legs stay."""
        return self.with_(nodes=(n for at, n in enumerate(self.nodes) if at not in positions))

    def zero(self) -> "TensorNetwork":
        """The zero network of this shape: scale 0 and no nodes."""
        axes = tuple(Axis(axis.size) for axis in self.result.axes)
        return TensorNetwork((), View(self.shape, axes), {}, Fraction(0))

    def substitute(
        self,
        leg: Leg,
        offset: int = 0,
        terms: Mapping[Leg, int] | Terms = (),
        sizes: Sizes = MappingProxyType({}),
    ) -> "TensorNetwork":
        """Put ``leg = offset + Σ a·other`` everywhere: the one step that rewriting is made of.

        ``sizes`` gives the sizes of new legs. Where the form can leave the range of ``leg``, a mask
        keeps it in. The value stays if each value of ``leg`` that counts is met exactly once.

        Args:
            leg: the leg that goes.
            offset: the constant of the form that replaces it.
            terms: the coefficient of each leg in the form.
            sizes: the sizes of legs that are new.
        """
        by = linear(terms)
        left = {other: size for other, size in self.sizes.items() if other != leg} | dict(sizes)
        nodes = tuple(node.substitute(leg, offset, by) for node in self.nodes)
        low, high = reach(by, left)
        if offset + low < 0 or offset + high >= self.sizes[leg]:
            nodes += (mask(by, offset, self.sizes[leg]),)
        return self.with_(nodes, self.result.substitute(leg, offset, by), left)

    def rename(self, names: Mapping[Leg, Leg]) -> "TensorNetwork":
        """A copy with other leg names (a bijection; legs that are not named keep theirs)."""

        def form(terms: Terms) -> Terms:
            return linear((names.get(leg, leg), a) for leg, a in terms)

        def view(of: View) -> View:
            return View(of.shape, tuple(Axis(x.size, x.offset, form(x.terms)) for x in of.axes))

        nodes = tuple(
            node.read_through(view(node.view))
            if isinstance(node, Tensor)
            else Pattern(tuple((names.get(leg, leg), a) for leg, a in node.terms), node.values)
            for node in self.nodes
        )
        sizes = {names.get(leg, leg): size for leg, size in self.sizes.items()}
        return self.with_(nodes, view(self.result), sizes)

    def rename_operands(self, names: Mapping[str, str]) -> "TensorNetwork":
        """A copy with other operand names (operands that are not named keep theirs).

        >>> from tnconv.diagrams import linear
        >>> list(linear((8, 3), (4, 3)).rename_operands({"x": "a"}).operands)
        ['a', 'weight']
        """
        return self.with_(
            replace(node, name=names.get(node.name, node.name))
            if isinstance(node, Tensor)
            else node
            for node in self.nodes
        )

    def scaled(self, factor: Fraction | int) -> "TensorNetwork":
        """This network times an exact number."""
        return self.with_(scale=self.scale * factor)

    def connect(self, other: "TensorNetwork", share: Collection[Leg] = ()) -> "TensorNetwork":
        """The product of two networks that have the legs in ``share`` in common.

        All other legs of ``other`` get new names (primes). The result has the dimensions of this
        network's, then those of ``other``'s; shared open legs make it diagonal there.

        Raises:
            ValueError: a shared leg that is missing in one network, or of two sizes.
        """
        for leg in share:
            if self.sizes.get(leg) is None or self.sizes.get(leg) != other.sizes.get(leg):
                raise ValueError(
                    f"cannot share leg {leg!r} of sizes {self.sizes.get(leg)} and "
                    f"{other.sizes.get(leg)}; expected a leg of one size in both"
                )
        names: dict[Leg, Leg] = {}
        for leg in other.sizes:
            if leg not in share:
                names[leg] = fresh(leg, {*self.sizes, *other.sizes, *names.values()})
        second = other.rename(names)
        return TensorNetwork(
            self.nodes + second.nodes,
            View(self.shape + second.shape, self.result.axes + second.result.axes),
            dict(self.sizes) | dict(second.sizes),
            self.scale * second.scale,
        )

    def gram(self, over: Collection[Leg], keep: Collection[Leg] = ()) -> "TensorNetwork":
        """``A[keep, a, a'] = Σ_over T[keep, over, a] T[keep, over, a']`` for this network ``T``.

        Two copies share the legs ``over``, which are summed, and ``keep``, which stay open once;
        every other result leg appears for each copy. One result dimension per axis.

        Raises:
            ValueError: a leg that no plain result axis holds.
        """
        return self.matched(self, over, keep)

    def matched(
        self, other: "TensorNetwork", over: Collection[Leg], keep: Collection[Leg] = ()
    ) -> "TensorNetwork":
        """``A[keep, a, b] = Σ_over T[keep, over, a] U[keep, over, b]``: `gram` of two networks.

        Raises:
            ValueError: a leg that no plain result axis of both holds, or of two sizes.
        """
        pair = self.connect(other, (*over, *keep))
        plain = [axis.plain(self.sizes) for axis in self.result.axes]
        others = [axis.plain(other.sizes) for axis in other.result.axes]
        for leg in (*over, *keep):
            if leg not in plain or leg not in others:
                found = plain if leg not in plain else others
                raise ValueError(f"no plain result axis is leg {leg!r}; they are {found}")
        dropped = [leg in over for leg in plain] + [leg in (*over, *keep) for leg in others]
        every = zip(pair.result.axes, dropped, strict=True)
        axes = [axis for axis, out in every if not out]
        axes.sort(key=lambda axis: axis.plain(pair.sizes) not in keep)
        return pair.with_(result=View(tuple(axis.size for axis in axes), tuple(axes)))

    def marginal(self, *legs: Leg) -> "TensorNetwork":
        """The result summed over the plain axes ``legs``; one result dimension per axis left.

        Raises:
            ValueError: a leg that no plain result axis is.
        """
        plain = [axis.plain(self.sizes) for axis in self.result.axes]
        if missing := [leg for leg in legs if leg not in plain]:
            raise ValueError(f"no plain result axis is one of {missing}; they are {plain}")
        axes = tuple(
            axis for axis, leg in zip(self.result.axes, plain, strict=True) if leg not in legs
        )
        return self.with_(result=View(tuple(axis.size for axis in axes), axes))

    def narrow(self, leg: Leg, start: int, length: int, step: int = 1) -> "TensorNetwork":
        """Only ``length`` positions of an open leg, from ``start`` on: a part, computed alone.

        ``y[start : start + step * length : step]`` in the dimension of ``leg``, also where other
        legs are flattened with it (one group, some channels).

        >>> from tnconv.diagrams import conv
        >>> conv((8, 4, 32), (6, 2, 3), groups=2).narrow("g", 1, 1).narrow("o1", 0, 5).shape
        (8, 3, 5)

        Args:
            leg: an open leg.
            start: its first position.
            length: how many positions are left.
            step: the distance between them.

        Raises:
            ValueError: a leg that no plain result axis is, or positions outside of it.
        """
        plain = [axis.plain(self.sizes) for axis in self.result.axes]
        if plain.count(leg) != 1:
            raise ValueError(f"not one plain result axis is leg {leg!r}; they are {plain}")
        size = self.sizes[leg]
        if start < 0 or length < 1 or step < 1 or start + step * (length - 1) >= size:
            raise ValueError(
                f"start {start}, length {length} and step {step} leave leg {leg!r} of size {size}"
            )
        if size == 1:
            return self
        part = self.substitute(leg, start, {leg: step}, {leg: length})
        axes = list(part.result.axes)
        axes[plain.index(leg)] = Axis(length, 0, ((leg, 1),))
        shape, dim = list(self.shape), array_dimension(self.result, plain.index(leg))
        shape[dim] = shape[dim] * length // size
        return part.with_(result=View(tuple(shape), tuple(axes)))

    def sampled(self, leg: Leg, length: int, index: str | None = None) -> "TensorNetwork":
        """Only the positions of ``leg`` that an operand of ``length`` integers lists count.

        ``Σ_r [index[r] = leg]`` times all nodes: a position counts as often as it is listed. Drawn
        uniformly, with or without replacement, and `scaled` by ``size / length``, the value is
        right on average (Bernoulli-CRS of Adelman et al., 2021). The operand is named
        ``index_<leg>``; its positions are in ``[0, size)``.

        >>> from tnconv.diagrams import conv
        >>> gradient = conv((8, 4, 32), (6, 4, 3)).vjp("weight")
        >>> gradient.sampled("n", 2).scaled(4).operands
        {'x': (8, 4, 32), 'grad_output': (8, 6, 30), 'index_n': (2,)}

        Raises:
            ValueError: no such leg, a negative length, or the operand's name is in use.
        """
        if leg not in self.sizes:
            raise ValueError(f"no leg {leg!r} to sample; the legs are {sorted(self.sizes)}")
        if (name := index or f"index_{leg}") in self.operands:
            raise ValueError(f"operand {name!r} exists already; name another")
        r = fresh("r", self.sizes)
        sizes = dict(self.sizes) | {r: length}
        return self.with_((*self.nodes, Selection.of(name, sizes, r, leg)), sizes=sizes)

    def reshape(self, *shape: int) -> "TensorNetwork":
        """The same values in a result of another shape.

        Raises:
            ValueError: the number of entries differs.
        """
        return self.with_(result=View(shape, self.result.axes))


def array_dimension(view: View, axis: int) -> int:
    """The array dimension that an axis of size > 1 is part of."""
    before = prod(other.size for other in view.axes[:axis])
    return next(d for d in range(len(view.shape)) if prod(view.shape[: d + 1]) > before)
