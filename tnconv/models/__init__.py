"""Whole networks: watching a model, and quantities of every parameter."""

from tnconv.models.driver import compute, observe
from tnconv.models.fisher import FisherOperator
from tnconv.models.hessian_diagonal import hessian_diagonal
from tnconv.models.layers import Operation, register_layer
from tnconv.models.observation import Observation
from tnconv.models.operators import CurvatureOperator, GGNOperator, HessianOperator
from tnconv.models.result import Result

__all__ = [
    "CurvatureOperator",
    "FisherOperator",
    "GGNOperator",
    "HessianOperator",
    "Observation",
    "Operation",
    "Result",
    "compute",
    "hessian_diagonal",
    "observe",
    "register_layer",
]
