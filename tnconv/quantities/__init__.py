"""What can be computed of a whole network, next to its gradient, in the field's words."""

from tnconv.quantities.base import LossGradient, Quantity, Statistic, Vectors
from tnconv.quantities.columns import ExactColumns, NoColumns, SampledColumns
from tnconv.quantities.first_order import (
    DotProducts,
    Gradient,
    PerSampleGradients,
    SecondMoment,
    SquaredNorms,
    SumOfSquares,
    Variance,
)
from tnconv.quantities.hesscale import HesScale
from tnconv.quantities.kronecker_factors import KFAC, KFLR, KroneckerFactors
from tnconv.quantities.recursive import kfra
from tnconv.quantities.second_order import GGNDiagonal

__all__ = [
    "KFAC",
    "KFLR",
    "DotProducts",
    "ExactColumns",
    "GGNDiagonal",
    "Gradient",
    "HesScale",
    "KroneckerFactors",
    "LossGradient",
    "NoColumns",
    "PerSampleGradients",
    "Quantity",
    "SampledColumns",
    "SecondMoment",
    "SquaredNorms",
    "Statistic",
    "SumOfSquares",
    "Variance",
    "Vectors",
    "kfra",
]
