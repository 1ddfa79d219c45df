"""Which of torch's layers a memory-saving one replaces, and how models are swapped."""

from types import ModuleType

from torch import nn

from tnconv.nn.conversion import Kind, patched, register_originals, swapped_with_warning
from tnconv.nn.memory import activations, pooling, saving_layers
from tnconv.nn.memory.readers import attach_readers


def _originals(module: ModuleType) -> dict[Kind, Kind]:
    """Every layer that a module defines, by the one of torch's with its name."""
    found: dict[Kind, Kind] = {}
    for name, each in vars(module).items():
        own = isinstance(each, type) and each.__module__ == module.__name__
        if own and issubclass(each, nn.Module) and hasattr(nn, name):
            found[getattr(nn, name)] = each
    return found


_SAVING = _originals(activations) | _originals(pooling) | _originals(saving_layers)
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
