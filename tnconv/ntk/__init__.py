"""Empirical neural tangent kernels, and whether they describe a network."""

from tnconv.ntk.empirical import empirical_ntk
from tnconv.ntk.kernel_operator import NTKOperator
from tnconv.ntk.parametrizations import parametrization_scales

__all__ = ["NTKOperator", "empirical_ntk", "parametrization_scales"]
