"""Gauss-Newton matrices of low rank: Gram matrices, eigenpairs, Newton steps, solves."""

from tnconv.operators.low_rank.block import DirectionalDerivatives, Eigenpairs, LowRankBlock
from tnconv.operators.low_rank.damping import constant, noise_aware, relative
from tnconv.operators.low_rank.ggn import LowRankGGN, low_rank_ggn
from tnconv.operators.low_rank.observed import LowRankObservation, observe_low_rank
from tnconv.operators.low_rank.orders import ORDERS, Order, Orders
from tnconv.operators.low_rank.rows import JacobianRows

__all__ = [
    "ORDERS",
    "DirectionalDerivatives",
    "Eigenpairs",
    "JacobianRows",
    "LowRankBlock",
    "LowRankGGN",
    "LowRankObservation",
    "Order",
    "Orders",
    "constant",
    "low_rank_ggn",
    "noise_aware",
    "observe_low_rank",
    "relative",
]
