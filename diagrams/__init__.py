"""Tensor networks of convolutions: the representation, its calculus, and the zoo of diagrams."""

from tnconv.diagrams.affine import (
    Axis,
    Leg,
    Node,
    Pattern,
    Tensor,
    View,
    delta,
    exactly,
    index_pattern,
    mask,
)
from tnconv.diagrams.curvature import kfac_expand, kfac_reduce
from tnconv.diagrams.expression import Expression, Sum
from tnconv.diagrams.layers import (
    avg_pool,
    conv,
    conv_transpose,
    fold,
    linear,
    unfold,
    unfolded_kernel,
    with_bias,
)
from tnconv.diagrams.network import TensorNetwork

__all__ = [
    "Axis",
    "Expression",
    "Leg",
    "Node",
    "Pattern",
    "Sum",
    "Tensor",
    "TensorNetwork",
    "View",
    "avg_pool",
    "conv",
    "conv_transpose",
    "delta",
    "exactly",
    "fold",
    "index_pattern",
    "kfac_expand",
    "kfac_reduce",
    "linear",
    "mask",
    "unfold",
    "unfolded_kernel",
    "with_bias",
]
