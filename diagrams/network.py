"""The intermediate representation: a tensor network, and sums of them."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import networkx
import torch

from tnconv.diagrams.affine import (
    Axis,
    Leg,
    Node,
    Pattern,
    Sizes,
    Tensor,
    Terms,
    View,
    fresh,
    iterate_legs,
    linear,
    mask,
    reach,
)


@dataclass(frozen=True, eq=False)
class TensorNetwork:
    """``result[legs] = scale · Σ Π nodes``: add the product of all nodes where ``result`` points.

    Every leg in ``sizes`` runs over its range; legs that the result does not hold are summed. A leg
    that nothing holds counts its size, an open leg that no node holds broadcasts. Nodes are
    identified by position, so equal factors are legal. Networks that differ in leg names only
    compare equal and hash alike.

    Raises:
        ValueError: a leg without a size, a negative size, or one operand of two shapes.
    """

    nodes: tuple[Node, ...]
    result: View
    sizes: Sizes
    scale: Fraction = Fraction(1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", MappingProxyType(dict(self.sizes)))
        object.__setattr__(self, "scale", Fraction(self.scale))
        for leg in iterate_legs(self.nodes, self.result):
            if leg not in self.sizes:
                raise ValueError(f"leg {leg!r} has no size; sized legs are {sorted(self.sizes)}")
        for leg, size in self.sizes.items():
            if size < 0:
                raise ValueError(f"leg {leg!r} has size {size}; expected at least 0")
        shapes: dict[str, tuple[int, ...]] = {}
        for node in self.tensors:
            if shapes.setdefault(node.name, node.view.shape) != node.view.shape:
                raise ValueError(
                    f"operand {node.name!r} appears with shapes {shapes[node.name]} and "
                    f"{node.view.shape}; expected one shape"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return self.result.shape

    @property
    def tensors(self) -> Iterator[Tensor]:
        return (node for node in self.nodes if isinstance(node, Tensor))

    @property
    def patterns(self) -> Iterator[tuple[int, Pattern]]:
        """The patterns with their positions."""
        return ((at, node) for at, node in enumerate(self.nodes) if isinstance(node, Pattern))

    @cached_property
    def operands(self) -> dict[str, tuple[int, ...]]:
        """The shape of each operand, in order of first appearance."""
        return {node.name: node.view.shape for node in self.tensors}

    @cached_property
    def holders(self) -> dict[Leg, tuple[int, ...]]:
        """For every leg the positions of the nodes that hold it; the result does not count."""
        held: dict[Leg, list[int]] = {leg: [] for leg in self.sizes}
        for at, node in enumerate(self.nodes):
            for leg in node.legs:
                held[leg].append(at)
        return {leg: tuple(at) for leg, at in held.items()}

    @cached_property
    def open_legs(self) -> frozenset[Leg]:
        """The legs that the result holds; all others are summed."""
        return frozenset(self.result.legs)

    @cached_property
    def graph(self) -> "networkx.Graph[object]":
        """The bipartite graph of nodes (positions, and ``"result"``) and legs."""
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
        """This network with legs named by where they are held.

        Two legs that are held at the same places with the same coefficients can be exchanged, so
        sorting the legs by their places is a complete normal form for a given order of nodes.
        """
        places: dict[Leg, list[tuple[int, int, int]]] = {leg: [] for leg in self.sizes}
        for at, view in enumerate((self.result, *(node.view for node in self.tensors))):
            for position, axis in enumerate(view.axes):
                for leg, a in axis.terms:
                    places[leg].append((at, position, a))
        tensors = {leg: tuple(found) for leg, found in places.items()}
        for at, pattern in self.patterns:
            # The sign of a pattern's terms depends on its leg names; fix it by places instead.
            terms = sorted(pattern.terms, key=lambda t: (tensors[t[0]], self.sizes[t[0]], abs(t[1])))
            for leg, a in terms:
                places[leg].append((-1, at, a if terms[0][1] > 0 else -a))
        order = sorted(self.sizes, key=lambda leg: (places[leg], self.sizes[leg]))
        return self.rename({leg: f"l{at:04d}" for at, leg in enumerate(order)})

    @cached_property
    def _key(self) -> tuple[object, ...]:
        same = self.canonical
        return same.nodes, same.result, tuple(sorted(same.sizes.items())), same.scale

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorNetwork) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def with_(
        self,
        nodes: Iterable[Node] | None = None,
        result: View | None = None,
        sizes: Sizes | None = None,
        scale: Fraction | int | None = None,
    ) -> "TensorNetwork":
        """A copy with some parts replaced."""
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
            Tensor(node.name, view(node.view))
            if isinstance(node, Tensor)
            else Pattern(tuple((names.get(leg, leg), a) for leg, a in node.terms), node.values)
            for node in self.nodes
        )
        sizes = {names.get(leg, leg): size for leg, size in self.sizes.items()}
        return self.with_(nodes, view(self.result), sizes)

    def scaled(self, factor: Fraction | int) -> "TensorNetwork":
        """This network times an exact number."""
        return self.with_(scale=self.scale * factor)

    def _check_occurs(self, operand: str, legs: Iterable[Leg] = ()) -> None:
        if operand not in self.operands:
            raise ValueError(f"no operand {operand!r}; the operands are {sorted(self.operands)}")
        for leg in legs:
            if leg not in self.sizes:
                raise ValueError(f"no leg {leg!r} to keep; the legs are {sorted(self.sizes)}")

    def _occurrences(self, operand: str) -> Iterator[tuple[int, Tensor]]:
        for at, node in enumerate(self.nodes):
            if isinstance(node, Tensor) and node.name == operand:
                yield at, node

    def vjp(
        self,
        operand: str,
        keep: Sequence[Leg] = (),
        extra: Sizes = MappingProxyType({}),
        per_sample: bool = False,
        cotangent: str = "grad_output",
    ) -> "Sum":
        """The transposed Jacobian in ``operand`` applied to ``cotangent``: two views change places.

        Removing a node leaves the derivative in it, so its view becomes the result's, and the
        cotangent is read where the result was. ``keep`` leaves legs open, as leading dimensions of
        the result (``per_sample=True`` is ``keep=("n",)``); each leg in ``extra`` is a leading
        dimension of both cotangent and result: several cotangents at once. Shape: ``(*extra,
        *keep, *operand)``.

        Raises:
            ValueError: no such operand or leg, or ``cotangent``/``extra`` are names in use.
        """
        keep = ("n", *keep) if per_sample else tuple(keep)
        self._check_occurs(operand, keep)
        if cotangent in self.operands:
            raise ValueError(f"operand {cotangent!r} exists already; name another cotangent")
        if taken := sorted(self.sizes.keys() & extra.keys()):
            raise ValueError(f"extra legs {taken} exist already; give new names")
        sizes = dict(self.sizes) | dict(extra)
        given = Tensor(cotangent, self.result.prepend(sizes, extra))
        return Sum(
            tuple(
                self.with_(
                    (given if at == position else other for at, other in enumerate(self.nodes)),
                    node.view.prepend(sizes, (*extra, *keep)),
                    sizes,
                )
                for position, node in self._occurrences(operand)
            )
        )

    def jvp(
        self,
        operand: str,
        keep: Sequence[Leg] = (),
        extra: Sizes = MappingProxyType({}),
        per_sample: bool = False,
        tangent: str | None = None,
    ) -> "Sum":
        """The Jacobian in ``operand`` applied to a tangent: the tangent takes a node's place.

        The tangent is named ``tangent_<operand>``. With ``keep`` (``per_sample=True`` is
        ``keep=("n",)``) it has leading dimensions for legs of the network: another tangent for
        every sample. Each leg in ``extra`` leads tangent and result: several tangents at once.

        Raises:
            ValueError: no such operand or leg, or ``tangent``/``extra`` are names in use.
        """
        keep = ("n", *keep) if per_sample else tuple(keep)
        self._check_occurs(operand, keep)
        name = tangent or f"tangent_{operand}"
        if name in self.operands:
            raise ValueError(f"operand {name!r} exists already; name another tangent")
        if taken := sorted(self.sizes.keys() & extra.keys()):
            raise ValueError(f"extra legs {taken} exist already; give new names")
        sizes = dict(self.sizes) | dict(extra)
        return Sum(
            tuple(
                self.with_(
                    (
                        Tensor(name, node.view.prepend(sizes, (*extra, *keep)))
                        if at == position
                        else other
                        for at, other in enumerate(self.nodes)
                    ),
                    self.result.prepend(sizes, extra),
                    sizes,
                )
                for position, node in self._occurrences(operand)
            )
        )

    def jacobian(self, operand: str) -> "Sum":
        """The Jacobian in ``operand``, of shape ``(*result, *operand)``: a node is removed.

        Raises:
            ValueError: no such operand.
        """
        self._check_occurs(operand)
        return Sum(
            tuple(
                self.without(at).with_(
                    result=View(self.shape + node.view.shape, self.result.axes + node.view.axes)
                )
                for at, node in self._occurrences(operand)
            )
        )

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
        pair = self.connect(self, (*over, *keep))
        half = len(self.result.axes)
        plain = [axis.plain(self.sizes) for axis in self.result.axes]
        for leg in (*over, *keep):
            if leg not in plain:
                raise ValueError(f"no plain result axis is leg {leg!r}; they are {plain}")
        axes = [
            axis
            for at, axis in enumerate(pair.result.axes)
            if plain[at % half] not in over and not (plain[at % half] in keep and at >= half)
        ]
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

    def reshape(self, *shape: int) -> "TensorNetwork":
        """The same values in a result of another shape.

        Raises:
            ValueError: the number of entries differs.
        """
        return self.with_(result=View(shape, self.result.axes))

    def reference(self, **operands: torch.Tensor) -> torch.Tensor:
        """The value, contracted densely in float64: see `tnconv.diagrams.reference`."""
        from tnconv.diagrams.reference import reference

        return reference(self, operands)

    def draw(self, path: str | Path) -> Path:
        """Write a picture; the suffix gives the format: see `tnconv.diagrams.drawing.draw`."""
        from tnconv.diagrams.drawing import draw

        return draw(self, path)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        from tnconv.diagrams.drawing import mimebundle

        return mimebundle(self)

    def __add__(self, other: "TensorNetwork | Sum") -> "Sum":
        return Sum((self,)) + other


@dataclass(frozen=True)
class Sum:
    """A sum of networks with equal result shapes: product rule, bias, ones-columns.

    Raises:
        ValueError: no terms, results of different shapes, or one operand of two shapes.
    """

    terms: tuple[TensorNetwork, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("a sum needs at least one term")
        if len(shapes := {term.shape for term in self.terms}) > 1:
            raise ValueError(f"terms have results of shapes {sorted(shapes)}; expected one shape")
        shape_of: dict[str, tuple[int, ...]] = {}
        for name, shape in (item for term in self.terms for item in term.operands.items()):
            if shape_of.setdefault(name, shape) != shape:
                raise ValueError(
                    f"operand {name!r} appears with shapes {shape_of[name]} and {shape}; "
                    "expected one shape"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.terms[0].shape

    @cached_property
    def operands(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for term in self.terms for name, shape in term.operands.items()}

    def __add__(self, other: "TensorNetwork | Sum") -> "Sum":
        return Sum(self.terms + (other.terms if isinstance(other, Sum) else (other,)))

    def map(self, function: Callable[[TensorNetwork], "TensorNetwork | Sum"]) -> "Sum":
        """The sum of a function of the terms."""
        parts = [function(term) for term in self.terms]
        return Sum(tuple(t for p in parts for t in (p.terms if isinstance(p, Sum) else (p,))))

    def _map_occurrences(
        self, operand: str, function: Callable[[TensorNetwork], "TensorNetwork | Sum"]
    ) -> "Sum":
        if operand not in self.operands:
            raise ValueError(f"no operand {operand!r}; the operands are {sorted(self.operands)}")
        return Sum(tuple(t for t in self.terms if operand in t.operands)).map(function)

    def vjp(
        self,
        operand: str,
        keep: Sequence[Leg] = (),
        extra: Sizes = MappingProxyType({}),
        per_sample: bool = False,
        cotangent: str = "grad_output",
    ) -> "Sum":
        """The sum of the terms' `TensorNetwork.vjp`."""
        return self._map_occurrences(
            operand, lambda term: term.vjp(operand, keep, extra, per_sample, cotangent)
        )

    def jvp(
        self,
        operand: str,
        keep: Sequence[Leg] = (),
        extra: Sizes = MappingProxyType({}),
        per_sample: bool = False,
        tangent: str | None = None,
    ) -> "Sum":
        """The sum of the terms' `TensorNetwork.jvp`."""
        return self._map_occurrences(
            operand, lambda term: term.jvp(operand, keep, extra, per_sample, tangent)
        )

    def jacobian(self, operand: str) -> "Sum":
        """The sum of the terms' `TensorNetwork.jacobian`."""
        return self._map_occurrences(operand, lambda term: term.jacobian(operand))

    def scaled(self, factor: Fraction | int) -> "Sum":
        return self.map(lambda term: term.scaled(factor))

    def reference(self, **operands: torch.Tensor) -> torch.Tensor:
        """The sum of the terms' `TensorNetwork.reference`."""
        from tnconv.diagrams.reference import reference

        return reference(self, operands)

    def draw(self, path: str | Path) -> Path:
        """Write a picture of all terms; the suffix gives the format."""
        from tnconv.diagrams.drawing import draw

        return draw(self, path)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        from tnconv.diagrams.drawing import mimebundle

        return mimebundle(self)
