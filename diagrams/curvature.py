"""Curvature diagrams: two copies of a layer's diagram, connected."""

from collections.abc import Sequence
from fractions import Fraction

from tnconv.diagrams.geometry import IntOrTuple, Padding, geometry
from tnconv.diagrams.layers import patches
from tnconv.diagrams.network import TensorNetwork


def kfac_expand(
    input_shape: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> TensorNetwork:
    """The input-based KFAC-expand (KFC) factor ``A[g, ck, c'k'] = 1/N Σ_{n,o} U U'``.

    ``U[n, g, c, k, o]`` is the unfolded input, operand ``x`` of shape ``(n, gc, *i)``; the two
    copies share n, g and o. Result ``(g, c·K, c·K)``: one factor per group. Unbatched input counts
    as one sample, and the factor of an empty batch is zero. Source: Grosse & Martens 2016 (KFC);
    Eschenhagen et al. 2023 for the name.

    >>> kfac_expand((8, 4, 32, 32), 3, groups=2).shape
    (2, 18, 18)

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    h = geometry(input_shape, kernel_size, stride, padding, dilation, groups)
    factor = patches(h).gram(over=(*h.samples, *h.legs("o")), keep=("g",))
    return factor.reshape(groups, h.patch, h.patch).scaled(Fraction(1, max(1, h.batch or 1)))


def kfac_reduce(
    input_shape: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> TensorNetwork:
    """The input-based KFAC-reduce factor ``A[g, ck, c'k'] = 1/(N O²) Σ_n (Σ_o U)(Σ_o' U')``.

    As `kfac_expand`, but each copy is averaged over its own output positions. Source: Eschenhagen
    et al. 2023.

    >>> kfac_reduce((8, 4, 32, 32), 3, groups=2).shape
    (2, 18, 18)

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    h = geometry(input_shape, kernel_size, stride, padding, dilation, groups)
    summed = patches(h).marginal(*h.legs("o")).scaled(Fraction(1, h.positions))
    factor = summed.gram(over=h.samples, keep=("g",))
    return factor.reshape(groups, h.patch, h.patch).scaled(Fraction(1, max(1, h.batch or 1)))
