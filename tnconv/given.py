"""What every entry expects of its first arguments, checked before any work and refused in words."""

from typing import Any

from torch import Tensor, nn


def instances(**given: Any) -> None:
    """Check that arguments are no classes, that a model is one, and that a loss can be called.

    Raises:
        TypeError: one that is not.
    """
    for name, value in given.items():
        if isinstance(value, type):
            kind = value.__name__
            raise TypeError(f"{name} is the class {kind}; expected an instance, {kind}(...)")
        if name == "model" and not isinstance(value, nn.Module):
            raise TypeError(f"model is {_kind(value)}; expected a torch.nn.Module")
        if name == "loss_fn" and not callable(value):
            raise TypeError(
                f"loss_fn is {_kind(value)}; expected a function of outputs and targets"
            )


def optional(**given: Any) -> dict[str, Any]:
    """Those arguments that are given: ``instances(model=model, **optional(loss_fn=loss_fn))``."""
    return {name: value for name, value in given.items() if value is not None}


def _kind(value: object) -> str:
    """Its type, and a tensor's shape: contents are never shown."""
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    return f"a {type(value).__name__}{shape}"
