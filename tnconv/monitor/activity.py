"""Units that are dead or saturated: what activations give, for all samples of a step."""

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tnconv.models.capture import Inert
from tnconv.models.checkpoints import in_backward
from tnconv.monitor.needs import Activity

RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Threshold, nn.Hardshrink, nn.Softshrink)
BOUNDED: Mapping[type[nn.Module], tuple[float, float]] = {
    nn.Sigmoid: (0.0, 1.0),
    nn.Hardsigmoid: (0.0, 1.0),
    nn.Tanh: (-1.0, 1.0),
    nn.Hardtanh: (-1.0, 1.0),
    nn.Softsign: (-1.0, 1.0),
}
"""The limits of activations that saturate."""


class ActivityWatch:
    """Which units gave nothing but zero, or how many entries were next to a limit, by layer.

    A unit is a position of the output without its batch dimension, a channel where there are
    further dimensions.
    """

    def __init__(self, model: nn.Module, needs: Iterable[Activity]) -> None:
        self.model, self.needs = model, tuple(needs)
        self.alive: dict[str, Tensor] = {}
        self.saturated: dict[tuple[Activity, str], tuple[Tensor, int]] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, module in self.model.named_modules():
            kind = type(module)
            if kind in RECTIFIERS or kind in BOUNDED:
                self._handles.append(module.register_forward_hook(Inert(_Named(self, name).seen)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    @torch.no_grad()
    def saw(self, name: str, module: nn.Module, output: Tensor) -> None:
        """Take note of what an activation gave."""
        y = output.detach()
        if type(module) in RECTIFIERS:
            over = [dim for dim in range(y.dim()) if dim != 1] if y.dim() > 1 else [0]
            alive = (y != 0).any(dim=over[0]) if len(over) == 1 else (y != 0).sum(over) > 0
            before = self.alive.get(name)
            same = before is not None and before.shape == alive.shape
            self.alive[name] = before | alive if same and before is not None else alive
            return
        low, high = BOUNDED[type(module)]
        for need in self.needs:
            margin = (1 - need.saturation) * (high - low) / 2
            count = ((y < low + margin) | (y > high - margin)).sum()
            before_count, total = self.saturated.get((need, name), (0, 0))
            self.saturated[need, name] = count + before_count, total + y.numel()

    def dead(self) -> dict[str, float]:
        """The fraction of dead units by layer of rectifiers."""
        return {name: 1 - float(alive.double().mean()) for name, alive in self.alive.items()}

    def at_limits(self, need: Activity) -> dict[str, float]:
        """The fraction of saturated entries by layer of bounded activations."""
        found = {name: pair for (own, name), pair in self.saturated.items() if own == need}
        return {name: float(count) / total for name, (count, total) in found.items() if total}


class _Named:
    def __init__(self, watch: ActivityWatch, name: str) -> None:
        self.watch, self.name = watch, name

    def seen(self, module: nn.Module, args: Any, output: Any) -> None:
        grad = isinstance(output, Tensor) and torch.is_grad_enabled() and not in_backward()
        if grad and module.training:
            self.watch.saw(self.name, module, output)
