"""Geometry under reparametrisation: metrics that are carried along, and what they keep."""

from tnconv.geometry.affine_maps import KroneckerAffine
from tnconv.geometry.assembled_metrics import BlockDiagonal, Dense
from tnconv.geometry.curvature_metrics import (
    ekfac_metric,
    fisher_metric,
    ggn_diagonal_metric,
    ggn_metric,
    kfac_metric,
    low_rank_metric,
)
from tnconv.geometry.damped_metrics import Estimate, Implicit, Summed
from tnconv.geometry.densities import laplace_evidence, riemannian_logpdf, riemannian_map
from tnconv.geometry.diagonal_metrics import Diagonal, Euclidean
from tnconv.geometry.eigenbasis_metrics import KroneckerEigen
from tnconv.geometry.elementwise_maps import DiagonalScale, Elementwise
from tnconv.geometry.fields import Constant, MetricField, christoffel_term, euclidean, pushed
from tnconv.geometry.gram_metrics import LowRank
from tnconv.geometry.invariance import assert_invariant
from tnconv.geometry.kronecker_metrics import Kronecker, KroneckerDamped
from tnconv.geometry.landscape import Landscape, hessian, model_landscape
from tnconv.geometry.layer_maps import (
    Permutation,
    parametrization_map,
    permuted_channels,
    relu_rescale,
)
from tnconv.geometry.measures import natural_gradient, shape_operator, sharpness
from tnconv.geometry.metric import Metric, Pushed, Scaled
from tnconv.geometry.metric_kernels import metric_ntk
from tnconv.geometry.network_evidence import network_evidence
from tnconv.geometry.network_fields import GaussNewtonField
from tnconv.geometry.network_forms import form_of, points_of
from tnconv.geometry.points import Bilinear, Covector, Endomorphism, Point, Vector
from tnconv.geometry.preconditioners import adam_metric, shampoo_metric, shampoo_statistics
from tnconv.geometry.reparametrization import Composition, Inverted, Reparametrization
from tnconv.geometry.shape import Density, ShapeOperator
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
    "Endomorphism",
    "Estimate",
    "Euclidean",
    "GaussNewtonField",
    "Implicit",
    "Inverted",
    "Kronecker",
    "KroneckerAffine",
    "KroneckerDamped",
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
    "fisher_metric",
    "form_of",
    "ggn_diagonal_metric",
    "ggn_metric",
    "hessian",
    "kfac_metric",
    "laplace_evidence",
    "low_rank_metric",
    "metric_ntk",
    "model_landscape",
    "natural_gradient",
    "network_evidence",
    "parametrization_map",
    "permuted_channels",
    "points_of",
    "pushed",
    "relu_rescale",
    "riemannian_logpdf",
    "riemannian_map",
    "shampoo_metric",
    "shampoo_statistics",
    "shape_operator",
    "sharpness",
]
