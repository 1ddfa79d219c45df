"""Exact numbers as settings of operations: what a graph of ``torch.compile`` can hold."""

from fractions import Fraction
from typing import overload

from tnconv.diagrams.kronecker import Convention

Number = float | Fraction
Ratio = float | tuple[int, int]


@overload
def ratio(scale: Number) -> Ratio: ...
@overload
def ratio(scale: Number | Convention) -> Ratio | Convention: ...
def ratio(scale: Number | Convention) -> Ratio | Convention:
    """A fraction as two ints; other numbers and the names of conventions stay.

    Raises:
        TypeError: no number, nor a name.
    """
    if isinstance(scale, (str, int, float)):  # asking for a Fraction takes longer
        return scale
    if not isinstance(scale, Fraction):
        raise TypeError(f"scale is {scale!r}; expected 'ggn', 'kfc' or a number")
    return scale.numerator, scale.denominator


@overload
def exact(scale: Ratio) -> Fraction: ...
@overload
def exact(scale: Ratio | Convention) -> Fraction | Convention: ...
def exact(scale: Ratio | Convention) -> Fraction | Convention:
    """What `ratio` was given."""
    if isinstance(scale, tuple):
        return Fraction(*scale)
    return scale if isinstance(scale, str) else Fraction(scale)
