"""Matrices of whole networks: products with curvature matrices, and exact Hessian diagonals."""

from tnconv.operators.approximate_diagonal import hesscale
from tnconv.operators.curvature_operators import CurvatureOperator, GGNOperator, HessianOperator
from tnconv.operators.fisher import FisherOperator
from tnconv.operators.hessian_diagonal import hessian_diagonal
from tnconv.operators.low_rank import LowRankGGN, low_rank_ggn, observe_low_rank

__all__ = [
    "CurvatureOperator",
    "FisherOperator",
    "GGNOperator",
    "HessianOperator",
    "LowRankGGN",
    "hesscale",
    "hessian_diagonal",
    "low_rank_ggn",
    "observe_low_rank",
]
