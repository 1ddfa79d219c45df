"""Empirical neural tangent kernels, and whether they describe a network."""

from tnconv.ntk.continual import accuracy_matrix, forgetting, kernel_overlap
from tnconv.ntk.drift import Drift, drift_kernels, jacobian_drift
from tnconv.ntk.empirical import empirical_ntk
from tnconv.ntk.incremental import IncrementalNTK, Theory
from tnconv.ntk.kernel_operator import NTKOperator
from tnconv.ntk.linear_model import (
    LinearizedModel,
    linearization_gap,
    linearize,
    parameter_travel,
)
from tnconv.ntk.parametrizations import parametrization_scales
from tnconv.ntk.predictions import Prediction, ggn_spectrum, glm_covariance, ntk_predict
from tnconv.ntk.spectrum import (
    centred_alignment,
    effective_rank,
    kernel_distance,
    kernel_drift,
    smallest_eigenvalue,
    spectrum,
    target_alignment,
)
from tnconv.ntk.stability import StableJacobian, stable_jacobian
from tnconv.ntk.width_sweep import Slope, WidthSweep, WidthTable

__all__ = [
    "Drift",
    "IncrementalNTK",
    "LinearizedModel",
    "NTKOperator",
    "Prediction",
    "Slope",
    "StableJacobian",
    "Theory",
    "WidthSweep",
    "WidthTable",
    "accuracy_matrix",
    "centred_alignment",
    "drift_kernels",
    "effective_rank",
    "empirical_ntk",
    "forgetting",
    "ggn_spectrum",
    "glm_covariance",
    "jacobian_drift",
    "kernel_distance",
    "kernel_drift",
    "kernel_overlap",
    "linearization_gap",
    "linearize",
    "ntk_predict",
    "parameter_travel",
    "parametrization_scales",
    "smallest_eigenvalue",
    "spectrum",
    "stable_jacobian",
    "target_alignment",
]
