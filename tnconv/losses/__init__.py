"""Losses: roots of their Hessians in the model's outputs, and what their mean divides by."""

from tnconv.losses.policies import A2CLoss, Actions, GaussianNLLLoss, PPOLoss
from tnconv.losses.reductions import Reduction, batch_size, divisor, reduction_of
from tnconv.losses.roots import Curvature, curvature, recognised

__all__ = [
    "A2CLoss",
    "Actions",
    "Curvature",
    "GaussianNLLLoss",
    "PPOLoss",
    "Reduction",
    "batch_size",
    "curvature",
    "divisor",
    "recognised",
    "reduction_of",
]
