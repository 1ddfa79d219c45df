"""Drop-in modules for ``torch.nn`` that run on compiled diagrams, and how to swap them in."""

from tnconv.nn.conversion import convert, from_torch, revert, to_torch
from tnconv.nn.convolution import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvNd,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    ConvTransposeNd,
)
from tnconv.nn.folding import FoldNd, UnfoldNd

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvNd",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "ConvTransposeNd",
    "FoldNd",
    "UnfoldNd",
    "convert",
    "from_torch",
    "revert",
    "to_torch",
]
