"""Geometry under reparametrisation: metrics that are carried along, and what they keep."""

from tnconv.geometry.curvature_metrics import (
    Implicit,
    LowRank,
    ekfac_metric,
    ggn_diagonal_metric,
    ggn_metric,
    kfac_metric,
)
from tnconv.geometry.densities import laplace_evidence, riemannian_logpdf, riemannian_map
from tnconv.geometry.diagonal_metrics import Diagonal, Euclidean, adam_metric
from tnconv.geometry.elementwise_maps import DiagonalScale, Elementwise
from tnconv.geometry.fields import Constant, MetricField, christoffel_term, euclidean, pushed
from tnconv.geometry.invariance import assert_invariant
from tnconv.geometry.kronecker_metrics import Kronecker, KroneckerEigen, shampoo_metric
from tnconv.geometry.landscape import Landscape, model_hessian, model_landscape
from tnconv.geometry.layer_maps import (
    KroneckerAffine,
    Permutation,
    parametrization_map,
    permuted_channels,
    relu_rescale,
)
from tnconv.geometry.measures import natural_gradient, sharpness
from tnconv.geometry.metric import BlockDiagonal, Dense, Metric, Pushed, Scaled, Summed
from tnconv.geometry.points import Bilinear, Covector, Point, Vector
from tnconv.geometry.reparametrization import Composition, Inverted, Reparametrization
from tnconv.geometry.shape_operator import Density, ShapeOperator
from tnconv.geometry.submersions import BatchNormFold, TorchParametrization, WeightNorm

__all__ = [
    "BatchNormFold",
    "Bilinear",
    "BlockDiagonal",
    "Composition",
    "Constant",
    "Covector",
    "Dense",
    "Density",
    "Diagonal",
    "DiagonalScale",
    "Elementwise",
    "Euclidean",
    "Implicit",
    "Inverted",
    "Kronecker",
    "KroneckerAffine",
    "KroneckerEigen",
    "Landscape",
    "LowRank",
    "Metric",
    "MetricField",
    "Permutation",
    "Point",
    "Pushed",
    "Reparametrization",
    "Scaled",
    "ShapeOperator",
    "Summed",
    "TorchParametrization",
    "Vector",
    "WeightNorm",
    "adam_metric",
    "assert_invariant",
    "christoffel_term",
    "ekfac_metric",
    "euclidean",
    "ggn_diagonal_metric",
    "ggn_metric",
    "kfac_metric",
    "laplace_evidence",
    "model_hessian",
    "model_landscape",
    "natural_gradient",
    "parametrization_map",
    "permuted_channels",
    "pushed",
    "relu_rescale",
    "riemannian_logpdf",
    "riemannian_map",
    "shampoo_metric",
    "sharpness",
]
