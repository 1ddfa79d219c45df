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
from tnconv.diagrams.layers import conv, linear, unfold, with_bias
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
    "conv",
    "delta",
    "exactly",
    "index_pattern",
    "kfac_expand",
    "kfac_reduce",
    "linear",
    "mask",
    "unfold",
    "with_bias",
]
