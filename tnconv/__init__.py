"""A tensor-network compiler for convolutions and everything computed around them."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tnconv import interruption

if interruption.is_command():  # before torch is imported, which takes long enough to be interrupted
    sys.excepthook = interruption.hook

from torch import Tensor

from tnconv import diagrams
from tnconv.diagrams import Expression, Sum, TensorNetwork

if TYPE_CHECKING:
    from tnconv import (
        codegen,
        functional,
        geometry,
        losses,
        models,
        monitor,
        nn,
        ntk,
        operators,
        optim,
        quantities,
        recursions,
    )
    from tnconv.codegen import Program, compile
    from tnconv.codegen.tiers import Build, cache_clear, cache_info, tiered_compilation, warm
    from tnconv.models import Result, compute, observe
    from tnconv.operators import (  # type: ignore[no-redef]
        FisherOperator,
        GGNOperator,
        HessianOperator,
        LowRankGGN,
        hesscale,
        hessian_diagonal,
        low_rank_ggn,
        observe_low_rank,
    )

__version__ = "0.1.0"
__all__ = [
    "Expression",
    "FisherOperator",
    "GGNOperator",
    "HessianOperator",
    "LowRankGGN",
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
    "geometry",
    "hesscale",
    "hessian_diagonal",
    "losses",
    "low_rank_ggn",
    "models",
    "monitor",
    "nn",
    "ntk",
    "observe",
    "observe_low_rank",
    "operators",
    "optim",
    "quantities",
    "recursions",
    "tiered_compilation",
    "warm",
]

_OF_MODELS = ("Result", "compute", "observe")
_OF_OPERATORS = (
    *("FisherOperator", "GGNOperator", "HessianOperator", "LowRankGGN"),
    *("hesscale", "hessian_diagonal", "low_rank_ggn", "observe_low_rank"),
)
_OF_TIERS = ("cache_clear", "cache_info", "tiered_compilation", "warm")
_FOLDERS = (
    *("codegen", "functional", "geometry", "losses", "models", "monitor", "nn", "ntk"),
    *("operators", "optim", "quantities", "recursions"),
)
_WHERE = {
    **dict.fromkeys(("Program", "compile"), "codegen"),
    **dict.fromkeys(_OF_TIERS, "codegen.tiers"),
    **dict.fromkeys(_OF_MODELS, "models"),
    **dict.fromkeys(_OF_OPERATORS, "operators"),
}
"""What is imported when it is asked for, so that diagrams alone do not wait for it."""


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return import_module(f"tnconv.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'tnconv' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"tnconv.{_WHERE[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def contract(network: Expression, /, **operands: Tensor) -> Tensor:
    """Compile a network and run it; equal networks (up to leg names) are compiled once.

    The first call runs a program that is made without a search: see `tiered_compilation`.

    >>> import torch
    >>> net = diagrams.conv((8, 3, 32, 32), (16, 3, 3, 3), stride=2, padding=1)
    >>> contract(net, x=torch.rand(8, 3, 32, 32), weight=torch.rand(16, 3, 3, 3)).shape
    torch.Size([8, 16, 16, 16])

    Raises:
        ValueError: an operand is missing, unknown, or of another shape, dtype or device.
        TypeError: an operand is not a tensor.
    """
    from tnconv.codegen.tiers import device_of, looked_up

    device = device_of(next(iter(operands.values()), None))
    program: Program = looked_up(_compiled, device, network)
    return program(**operands)


def _compiled(compiled: "Build", device: str, network: Expression) -> "Program":
    return compiled(network, device=device)
