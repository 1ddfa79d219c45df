"""Optimizers that run on compiled diagrams."""

from tnconv.optim.kfac import KFAC

__all__ = ["KFAC"]
