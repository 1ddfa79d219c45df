"""The layers of a whole model, which is given as ``module:factory``, and accounts of them."""

import importlib
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tnconv.commands.accounts import Account, account
from tnconv.commands.asked_layers import OF_LAYER, OPTIONS, SETTINGS
from tnconv.commands.contestants import Way, contestants
from tnconv.diagrams import Expression, TensorNetwork
from tnconv.models.layers import describes, operation_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class ModelLayer:
    """One layer of a model: its title, its network or None, and other ways to the operation."""

    title: str
    network: Expression | None
    ways: Mapping[str, Way]


def loaded(name: str) -> nn.Module:
    """The model that a call of ``module:factory`` returns, or that the name is.

    Raises:
        ValueError: the module or the name in it is not found, or gives no module.
    """
    where, _, called = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(where)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"no module {error.name!r} for {name!r}; expected module:factory"
        ) from None
    finally:
        sys.path.pop(0)
    made = getattr(found, called, None)
    model = made if isinstance(made, nn.Module) or not callable(made) else made()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name!r} gives a {type(model).__name__}; expected a torch.nn.Module")
    return model


def model_layers(model: nn.Module, shape: Sequence[int], operation: str) -> list[ModelLayer]:
    """Every layer with parameters of its own, in the order of the calls.

    Raises:
        ValueError: an operation that starts from shapes instead of layers, or an input that the
            model does not take.
    """
    if operation not in OF_LAYER:
        raise ValueError(
            f"--operation is {operation!r}; expected for a model: {', '.join(OF_LAYER)}"
        )
    return list(_model_layers(model, shape, operation))


def _model_layers(model: nn.Module, shape: Sequence[int], operation: str) -> Iterator[ModelLayer]:
    for name, module, inputs, output in _calls(model, shape):
        layer = _layer(module, inputs, output)
        network = None if layer is None else OF_LAYER[operation](layer)
        asked = _asked(module, inputs, operation)
        ways = contestants(asked) if asked is not None and network is not None else {}
        yield ModelLayer(f"{name} ({type(module).__name__})", network, ways)


def model_accounts(layers: Iterable[ModelLayer], measure: bool) -> tuple[list[Account], list[str]]:
    """An account of each described layer with a weight, and the titles of those that are not."""
    accounts, others = [], []
    for layer in layers:
        if layer.network is None:
            others.append(layer.title)
        else:
            accounts.append(account(layer.title, layer.network, layer.ways, measure))
    return accounts, others


def _asked(module: nn.Module, inputs: list[Tensor], operation: str) -> Namespace | None:
    """The arguments with which the command line would name a layer, if it can."""
    if isinstance(module, nn.Linear) and inputs[0].dim() > 1:
        kind = "linear"
    elif isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) and module.padding_mode == "zeros":
        kind = "conv_transpose" if isinstance(module, TRANSPOSED) else "conv"
        if inputs[0].dim() != module.weight.dim():
            return None
    else:
        return None
    settings = {name: getattr(module, name) for name in SETTINGS[kind]}
    return Namespace(
        layer=kind,
        input=[*inputs[0].shape],
        operation=operation,
        **dict.fromkeys(OPTIONS) | settings | {"weight": [*module.weight.shape]},
    )


def _layer(module: nn.Module, inputs: list[Tensor], output: Tensor) -> TensorNetwork | None:
    if not describes(module, inputs, tuple(output.shape)):
        return None
    networks = operation_of(module, inputs, tuple(output.shape)).networks
    layer: Expression | None = networks.get("weight")
    return (
        layer.terms[0] if layer is not None and {"x", "weight"} <= layer.operands.keys() else None
    )


def _calls(
    model: nn.Module, shape: Sequence[int]
) -> list[tuple[str, nn.Module, list[Tensor], Tensor]]:
    """What every module with parameters of its own reads and gives."""
    calls: list[tuple[str, nn.Module, list[Tensor], Tensor]] = []

    def watch(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            if isinstance(output, Tensor):
                read = [each for each in args if isinstance(each, Tensor)]
                calls.append((name, module, read, output))

        handles.append(module.register_forward_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            watch(name or "model", module)
    try:
        with torch.no_grad():
            model(torch.randn(*shape))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the model takes no input of shape {tuple(shape)}: {reason}") from error
    finally:
        for handle in handles:
            handle.remove()
    return calls
