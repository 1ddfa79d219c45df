"""Kronecker factors of any layer that is linear in a parameter, and their scales.

For a weight w, a layer is ``y[n, g, d, o] = Σ_a w[g, d, a] U[n, g, a, o]``: its patches U meet the
weight at output positions o, in groups g. With vectors v after the layer, its per-sample gradients
are ``J[m, n, g, d, a] = Σ_o v[m, n, g, d, o] U[n, g, a, o]``, and KFAC approximates every group's
block ``Σ_{m,n} J Jᵀ`` of the Gauss-Newton or Fisher matrix by ``B[g, d, d'] ⊗ A[g, a, a']``. This
is the one place where their scale is stated. With N samples, O output positions and the sums
``ū[n] = Σ_o U[n, o]`` and ``v̄[m, n] = Σ_o v[m, n, o]``:

    flavour   scale   A                        B
    expand    ggn     1/(N·O) Σ_{n,o} U Uᵀ     Σ_{m,n,o} v vᵀ
    expand    kfc     1/N Σ_{n,o} U Uᵀ         1/O Σ_{m,n,o} v vᵀ
    reduce    both    1/(N·O²) Σ_n ū ūᵀ        Σ_{m,n} v̄ v̄ᵀ
    hybrid    ggn     1/(N·O) Σ_{n,o} U Uᵀ     Σ_{m,n} v̄ v̄ᵀ
    hybrid    kfc     1/N Σ_{n,o} U Uᵀ         Σ_{m,n} v̄ v̄ᵀ

"ggn", the default everywhere, makes "expand" and "reduce" equal to the block for deep linear
networks with squared errors, where the loss sees every position by itself or their mean
(Eschenhagen et al. 2023). "kfc" are the factors as Grosse & Martens (2016) define them: the product
of "expand" is the same. "hybrid" with "kfc" is BackPACK's, whose product is O times larger. A bias
has the patch 1: its A is 1 and its B the one of "ggn". `input_factor` leaves out 1/N, since factors
of several batches, micro-batches or workers add up before they are divided by all their samples.

What the vectors v are decides of which matrix ``Σ_m v vᵀ`` is a block. For a loss
``L = c Σ_n ℓ[n]`` with ``c = 1/N`` (reduction "mean") or ``c = 1`` ("sum"), with M sampled targets:

    Fisher          Σ_m v[m, n] v[m, n]ᵀ
    type-2          c ∂²ℓ[n] / ∂y ∂yᵀ, by all columns of a root
    mc              c/M Σ_m s[m, n] s[m, n]ᵀ, with s the gradient of ℓ[n] at the m-th sampled target
    empirical       c s[n] s[n]ᵀ, with s the gradient of ℓ[n] at the given target
    forward-only    no vectors: B is the identity

A gradient of L itself is ``c s[n]``: for the empirical Fisher, B of such vectors is multiplied by
1/c. Calls of a layer that a network uses several times are further positions.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import prod
from typing import Literal

from tnconv.diagrams.affine import Leg
from tnconv.diagrams.expression import Sum
from tnconv.diagrams.network import TensorNetwork
from tnconv.diagrams.ones import with_ones
from tnconv.diagrams.roles import Roles, input_half, output_half

Flavour = Literal["expand", "reduce", "hybrid"]
Convention = Literal["ggn", "kfc"]
Scale = Convention | Fraction | int


def input_factor(
    layer: TensorNetwork,
    operand: str = "weight",
    flavour: Flavour = "expand",
    joint: bool = False,
    per_group: bool = True,
    scale: Scale = "ggn",
) -> TensorNetwork | Sum:
    """``A[g, a, a'] = 1/O Σ_{n,o} U[n, g, a, o] U[n, g, a', o]``, for "expand": N times the table.

    >>> from tnconv.diagrams import conv
    >>> layer = conv((8, 4, 32, 32), (6, 2, 3, 3), groups=2)
    >>> input_factor(layer).shape, input_factor(layer, joint=True, per_group=False).shape
    ((2, 18, 18), (1, 19, 19))

    Args:
        layer: a network that is linear in the operand.
        operand: the parameter, "weight" or "bias".
        flavour: "expand", "reduce" or "hybrid".
        joint: end every patch with an entry 1: the factor of weight and bias.
        per_group: False averages over groups.
        scale: a convention of the table above, or what multiplies the plain sum instead.

    Raises:
        ValueError: a layer without the operand.
    """
    roles, half = Roles.of(layer, operand), input_half(layer, operand)
    if flavour == "reduce":
        half = half.marginal(*roles.positions)
    factor = half.gram(_summed(half, "n", *roles.positions), roles.groups)
    factor = factor.scaled(_input_scale(roles, layer.size(roles.positions), flavour, scale))
    joint = joint and not roles.alone
    terms = with_ones(factor, len(roles.groups)).terms if joint else factor.terms
    shaped = _blocks(terms, roles.groups, layer.size(roles.patch) + joint, per_group)
    return shaped[0] if len(shaped) == 1 else Sum(shaped)


def output_factor(
    layer: TensorNetwork,
    operand: str = "weight",
    vectors: int | None = None,
    flavour: Flavour = "expand",
    per_group: bool = True,
    scale: Scale = "ggn",
) -> TensorNetwork:
    """``B[g, d, d'] = Σ_{m,n,o} v[m, n, g, d, o] v[m, n, g, d', o]``, for the flavour "expand".

    Operand ``grad_output`` as the layer's result, with m in front unless ``vectors`` is None.

    >>> from tnconv.diagrams import conv
    >>> output_factor(conv((8, 4, 32, 32), (6, 2, 3, 3), groups=2), vectors=5).shape
    (2, 3, 3)

    Args:
        layer: a network that is linear in the operand.
        operand: the parameter, "weight" or "bias".
        vectors: how many vectors, or None for one without a dimension of its own.
        flavour: "expand", "reduce" or "hybrid".
        per_group: False averages over groups.
        scale: a convention of the table above, or what multiplies the plain sum instead.

    Raises:
        ValueError: a layer without the operand.
    """
    roles, half = Roles.of(layer, operand), output_half(layer, operand, vectors)
    if flavour != "expand":
        half = half.marginal(*roles.positions)
    factor = half.gram(_summed(half, "m", "n", *roles.positions), roles.groups)
    factor = factor.scaled(_output_scale(roles, layer.size(roles.positions), flavour, scale))
    (block,) = _blocks(factor.terms, roles.groups, layer.size(roles.outputs), per_group)
    return block


def _input_scale(roles: Roles, positions: int, flavour: Flavour, scale: Scale) -> Fraction:
    """The number before the sum in A, without the one over samples."""
    if not isinstance(scale, str):
        return Fraction(scale)
    _check_convention(scale)
    if flavour == "reduce":
        return _one_over(positions) ** 2
    return Fraction(1) if scale == "kfc" and not roles.alone else _one_over(positions)


def _output_scale(roles: Roles, positions: int, flavour: Flavour, scale: Scale) -> Fraction:
    """The number before the sum in B."""
    if not isinstance(scale, str):
        return Fraction(scale)
    _check_convention(scale)
    divided = scale == "kfc" and flavour == "expand" and not roles.alone
    return _one_over(positions) if divided else Fraction(1)


def _check_convention(scale: str) -> None:
    if scale not in ("ggn", "kfc"):
        raise ValueError(f"scale is {scale!r}; expected 'ggn', 'kfc' or a number")


def _one_over(count: int) -> Fraction:
    """``1 / count``, and 1 where there is nothing to average."""
    return Fraction(1, max(1, count))


def _summed(half: TensorNetwork, *legs: Leg) -> tuple[Leg, ...]:
    """Those of the legs that the half still shows: its copies share them."""
    return tuple(leg for leg in legs if leg in half.open_legs)


def _blocks(
    terms: Sequence[TensorNetwork], groups: Sequence[Leg], entries: int, per_group: bool
) -> tuple[TensorNetwork, ...]:
    """One block per group, or their mean."""
    count = prod(terms[0].sizes[leg] for leg in groups)
    if not per_group:
        terms = [term.marginal(*groups).scaled(_one_over(count)) for term in terms]
        count = 1
    return tuple(term.reshape(count, entries, entries) for term in terms)
