"""Saving, resuming and copying an optimizer that has more than torch's states and groups."""

from collections.abc import Collection
from copy import deepcopy
from itertools import chain
from typing import Any, ClassVar, Self

import torch
from torch import nn

from tnconv.optim.preconditioner import State


class Resumable(torch.optim.Optimizer):
    """An optimizer of a model's parameters, made from ``settings``, with a fallback beside it."""

    model: nn.Module
    settings: dict[str, Any]
    fallback: torch.optim.Optimizer | None
    own_dtypes: ClassVar[Collection[str] | None] = None
    """Entries of a parameter's state with a dtype of their own; None for all."""

    def state_dict(self) -> State:
        """Everything that a later run needs to go on exactly."""
        found: State = super().state_dict()
        if self.fallback is not None:
            found["fallback"] = self.fallback.state_dict()
        if (generator := self.settings.get("generator")) is not None:
            found["generator"] = generator.get_state()
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: State) -> None:
        """Go on from another run's `state_dict`; factors keep their own dtype."""
        given = dict(state_dict)
        fallback, generator = given.pop("fallback", None), given.pop("generator", None)
        super().load_state_dict(given)
        restore(self, given, self.own_dtypes)
        if self.fallback is not None and fallback is not None:
            self.fallback.load_state_dict(fallback)
        if generator is not None and self.settings.get("generator") is not None:
            self.settings["generator"].set_state(generator.cpu())
        self._resume()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        model = deepcopy(self.model, memo)
        groups = [
            group | {"params": [deepcopy(p, memo) for p in group["params"]]}
            for group in self.param_groups
        ]
        own: dict[str, Any] = {"params": groups}
        if (generator := self.settings.get("generator")) is not None:
            own["generator"] = generator.clone_state()
        twin = type(self)(model, **self.settings | own)  # type: ignore[arg-type]
        twin.load_state_dict(deepcopy(self.state_dict()))
        return twin

    def __getstate__(self) -> State:
        kind = type(self).__name__
        raise TypeError(f"{kind} cannot be pickled with its hooks; save its state_dict instead")

    def _resume(self) -> None:
        """Called after a state was loaded."""


def restore(
    optimizer: torch.optim.Optimizer,
    state_dict: State,
    names: Collection[str] | None = None,
) -> None:
    """Give entries of the state, by default all tensors, the dtype that they were saved in.

    Torch's own loading casts them to the dtype of their parameter.
    """
    keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    own = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for key, parameter in zip(keys, own, strict=True):
        for name, value in state_dict["state"].get(key, {}).items():
            if isinstance(value, torch.Tensor) and (names is None or name in names):
                optimizer.state[parameter][name] = value.to(parameter.device, copy=True)
