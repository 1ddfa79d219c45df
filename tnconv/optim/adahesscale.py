"""AdaHesScale: Adam's update with the Hessian's approximate diagonal in the place of gradients."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from math import inf
from typing import Any, Literal, Self, get_args, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tnconv.given import instances, optional
from tnconv.losses.diagonals import LossFunction, Method
from tnconv.operators.approximate_diagonal import accumulate
from tnconv.optim.diagonal_watch import DiagonalWatch
from tnconv.optim.saving import restore
from tnconv.optim.settings import Schedule, due
from tnconv.optim.workers import Workers

Variant = Literal["adam", "sqrt", "plain"]
Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]
GROUPED = ("lr", "betas", "eps", "weight_decay")


class AdaHesScale(torch.optim.Optimizer):
    """``θ <- (1 - η γ) θ - η / (1 - β₁ᵗ) m / (d + ε)`` with ``m <- β₁ m + (1 - β₁) g``.

    The diagonal h of the Hessian comes from `tnconv.hesscale`'s recursion, and

        "adam": ``v <- β₂ v + (1 - β₂) h²``, ``d = √(v / (1 - β₂ᵗ))``,
        "sqrt": ``v <- β₂ v + (1 - β₂) |h|``, ``d = √(v / (1 - β₂ᵗ))``,
        "plain": ``v`` as for "sqrt", ``d = v / (1 - β₂ᵗ)``.

    Source: Elsayed & Mahmood 2022 ("adam"). Every call of ``loss_fn``, a module, while the model is
    in training mode adds to h; for a function, call `propagate` before ``loss.backward()``, or
    `backward` in its place, which takes one pass for both. Passes between two steps count as
    micro-batches of one batch: their losses are to be divided by their number. Losses must not
    change scale afterwards, but for a ``GradScaler``'s, which is taken off again.

    Args:
        model: whose parameters learn.
        loss_fn: the loss that the loop calls.
        lr: η.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: γ, apart from the gradient.
        variant: how v and d are made.
        method: of the recursion, see `tnconv.hesscale`.
        update_diagonal_every: the steps in which h is measured; v stays as it is in the others.
        params: parameters, or groups of them with settings of their own; by default all.
        process_group: the workers that average h, where there are several.

    >>> model, loss_fn = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), nn.MSELoss()
    >>> optimizer = AdaHesScale(model, loss_fn, lr=0.01)
    >>> loss_fn(model(torch.rand(8, 3)), torch.rand(8, 2)).backward()
    >>> optimizer.step()
    >>> sorted(optimizer.state[model[0].weight])
    ['m', 'steps', 'updates', 'v']

    Raises:
        TypeError: a model that is no module.
        ValueError: a hyper-parameter out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        variant: Variant = "adam",
        method: Method = "hesscale",
        update_diagonal_every: Schedule = 1,
        params: Parameters | None = None,
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        settings = {k: v for k, v in locals().items() if k not in ("self", "model", "__class__")}
        instances(model=model, **optional(loss_fn=loss_fn))
        check(settings)
        self._watch = DiagonalWatch(model, loss_fn, method)
        self._workers = Workers(group=process_group, model=model)
        self.model, self.settings = model, settings | {"params": None}
        defaults = {name: settings[name] for name in GROUPED} | {"steps": 0}
        super().__init__(model.parameters() if params is None else params, defaults)
        self._resume()

    def remove_hooks(self) -> None:
        """Stop watching the model; later steps need `propagate`."""
        self._watch.stop()

    def propagate(self, output: Tensor, targets: Any, factor: float = 1.0) -> None:
        """Add to h what ``factor * loss_fn(output, targets)`` has, for losses of no module."""
        if not self._watch.paused:
            self._watch.propagate(output, targets, factor)

    def backward(self, output: Tensor, targets: Any, factor: float = 1.0) -> Tensor:
        """``(factor * loss_fn(output, targets)).backward()`` and `propagate` in one pass; the loss.

        Raises:
            ValueError: an optimizer without ``loss_fn``.
        """
        if not self._watch.paused:
            loss, gradients = self._watch.propagate(output, targets, factor, True)
            accumulate(gradients)
            return loss
        loss_fn = self.settings["loss_fn"]
        if loss_fn is None:
            raise ValueError("the optimizer was made without loss_fn; expected one for backward")
        own: Tensor = loss_fn(output, targets)
        (factor * own).backward()  # type: ignore[no-untyped-call]
        return own.detach()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more of the model's parameters."""
        super().add_param_group(param_group)
        check({name: self.param_groups[-1][name] for name in GROUPED})
        self._resume()

    def mean_diagonal(self, parameter: Tensor) -> Tensor | None:
        """``h̄``, the running mean of h without correction: ``√v`` for "adam", else v."""
        v: Tensor | None = self.state[parameter].get("v")
        return v.sqrt() if v is not None and self.settings["variant"] == "adam" else v

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the means and all parameters with a gradient.

        Raises:
            RuntimeError: a parameter with a gradient, of which no loss was seen.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = self._watch.found(self._workers)
        expect_diagonals(self, found, self._watch.paused)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, found.get(parameter), group)
            group["steps"] += 1
        self._watch.clear()
        self._resume()
        return loss

    def _update(self, parameter: Tensor, h: Tensor | None, group: Mapping[str, Any]) -> None:
        state, (first, second) = self.state[parameter], group["betas"]
        variant, grad = self.settings["variant"], parameter.grad
        assert grad is not None
        if h is not None and bool(torch.isfinite(h).all()):
            size = h.square() if variant == "adam" else h.abs()
            v = state.setdefault("v", torch.zeros_like(size))
            v.mul_(second).add_(size, alpha=1 - second)
            state["updates"] = state.get("updates", 0) + 1
        if "v" not in state:
            return
        state["steps"] = state.get("steps", 0) + 1
        m = state.setdefault("m", torch.zeros_like(grad, memory_format=torch.preserve_format))
        m.mul_(first).add_(grad, alpha=1 - first)
        d = state["v"] / (1 - second ** state["updates"])
        d = (d if variant == "plain" else d.sqrt_()).add_(group["eps"])
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] / (1 - first ** state["steps"])
        parameter.sub_((rate * m / d).to(parameter.dtype))

    def _resume(self) -> None:
        """Measure h where the next step is to, and in the first one."""
        self._watch.parameters = [p for group in self.param_groups for p in group["params"]]
        schedule, steps = self.settings["update_diagonal_every"], self.param_groups[0]["steps"]
        self._watch.paused = bool(self.state) and not due(schedule, steps)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from another run's `state_dict`; v keeps its own dtype."""
        super().load_state_dict(state_dict)
        restore(self, state_dict)
        self._resume()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        model = deepcopy(self.model, memo)
        groups = [
            group | {"params": [deepcopy(p, memo) for p in group["params"]]}
            for group in self.param_groups
        ]
        twin = type(self)(model, **self.settings | {"params": groups})
        twin.load_state_dict(deepcopy(self.state_dict()))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("AdaHesScale cannot be pickled with its hooks; save its state_dict instead")


