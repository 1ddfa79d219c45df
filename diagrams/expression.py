"""What single networks and sums of them have in common: calculus, values, pictures.

The calculus is short because a network is linear in every node: its derivative is what remains
when the node is removed.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import isfinite
from numbers import Number, Rational
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, cast, overload

import torch

from tnconv.diagrams.affine import Leg, Selection, Sizes, Tensor, View

if TYPE_CHECKING:
    from tnconv.diagrams.drawing import Picture
    from tnconv.diagrams.network import TensorNetwork

NO_LEGS: Sizes = MappingProxyType({})


class Expression:
    """A sum of one or more networks with results of one shape."""

    terms: tuple["TensorNetwork", ...]
    """The networks that are added."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return self.terms[0].result.shape

    @cached_property
    def operands(self) -> dict[str, tuple[int, ...]]:
        """The shape of each operand, in order of first appearance."""
        return {t.name: t.shape for term in self.terms for t in term.tensors}

    @cached_property
    def indices(self) -> frozenset[str]:
        """The operands that are integers: they list positions of legs."""
        tensors = (t for term in self.terms for t in term.tensors)
        return frozenset(t.name for t in tensors if isinstance(t, Selection))

    def vjp(
        self,
        operand: str,
        keep: Sequence[Leg] = (),
        extra: Sizes = NO_LEGS,
        per_sample: bool = False,
        cotangent: str = "grad_output",
    ) -> "Sum":
        """The transposed Jacobian in ``operand`` applied to ``cotangent``: two views change places.

        A node's view becomes the result's, and the cotangent is read where the result was.
        ``keep`` leaves legs open, as leading dimensions of the result (``per_sample=True`` is
        ``keep=("n",)``); each leg in ``extra`` is a leading dimension of both cotangent and
        result: several cotangents at once. Shape: ``(*extra, *keep, *operand)``.

        Args:
            operand: the operand whose Jacobian it is.
            keep: legs that stay open, as leading dimensions of the result.
            extra: new legs with their sizes, which lead cotangent and result.
            per_sample: whether the samples' leg n is kept, too.
            cotangent: what the new operand is called.

        Raises:
            ValueError: no such operand or leg, or ``cotangent``/``extra`` are names in use.
        """
        keep = ("n", *keep) if per_sample else tuple(keep)

        def exchange(term: "TensorNetwork", at: int, node: Tensor) -> "TensorNetwork":
            sizes = dict(term.sizes) | dict(extra)
            given = Tensor(cotangent, term.result.prepend(sizes, extra))
            nodes = (given if at == other else n for other, n in enumerate(term.nodes))
            return term.with_(nodes, node.view.prepend(sizes, (*extra, *keep)), sizes)

        return self._differentiate(operand, exchange, keep, extra, cotangent)

    def jvp(
        self,
        operand: str,
        keep: Sequence[Leg] = (),
        extra: Sizes = NO_LEGS,
        per_sample: bool = False,
        tangent: str | None = None,
    ) -> "Sum":
        """The Jacobian in ``operand`` applied to a tangent, which takes a node's place.

        The tangent is named ``tangent_<operand>``. With ``keep`` (``per_sample=True`` is
        ``keep=("n",)``) it has leading dimensions for legs of the network: another tangent for
        every sample. Each leg in ``extra`` leads tangent and result: several tangents at once.

        Args:
            operand: the operand whose Jacobian it is.
            keep: legs of the network that lead the tangent: one for each of their positions.
            extra: new legs with their sizes, which lead tangent and result.
            per_sample: whether every sample has a tangent of its own.
            tangent: what the new operand is called.

        Raises:
            ValueError: no such operand or leg, or ``tangent``/``extra`` are names in use.
        """
        keep = ("n", *keep) if per_sample else tuple(keep)
        name = tangent or f"tangent_{operand}"

        def exchange(term: "TensorNetwork", at: int, node: Tensor) -> "TensorNetwork":
            sizes = dict(term.sizes) | dict(extra)
            given = Tensor(name, node.view.prepend(sizes, (*extra, *keep)))
            nodes = (given if at == other else n for other, n in enumerate(term.nodes))
            return term.with_(nodes, term.result.prepend(sizes, extra), sizes)

        return self._differentiate(operand, exchange, keep, extra, name)

    def jacobian(self, operand: str) -> "Sum":
        """The Jacobian in ``operand``, of shape ``(*result, *operand)``: a node is removed.

        Raises:
            ValueError: no such operand.
        """

        def remove(term: "TensorNetwork", at: int, node: Tensor) -> "TensorNetwork":
            result = View(term.shape + node.view.shape, term.result.axes + node.view.axes)
            return term.without(at).with_(result=result)

        return self._differentiate(operand, remove)

    def _differentiate(
        self,
        operand: str,
        change: Callable[["TensorNetwork", int, Tensor], "TensorNetwork"],
        keep: Iterable[Leg] = (),
        extra: Sizes = NO_LEGS,
        given: str | None = None,
    ) -> "Sum":
        """The product rule: the sum of a change at each occurrence of the operand."""
        if operand not in self.operands:
            raise ValueError(f"no operand {operand!r}; the operands are {sorted(self.operands)}")
        if operand in self.indices:
            raise ValueError(f"operand {operand!r} lists positions; there is no derivative in it")
        places = list(self._occurrences(operand))
        left = {t.name for term, at, _ in places for t in term.without(at).tensors}
        if given in left:
            raise ValueError(f"operand {given!r} exists already; name another")
        for term, _, _ in places:
            for leg in keep:
                if leg not in term.sizes:
                    raise ValueError(f"no leg {leg!r} to keep; the legs are {sorted(term.sizes)}")
            if taken := sorted(term.sizes.keys() & extra.keys()):
                raise ValueError(f"extra legs {taken} exist already; give new names")
        return Sum(tuple(change(*place) for place in places))

    def _occurrences(self, operand: str) -> Iterator[tuple["TensorNetwork", int, Tensor]]:
        for term in self.terms:
            for at, node in enumerate(term.nodes):
                if isinstance(node, Tensor) and node.name == operand:
                    yield term, at, node

    def scaled(self, factor: Fraction | int) -> "Expression":
        """This expression times an exact number."""
        raise NotImplementedError

    def __add__(self, other: object) -> "Sum":
        if isinstance(other, Expression):
            return Sum(self.terms + other.terms)
        raise TypeError(f"cannot add {_named(other)} to a network; expected a network or a sum")

    def __radd__(self, other: object) -> "Expression":
        """``0 + network``, with which ``sum([...])`` begins."""
        if isinstance(other, int) and other == 0:
            return self
        raise TypeError(f"cannot add a network to {_named(other)}; expected a network or a sum")

    def __neg__(self) -> Self:
        return self * -1

    def __sub__(self, other: object) -> "Sum":
        if isinstance(other, Expression):
            return self + -other
        raise TypeError(
            f"cannot subtract {_named(other)} from a network; expected a network or a sum"
        )

    def __mul__(self, factor: object) -> Self:
        """Times a number, which is taken as it is: a float stands for the fraction that it is."""
        if isinstance(factor, Expression):
            raise TypeError(
                "cannot multiply two networks by *; `connect` says which legs they share"
            )
        return cast(Self, self.scaled(_number(factor, "multiply a network by")))

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> Self:
        return cast(Self, self.scaled(1 / _number(divisor, "divide a network by")))

    def __repr__(self) -> str:
        """The equation, in angle brackets."""
        return f"<{self}>"

    def __str__(self) -> str:
        from tnconv.diagrams.notation import equation

        return equation(self)

    def reference(self, /, **operands: torch.Tensor) -> torch.Tensor:
        """The value, contracted densely in float64: see `tnconv.diagrams.reference`."""
        from tnconv.diagrams.reference import reference

        return reference(self, operands)

    def einsum(
        self,
        /,
        *,
        device: "torch.device | str | None" = None,
        dtype: torch.dtype | None = None,
        **operands: torch.Tensor,
    ) -> tuple[str, list[torch.Tensor]]:
        """This network as an equation and its operands, for any function like ``torch.einsum``.

        Index patterns and views that are more than a permutation become 0/1 tensors, and the scale
        a number. Without operands they are random tensors of a device and a dtype. The einsum's
        value has one dimension for each leg of the result that is longer than one: reshape it to
        the network's ``shape``.

        >>> from tnconv.diagrams import conv
        >>> net = conv((2, 3, 8), (4, 3, 3))
        >>> equation, arrays = net.einsum(device="meta")
        >>> equation, [tuple(array.shape) for array in arrays]
        ('nci,iko,dck->ndo', [(2, 3, 8), (8, 3, 6), (4, 3, 3)])
        >>> torch.einsum(equation, *arrays).reshape(net.shape).shape
        torch.Size([2, 4, 6])

        Raises:
            ValueError: a sum of several networks, or operands that do not fit.
        """
        from tnconv.diagrams.einsum import einsum

        return einsum(self, operands, device, dtype)

    @overload
    def draw(self, path: None = None, **options: Any) -> "Picture": ...
    @overload
    def draw(self, path: str | Path, **options: Any) -> Path: ...
    def draw(self, path: str | Path | None = None, **options: Any) -> "Path | Picture":
        """Write a picture, or without a path return it, for a notebook to show.

        The suffix gives the format; options are direction, sizes, labels, ones, highlight, theme,
        dpi and font: see `tnconv.diagrams.drawing.draw`.
        """
        from tnconv.diagrams.drawing import draw, picture

        return picture(self, **options) if path is None else draw(self, path, **options)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        from tnconv.diagrams.drawing import mimebundle

        return mimebundle(self)


