"""Accounts of the layers of a whole model, which is given as ``module:factory``."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tnconv.commands.accounts import Account, account
from tnconv.commands.asked_layers import OF_LAYER
from tnconv.diagrams import Expression, TensorNetwork
from tnconv.models.layers import describes, operation_of


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


def model_accounts(
    model: nn.Module, shape: Sequence[int], operation: str, measure: bool
) -> tuple[list[Account], list[str]]:
    """An account of each described layer with a weight, and the names of those that are not.

    Raises:
        ValueError: an operation that starts from shapes instead of layers.
    """
    if operation not in OF_LAYER:
        raise ValueError(
            f"--operation is {operation!r}; expected for a model: {', '.join(OF_LAYER)}"
        )
    accounts, others = [], []
    for name, module, inputs, output in _calls(model, torch.randn(*shape)):
        title = f"{name} ({type(module).__name__})"
        layer = _layer(module, inputs, output)
        if layer is None:
            others.append(title)
            continue
        accounts.append(account(title, OF_LAYER[operation](layer), None, measure))
    return accounts, others


def _layer(module: nn.Module, inputs: list[Tensor], output: Tensor) -> TensorNetwork | None:
    if not describes(module, inputs, tuple(output.shape)):
        return None
    networks = operation_of(module, inputs, tuple(output.shape)).networks
    layer: Expression | None = networks.get("weight")
    return (
        layer.terms[0] if layer is not None and {"x", "weight"} <= layer.operands.keys() else None
    )


def _calls(model: nn.Module, x: Tensor) -> list[tuple[str, nn.Module, list[Tensor], Tensor]]:
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
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return calls
