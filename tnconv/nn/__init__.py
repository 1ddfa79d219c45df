"""Drop-in modules for ``torch.nn`` that run on compiled diagrams, and how to swap them in."""

from tnconv.nn import memory
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
from tnconv.nn.memory import save_memory
from tnconv.nn.tensor_dropout import (
    TensorDropoutConv1d,
    TensorDropoutConv2d,
    TensorDropoutConv3d,
    TensorDropoutLinear,
    tensor_dropout,
)

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
    "TensorDropoutConv1d",
    "TensorDropoutConv2d",
    "TensorDropoutConv3d",
    "TensorDropoutLinear",
    "UnfoldNd",
    "convert",
    "from_torch",
    "memory",
    "revert",
    "save_memory",
    "tensor_dropout",
    "to_torch",
]
