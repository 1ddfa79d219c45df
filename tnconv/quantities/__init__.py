"""What can be computed of a whole network, next to its gradient, in the field's words."""

from tnconv.quantities.base import LossGradient, Quantity, Statistic, Vectors
from tnconv.quantities.first_order import (
    DotProducts,
    Gradient,
    PerSampleGradients,
    SecondMoment,
    SquaredNorms,
    SumOfSquares,
    Variance,
)

__all__ = [
    "DotProducts",
    "Gradient",
    "LossGradient",
    "PerSampleGradients",
    "Quantity",
    "SecondMoment",
    "SquaredNorms",
    "Statistic",
    "SumOfSquares",
    "Variance",
    "Vectors",
]
