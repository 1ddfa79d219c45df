"""Optimizers that run on compiled diagrams."""

from tnconv.optim.adahesscale import AdaHesScale
from tnconv.optim.kfac import KFAC
from tnconv.optim.low_rank_newton import LowRankNewton
from tnconv.optim.rf_shampoo import RFShampoo
from tnconv.optim.root_free import RFAdamW, RFRMSProp
from tnconv.optim.singd import SINGD
from tnconv.optim.step_size_scaler import StepSizeScaler

__all__ = [
    "KFAC",
    "SINGD",
    "AdaHesScale",
    "LowRankNewton",
    "RFAdamW",
    "RFRMSProp",
    "RFShampoo",
    "StepSizeScaler",
]
