"""Steps of any optimizer, made so short that their predicted quadratic change stays small."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from math import inf
from typing import Any, Self, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tnconv.given import instances, optional
from tnconv.losses.diagonals import LossFunction, Method
from tnconv.optim.adahesscale import AdaHesScale, expect_diagonals
from tnconv.optim.diagonal_watch import DiagonalWatch
from tnconv.optim.workers import Workers


class StepSizeScaler(torch.optim.Optimizer):
    """``θ <- θ - min(c, √(2 δ / Σ h̄ u²)) u`` for the step u of another optimizer.

    ``½ Σ h̄ (scale u)² <= δ``: the second-order change that a diagonal ``h̄`` of the Hessian
    predicts is bounded, over all parameters or, with ``per_group``, over each group's. ``h̄ = √v``
    with ``v <- β v + (1 - β) h²``, not corrected for its start, and h from `tnconv.hesscale`'s
    recursion; an `AdaHesScale` inside lends its own. Source: Elsayed et al. 2024. The other
    optimizer's groups are this one's, so that schedules can be given either. How losses are seen
    is as in `AdaHesScale`.

    Args:
        optimizer: makes the steps: any of torch's that needs one evaluation, or of this library.
        model: whose losses are watched.
        loss_fn: the loss that the loop calls; not needed around `AdaHesScale`.
        delta: δ.
        max_scale: c.
        per_group: whether each group has its own bound.
        beta: β.
        method: of the recursion.
        process_group: the workers that average h, where there are several.

    >>> model, loss_fn = nn.Linear(3, 2), nn.MSELoss()
    >>> inner = torch.optim.SGD(model.parameters(), lr=10.0, momentum=0.9)
    >>> optimizer = StepSizeScaler(inner, model, loss_fn, delta=1e-3)
    >>> loss_fn(model(torch.rand(8, 3)), torch.rand(8, 2)).backward()
    >>> optimizer.step()
    >>> bool(optimizer.scales[0] < 1)
    True

    Raises:
        TypeError: an optimizer that is none.
        ValueError: a hyper-parameter out of its range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        loss_fn: LossFunction | None = None,
        delta: float = 1e-8,
        max_scale: float = 1.0,
        *,
        per_group: bool = False,
        beta: float = 0.999,
        method: Method = "hesscale",
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            given = type(optimizer).__name__
            raise TypeError(f"optimizer is a {given}; expected a torch.optim.Optimizer")
        for name, value in (("delta", delta), ("max_scale", max_scale)):
            if not 0 < value < inf:
                raise ValueError(f"{name} is {value!r}; expected a positive number")
        if not 0 <= beta < 1:
            raise ValueError(f"beta is {beta!r}; expected a number in [0, 1)")
        instances(model=model, **optional(loss_fn=loss_fn))
        self.optimizer, self.model = optimizer, model
        self.settings: dict[str, Any] = {"loss_fn": loss_fn, "delta": delta, "beta": beta}
        self.settings |= {"max_scale": max_scale, "per_group": per_group, "method": method}
        self.settings["process_group"] = process_group
        self.means: dict[Tensor, Tensor] = {}
        self.scales: Sequence[Tensor] = ()
        self._watch: DiagonalWatch | None = None
        if not isinstance(optimizer, AdaHesScale):
            self._watch = DiagonalWatch(model, loss_fn, method)
            self._workers = Workers(group=process_group, model=model)
            self._watch.parameters = self._all()

    def __getattr__(self, name: str) -> Any:
        """Groups, states and hooks are the other optimizer's."""
        if name in ("optimizer", "settings", "means"):
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def remove_hooks(self) -> None:
        """Stop watching the model."""
        if self._watch is not None:
            self._watch.stop()

    def propagate(self, output: Tensor, targets: Any, factor: float = 1.0) -> None:
        """Add to h what ``factor * loss_fn(output, targets)`` has, for losses of no module."""
        if self._watch is not None:
            self._watch.propagate(output, targets, factor)
        else:
            self.optimizer.propagate(output, targets, factor)  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters."""
        self.optimizer.add_param_group(param_group)
        if self._watch is not None:
            self._watch.parameters = self._all()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Let the other optimizer make its step, and take the part of it that the bound allows.

        Raises:
            RuntimeError: a parameter with a gradient, of which no loss was seen.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._measure()
        before = {p: p.clone() for p in self._all()}
        self.optimizer.step()
        self.scales = [self._shorten(group, before) for group in self._bounded()]
        return loss

    def _measure(self) -> None:
        """Update the means of h."""
        if self._watch is None:
            return
        found, beta = self._watch.found(self._workers), self.settings["beta"]
        expect_diagonals(self.optimizer, found, False)
        for p, h in found.items():
            if bool(torch.isfinite(h).all()):
                v = self.means.setdefault(p, torch.zeros_like(h))
                v.mul_(beta).add_(h.square(), alpha=1 - beta)
        self._watch.clear()

    def _shorten(self, parameters: Sequence[Tensor], before: dict[Tensor, Tensor]) -> Tensor:
        """Scale the step of some parameters together; the factor."""
        steps = {p: before[p] - p for p in parameters}
        parts = [
            _wide(h * u.square()) for p, u in steps.items() if (h := self._mean(p)) is not None
        ]
        device = parameters[0].device if parameters else None
        change = torch.stack([p.to(device) for p in parts]).sum() if parts else torch.zeros(())
        bound = (2 * self.settings["delta"] / change).sqrt()
        scale = bound.clamp(max=self.settings["max_scale"])
        for p, u in steps.items():
            own = scale.to(p.device)
            p.copy_(torch.where(own == 1, p, before[p] - own * u))
        return torch.as_tensor(scale)

    def _mean(self, parameter: Tensor) -> Tensor | None:
        if isinstance(self.optimizer, AdaHesScale):
            return self.optimizer.mean_diagonal(parameter)
        v = self.means.get(parameter)
        return None if v is None else v.sqrt()

    def _bounded(self) -> list[list[Tensor]]:
        """The parameters that have a bound together."""
        groups: list[list[Tensor]] = [g["params"] for g in self.optimizer.param_groups]
        return groups if self.settings["per_group"] else [self._all()]

    def _all(self) -> list[Any]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later run needs to go on exactly."""
        means = {at: self.means[p] for at, p in enumerate(self._all()) if p in self.means}
        return {"optimizer": self.optimizer.state_dict(), "means": means}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from another run's `state_dict`."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        own = self._all()
        self.means = {
            own[at]: v.to(own[at].device, copy=True) for at, v in state_dict["means"].items()
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        model = deepcopy(self.model, memo)
        twin = type(self)(deepcopy(self.optimizer, memo), model, **self.settings)
        twin.load_state_dict(deepcopy(self.state_dict()))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("StepSizeScaler cannot be pickled with its hooks; save its state_dict")

    def __repr__(self) -> str:
        return f"StepSizeScaler({self.optimizer!r}, delta={self.settings['delta']})"


def _wide(value: Tensor) -> Tensor:
    """The sum, in float32 at least."""
    return value.sum(dtype=torch.promote_types(value.dtype, torch.float32))
