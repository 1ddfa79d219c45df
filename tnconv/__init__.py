"""A tensor-network compiler for convolutions and everything computed around them."""

from torch import Tensor

from tnconv import (
    codegen,
    diagrams,
    functional,
    losses,
    models,
    nn,
    operators,
    optim,
    quantities,
    recursions,
)
from tnconv.codegen import Program, compile
from tnconv.codegen.programs.cache import cache_clear, cache_info, cached, place
from tnconv.diagrams import Expression, Sum, TensorNetwork
from tnconv.models import Result, compute, observe
from tnconv.operators import (
    FisherOperator,
    GGNOperator,
    HessianOperator,
    hesscale,
    hessian_diagonal,
)

__version__ = "0.1.0"
__all__ = [
    "Expression",
    "FisherOperator",
    "GGNOperator",
    "HessianOperator",
    "Program",
    "Result",
    "Sum",
    "TensorNetwork",
    "cache_clear",
    "cache_info",
    "codegen",
    "compile",
    "compute",
    "contract",
    "diagrams",
    "functional",
    "hesscale",
    "hessian_diagonal",
    "losses",
    "models",
    "nn",
    "observe",
    "operators",
    "optim",
    "quantities",
    "recursions",
]


def contract(network: Expression, **operands: Tensor) -> Tensor:
    """Compile a network and run it; equal networks (up to leg names) are compiled once.

    >>> import torch
    >>> net = diagrams.conv((8, 3, 32, 32), (16, 3, 3, 3), stride=2, padding=1)
    >>> contract(net, x=torch.rand(8, 3, 32, 32), weight=torch.rand(16, 3, 3, 3)).shape
    torch.Size([8, 16, 16, 16])

    Raises:
        ValueError: an operand is missing, unknown, or of another shape, dtype or device.
        TypeError: an operand is not a tensor.
    """
    return cached(_compiled, place(next(iter(operands.values()), None)), network)(**operands)


def _compiled(device: str, network: Expression) -> Program:
    return compile(network, device=device)
