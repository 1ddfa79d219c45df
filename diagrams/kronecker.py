"""Kronecker factors of any layer that is linear in a parameter, found by what its legs do.

For a weight w, a layer is ``y[n, g, d, o] = Σ_a w[g, d, a] U[n, g, a, o]``, and its per-sample
gradients are ``J[m, n, g, d, a] = Σ_o v[m, n, g, d, o] U[n, g, a, o]``. KFAC approximates every
group's block ``Σ_{m,n} J Jᵀ`` of the Gauss-Newton or Fisher matrix by ``B[g, d, d'] A[g, a, a']``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Literal

from tnconv.diagrams.affine import Leg, Tensor, View
from tnconv.diagrams.curvature import with_ones
from tnconv.diagrams.expression import Expression, Sum
from tnconv.diagrams.network import TensorNetwork

Flavour = Literal["expand", "reduce", "hybrid"]


@dataclass(frozen=True)
class Roles:
    """What each leg of a layer is to one of its parameters; legs in the parameter's order.

    ``groups`` g are in the parameter, the result and x: blocks that see nothing of each other.
    ``outputs`` d are in the parameter and the result, ``patch`` a in the parameter alone, and
    ``positions`` o in the result alone, beside the batch.
    """

    groups: tuple[Leg, ...]
    outputs: tuple[Leg, ...]
    patch: tuple[Leg, ...]
    positions: tuple[Leg, ...]

    @classmethod
    def of(cls, layer: TensorNetwork, operand: str = "weight") -> "Roles":
        """The roles of a layer's legs.

        >>> from tnconv.diagrams import conv
        >>> Roles.of(conv((8, 4, 32), (6, 2, 3), groups=2))
        Roles(groups=('g',), outputs=('d',), patch=('c', 'k1'), positions=('o1',))

        Raises:
            ValueError: a layer without the operand.
        """
        own = list(dict.fromkeys(_parameter(layer, operand).legs))
        result = layer.result.legs
        others = {leg for node in layer.tensors if node.name != operand for leg in node.legs}
        return cls(
            tuple(leg for leg in own if leg in result and leg in others),
            tuple(leg for leg in own if leg in result and leg not in others),
            tuple(leg for leg in own if leg not in result),
            tuple(leg for leg in dict.fromkeys(result) if leg not in (*own, "n")),
        )


def input_factor(
    layer: TensorNetwork,
    operand: str = "weight",
    vectors: int | None = None,
    flavour: Flavour = "expand",
    joint: bool = False,
    per_group: bool = True,
) -> Expression:
    """``A[g, a, a'] = 1/O Σ_{n,o} U[n, g, a, o] U[n, g, a', o]``, for the flavour "expand".

    For "reduce" it is ``Σ_n ū ū'`` with ``ū[n, g, a] = 1/O Σ_o U``; "hybrid" is BackPACK's, as
    "expand" without 1/O but for a bias. With ``joint``, patches end with an entry 1: the block of
    weight and bias. ``per_group=False`` averages over groups. ``vectors`` are not read.

    >>> from tnconv.diagrams import conv
    >>> layer = conv((8, 4, 32, 32), (6, 2, 3, 3), groups=2)
    >>> input_factor(layer).shape, input_factor(layer, joint=True, per_group=False).shape
    ((2, 18, 18), (1, 19, 19))

    Raises:
        ValueError: a layer without the operand.
    """
    roles, half = Roles.of(layer, operand), input_half(layer, operand)
    average = Fraction(1, max(1, _size(layer, roles.positions)))
    if flavour == "reduce":
        half = half.marginal(*roles.positions).scaled(average)
    factor = half.gram(_summed(half, "n", *roles.positions), roles.groups)
    alone = not (roles.groups or roles.patch)  # a bias, whose patches are nothing but a 1
    factor = factor.scaled(average if flavour == "expand" or (alone and flavour == "hybrid") else 1)
    joint = joint and not alone
    terms = with_ones(factor, len(roles.groups)).terms if joint else factor.terms
    return _blocks(terms, roles.groups, _size(layer, roles.patch) + joint, per_group)


def output_factor(
    layer: TensorNetwork,
    operand: str = "weight",
    vectors: int | None = None,
    flavour: Flavour = "expand",
    per_group: bool = True,
) -> Expression:
    """``B[g, d, d'] = Σ_{m,n,o} v[m, n, g, d, o] v[m, n, g, d', o]``, for the flavour "expand".

    For "reduce" and "hybrid", v is summed over o first. Operand ``grad_output`` as the layer's
    result, with m in front unless ``vectors`` is None.

    >>> from tnconv.diagrams import conv
    >>> output_factor(conv((8, 4, 32, 32), (6, 2, 3, 3), groups=2), vectors=5).shape
    (2, 3, 3)

    Raises:
        ValueError: a layer without the operand.
    """
    roles, half = Roles.of(layer, operand), output_half(layer, operand, vectors)
    if flavour != "expand":
        half = half.marginal(*roles.positions)
    factor = half.gram(_summed(half, "m", "n", *roles.positions), roles.groups)
    return _blocks(factor.terms, roles.groups, _size(layer, roles.outputs), per_group)


def input_half(layer: TensorNetwork, operand: str = "weight") -> TensorNetwork:
    """The patches ``U[n, g, a, o]``, one result dimension per leg: the layer without its parameter.

    >>> from tnconv.diagrams import conv
    >>> input_half(conv((8, 4, 32), (6, 2, 3), groups=2)).shape
    (8, 2, 2, 3, 30)

    Raises:
        ValueError: a layer without the operand.
    """
    roles = Roles.of(layer, operand)
    nodes = (n for n in layer.nodes if not isinstance(n, Tensor) or n.name != operand)
    sizes = {leg: size for leg, size in layer.sizes.items() if leg not in roles.outputs}
    view = View.of(sizes, "n", *roles.groups, *roles.patch, *roles.positions)
    return layer.with_(nodes, view, sizes)


def output_half(
    layer: TensorNetwork, operand: str = "weight", vectors: int | None = None
) -> TensorNetwork:
    """``v[m, n, g, d, o]``, operand ``grad_output`` with one result dimension per leg.

    >>> from tnconv.diagrams import conv
    >>> output_half(conv((8, 4, 32), (6, 2, 3), groups=2), vectors=5).shape
    (5, 8, 2, 3, 30)

    Raises:
        ValueError: a layer without the operand.
    """
    roles = Roles.of(layer, operand)
    extra = {} if vectors is None else {"m": vectors}
    sizes = {leg: layer.sizes[leg] for leg in layer.result.legs} | extra
    given = Tensor("grad_output", layer.result.prepend(sizes, extra))
    view = View.of(sizes, *extra, "n", *roles.groups, *roles.outputs, *roles.positions)
    return TensorNetwork((given,), view, sizes)


def sample_count(
    layer: TensorNetwork, operand: str = "weight", vectors: int | None = None
) -> TensorNetwork:
    """``Σ_n 1``, a scalar: the samples of a layer, over which its factors are averaged.

    >>> from tnconv.diagrams import linear
    >>> sample_count(linear((8, 5, 3), (4, 3))).reference()
    tensor(8., dtype=torch.float64)
    """
    return TensorNetwork((), View((), ()), {"n": layer.sizes["n"]})


def _parameter(layer: TensorNetwork, operand: str) -> View:
    found = [node.view for node in layer.tensors if node.name == operand]
    if len(found) != 1:
        raise ValueError(f"the layer holds {operand!r} in {len(found)} places; expected one")
    return found[0]


def _size(layer: TensorNetwork, legs: Sequence[Leg]) -> int:
    return prod(layer.sizes[leg] for leg in legs)


def _summed(half: TensorNetwork, *legs: Leg) -> tuple[Leg, ...]:
    """Those of the legs that the half still shows: its copies share them."""
    return tuple(leg for leg in legs if leg in half.open_legs)


def _blocks(
    terms: Sequence[TensorNetwork], groups: Sequence[Leg], entries: int, per_group: bool
) -> Expression:
    """One block per group, or their mean."""
    count = prod(terms[0].sizes[leg] for leg in groups)
    if not per_group:
        terms = [term.marginal(*groups).scaled(Fraction(1, max(1, count))) for term in terms]
        count = 1
    shaped = tuple(term.reshape(count, entries, entries) for term in terms)
    return shaped[0] if len(shaped) == 1 else Sum(shaped)
