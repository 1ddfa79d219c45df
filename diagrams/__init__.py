"""Tensor networks of convolutions: the representation, its calculus, and the zoo of diagrams."""

from tnconv.diagrams.affine import (
    Axis,
    Leg,
    Node,
    Pattern,
    Selection,
    Tensor,
    View,
    delta,
    exactly,
    index_pattern,
    mask,
)
from tnconv.diagrams.average_pooling import avg_pool, pool_counts, reciprocal_counts
from tnconv.diagrams.composition import compose
from tnconv.diagrams.convolution_factors import (
    grad_expand,
    grad_reduce,
    kfac_expand,
    kfac_reduce,
    mean_patches,
)
from tnconv.diagrams.expression import Expression, Sum
from tnconv.diagrams.gradients import (
    diagonal_vjp,
    ggn_block,
    ggn_diagonal,
    ggn_vector_product,
    gradient_dots,
    gradient_norms,
    gradient_sum,
    hessian_vjp,
    ntk_block,
    per_sample_gradients,
)
from tnconv.diagrams.hyperparameters import Hyperparameters
from tnconv.diagrams.jacobian_products import combined_gradients, gradient_projections
from tnconv.diagrams.kronecker import input_factor, output_factor
from tnconv.diagrams.layer_networks import (
    bilinear,
    conv,
    conv_transpose,
    fold,
    linear,
    unfold,
    unfolded_kernel,
    with_bias,
)
from tnconv.diagrams.network import TensorNetwork
from tnconv.diagrams.padding import pad
from tnconv.diagrams.positionwise import bias, lookup, repeated, scale
from tnconv.diagrams.roles import Roles, input_half, output_half

__all__ = [
    "Axis",
    "Expression",
    "Hyperparameters",
    "Leg",
    "Node",
    "Pattern",
    "Roles",
    "Selection",
    "Sum",
    "Tensor",
    "TensorNetwork",
    "View",
    "avg_pool",
    "bias",
    "bilinear",
    "combined_gradients",
    "compose",
    "conv",
    "conv_transpose",
    "delta",
    "diagonal_vjp",
    "exactly",
    "fold",
    "ggn_block",
    "ggn_diagonal",
    "ggn_vector_product",
    "grad_expand",
    "grad_reduce",
    "gradient_dots",
    "gradient_norms",
    "gradient_projections",
    "gradient_sum",
    "hessian_vjp",
    "index_pattern",
    "input_factor",
    "input_half",
    "kfac_expand",
    "kfac_reduce",
    "linear",
    "lookup",
    "mask",
    "mean_patches",
    "ntk_block",
    "output_factor",
    "output_half",
    "pad",
    "per_sample_gradients",
    "pool_counts",
    "reciprocal_counts",
    "repeated",
    "scale",
    "unfold",
    "unfolded_kernel",
    "with_bias",
]