def _number(value: object, what: str) -> Fraction:
    """A number, exactly."""
    if isinstance(value, Rational | float) and not isinstance(value, bool) and isfinite(value):
        return Fraction(value)
    raise TypeError(f"cannot {what} {_named(value)}; expected a finite int, Fraction or float")


def _named(value: object) -> str:
    """A number as it is, of everything else the type: a tensor's contents are never shown."""
    return repr(value) if isinstance(value, Number) else f"a {type(value).__name__}"


@dataclass(frozen=True, repr=False)
class Sum(Expression):
    """A sum of networks with equal result shapes: product rule, bias, ones-columns.

    It has the calculus of a network: what is linear acts on each term, and products distribute.

    Raises:
        ValueError: no terms, results of different shapes, or one operand of two shapes.
    """

    terms: tuple["TensorNetwork", ...]

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

    def sampled(self, leg: Leg, length: int, index: str | None = None) -> "Sum":
        """Every term `sampled <TensorNetwork.sampled>`, those without the leg excepted.

        Raises:
            ValueError: no term has the leg, a negative length, or the operand's name is in use.
        """
        if not any(leg in term.sizes for term in self.terms):
            legs = sorted({leg for term in self.terms for leg in term.sizes})
            raise ValueError(f"no leg {leg!r} to sample; the legs are {legs}")
        return Sum(
            tuple(
                term.sampled(leg, length, index) if leg in term.sizes else term
                for term in self.terms
            )
        )

    def scaled(self, factor: Fraction | int) -> "Sum":
        """This sum times an exact number."""
        return self._each(lambda term: term.scaled(factor))

    def narrow(self, leg: Leg, start: int, length: int, step: int = 1) -> "Sum":
        """Every term `narrowed <TensorNetwork.narrow>` to positions of an open leg.

        Args:
            leg: an open leg.
            start: its first position.
            length: how many positions are left.
            step: the distance between them.

        Raises:
            ValueError: a leg that no plain result axis of a term is, or positions outside of it.
        """
        return self._each(lambda term: term.narrow(leg, start, length, step))

    def marginal(self, *legs: Leg) -> "Sum":
        """The `marginal <TensorNetwork.marginal>` of every term: summed over plain axes.

        Raises:
            ValueError: a leg that no plain result axis of a term is.
        """
        return self._each(lambda term: term.marginal(*legs))

    def reshape(self, *shape: int) -> "Sum":
        """The same values in a result of another shape.

        Raises:
            ValueError: the number of entries differs.
        """
        return self._each(lambda term: term.reshape(*shape))

    def rename_operands(self, names: Mapping[str, str]) -> "Sum":
        """A copy with other operand names (operands that are not named keep theirs)."""
        return self._each(lambda term: term.rename_operands(names))

    def connect(self, other: Expression, share: Collection[Leg] = ()) -> "Sum":
        """The product of two sums: each term of one `connected <TensorNetwork.connect>` to each.

        Raises:
            ValueError: a shared leg that is missing in a term, or of two sizes.
        """
        return Sum(tuple(a.connect(b, share) for a in self.terms for b in other.terms))

    def gram(self, over: Collection[Leg], keep: Collection[Leg] = ()) -> "Sum":
        """The `gram <TensorNetwork.gram>` of a sum: the products of all pairs of its terms.

        >>> from tnconv.diagrams import conv
        >>> gradient = conv((8, 3, 9), (4, 3, 3)).vjp("weight", per_sample=True)
        >>> (gradient / 8).gram(over=("g", "d"), keep="n").shape
        (8, 3, 3, 3, 3)

        Raises:
            ValueError: a leg that no plain result axis of a term holds, or terms whose products
                have other shapes.
        """
        return Sum(tuple(a.matched(b, over, keep) for a in self.terms for b in self.terms))

    def _each(self, change: "Callable[[TensorNetwork], TensorNetwork]") -> "Sum":
        return Sum(tuple(change(term) for term in self.terms))

    if not TYPE_CHECKING:  # type checkers report what a sum lacks

        def __getattr__(self, name):
            from tnconv.diagrams.network import TensorNetwork

            if not name.startswith("_") and (
                hasattr(TensorNetwork, name) or name in TensorNetwork.__dataclass_fields__
            ):
                raise AttributeError(
                    f"a sum has no {name!r}; take that of a term: this one has {len(self.terms)}"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
