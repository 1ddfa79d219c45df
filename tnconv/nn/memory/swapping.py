"""Memory-saving layers: torch's, storing for backward only what the gradients of a call need.

Each is a drop-in module for the one of torch's with its name; `save_memory` swaps them in.
"""

from torch import nn

from tnconv.nn.conversion import Kind, patched, register_originals, swapped_with_warning
from tnconv.nn.memory.activations import (
    CELU,
    ELU,
    SELU,
    Dropout,
    Hardshrink,
    Hardsigmoid,
    Hardtanh,
    LeakyReLU,
    ReLU,
    ReLU6,
    Softplus,
    Softshrink,
    Threshold,
)
from tnconv.nn.memory.pooling import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
)
from tnconv.nn.memory.readers import attach_readers
from tnconv.nn.memory.saving_layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    Linear,
)

__all__ = [
    "CELU",
    "ELU",
    "SELU",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Dropout",
    "GroupNorm",
    "Hardshrink",
    "Hardsigmoid",
    "Hardtanh",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "ReLU",
    "ReLU6",
    "Softplus",
    "Softshrink",
    "Threshold",
    "save_memory",
]

_SAVING: dict[Kind, Kind] = {
    getattr(nn, name): globals()[name] for name in __all__ if hasattr(nn, name)
}
register_originals({ours: torchs for torchs, ours in _SAVING.items()})


def save_memory(model: nn.Module) -> nn.Module:
    """A new model in which each of torch's layers that can store less was swapped.

    It shares all but the modules with the given one, which stays as it is, like `convert`'s. The
    values and the gradients are torch's. What a call stores follows from which of its operands are
    differentiable then, so parameters can be frozen and modes be switched at any time. Where
    ``torch.fx`` can trace the model, its activations know who reads them, and store bits where
    nobody stores their output. Subclasses of torch's modules are left alone, with a warning.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    >>> saving = save_memory(model)
    >>> saving[0].weight is model[0].weight, saving[1].plan
    (True, 'torch')
    >>> saving[2].requires_grad_(False)
    Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1))
    >>> saving[1].plan
    'bits'

    `revert` gives a model of torch's modules again.
    """
    new = swapped_with_warning(model, _kind, tuple(_SAVING), tuple(_SAVING.values()))
    attach_readers(new, model)
    return new


def _kind(module: nn.Module) -> Kind | None:
    return None if patched(module) else _SAVING.get(type(module))