def expect_diagonals(
    optimizer: torch.optim.Optimizer, found: Mapping[Tensor, Tensor], paused: bool
) -> None:
    """Check that a loss of every parameter with a gradient was seen, where one is due.

    Raises:
        RuntimeError: one was not.
    """
    learning = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    missing = [p for p in learning if p not in found]
    if missing and not paused:
        raise RuntimeError(
            f"{len(missing)} of {len(learning)} parameters have a gradient, but no loss of them "
            "was seen; call the loss_fn that the optimizer was given (a module), in training mode, "
            "or propagate(output, targets), before loss.backward()"
        )


def check(settings: Mapping[str, Any]) -> None:
    """Raise unless all hyper-parameters are in their ranges.

    Raises:
        ValueError: one that is not.
    """
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= settings[name] < inf:
            raise ValueError(f"{name} is {settings[name]!r}; expected a number, at least 0")
    betas = settings["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas is {betas!r}; expected two numbers in [0, 1)")
    if settings.get("variant", "adam") not in get_args(Variant):
        raise ValueError(f"variant is {settings['variant']!r}; expected 'adam', 'sqrt' or 'plain'")
    every = settings.get("update_diagonal_every", 1)
    if not callable(every) and not (every >= 1 and every % 1 == 0):
        raise ValueError(
            f"update_diagonal_every is {every!r}; expected an int, at least 1, or a callable"
        )
