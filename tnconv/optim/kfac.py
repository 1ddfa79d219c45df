"""KFAC: gradient descent preconditioned by Kronecker-factored curvature."""

from collections.abc import Callable, Mapping
from functools import partial
from math import inf
from typing import Any, overload
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from tnconv.optim.factors import (
    Flavour,
    Layer,
    Statistics,
    damped_inverses,
    has_factors,
    inverse,
    statistics,
)

State = dict[str, Any]
Watcher = Callable[[Layer, Tensor, Tensor], None]


class KFAC(torch.optim.Optimizer):
    """``P(G) = (B + √λ/π I)⁻¹ G (A + π√λ I)⁻¹``,  ``v <- μ v + ν P(G) + γ W``,  ``W <- W - η v``.

    G is the gradient of the weight W as a matrix ``(d, c·K)``, one per group; A and B are running
    averages (decay β) of the Kronecker factors of the *empirical* Fisher, in the ``flavour``
    ``"expand"`` or ``"reduce"``, computed by compiled diagrams: see `tnconv.optim.factors`, also
    for their scale, which takes the loss to be a *mean* over the batch. The trust region
    ``ν = min(1, √(κ / (η² Σ ⟨G, P(G)⟩)))`` bounds the step in the curvature's own norm. η is
    ``lr``, μ ``momentum``, λ ``damping``, β ``decay``, γ ``weight_decay``, κ ``kl_clip``
    (``math.inf``: no bound).

    * ``nn.Linear`` and ``nn.Conv1d/2d/3d`` (any groups, dilation, padding and padding mode) are
      preconditioned. Their biases are blocks of their own, with ``A = 1``: ``(B + λ I)⁻¹ G``.
    * All other parameters, also those of subclasses of these layers, are trained by SGD with the
      same lr, momentum and weight decay; so is a layer whose factors were never seen.
    * Factors are collected while gradients flow through layers in training mode, at every
      ``update_factors_every``-th step; passes in evaluation mode never touch them. Inverses are
      refreshed at every ``update_inverses_every``-th step, and at each of the first so many.
      Passes under ``torch.func`` are not watched, and ``torch.compile`` breaks at watched layers.
    * Micro-batches between two steps count as one batch, exactly so for losses divided by their
      number. So do several uses of one layer in one pass. ``zero_grad`` drops what was collected.
    * ``state_dict`` holds plain tensors and numbers. Copies and pickles of the model carry inert
      hooks, `remove_hooks` removes them; do not copy the optimizer: make another, load its state.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    >>> optimizer = KFAC(model, lr=0.05, damping=1e-2, flavour="reduce")
    >>> model(torch.rand(8, 1, 8, 8)).square().mean().backward()
    >>> optimizer.step()
    >>> {name: tuple(a.shape) for name, a in optimizer.state[model[0].weight].items() if name < "a"}
    {'A': (1, 9, 9), 'B': (1, 4, 4), 'A_inverse': (1, 9, 9), 'B_inverse': (1, 4, 4)}

    Raises:
        ValueError: a hyper-parameter out of its range, or a model without parameters.
        TypeError: a model that is no module.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        momentum: float = 0.9,
        damping: float = 1e-2,
        decay: float = 0.95,
        weight_decay: float = 0.0,
        flavour: Flavour = "reduce",
        kl_clip: float = 1e-4,
        update_factors_every: int = 1,
        update_inverses_every: int = 10,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name in _ALLOWED}
        _check(model, settings)
        super().__init__(model.parameters(), settings | {"steps": 0})
        layers = [module for module in model.modules() if has_factors(module)]
        self._layers = {layer.weight: layer for layer in layers}
        self._statistics: dict[Tensor, Statistics] = {}
        hook = Hook(WeakMethod(self._watch))
        self._hooks = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]

    def remove_hooks(self) -> None:
        """Stop watching the model; later steps use the factors collected so far."""
        while self._hooks:
            self._hooks.pop().remove()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, and what was collected for the factors since the last step."""
        self._statistics.clear()
        super().zero_grad(set_to_none)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update factors and inverses where they are due, then all parameters with a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for weight, layer in self._layers.items():
            self._update_factors(weight)
            self._update_inverses(layer)
        for group in self.param_groups:
            for parameter, direction in self._directions(group).items():
                _descend(parameter, direction, self.state[parameter], group)
            group["steps"] += 1
        return loss

    def _directions(self, group: Mapping[str, Any]) -> dict[Tensor, Tensor]:
        """``ν P(G)`` where there are factors, else G, for the parameters with a gradient."""
        grads = {p: p.grad for p in group["params"] if p.grad is not None}
        factored = [p for p in grads if "B_inverse" in self.state[p]]
        natural = {p: _preconditioned(grads[p], self.state[p]) for p in factored}
        slopes = sum((grads[p] * natural[p]).float().sum() for p in factored)
        change = torch.as_tensor(group["lr"] ** 2 * slopes).clamp(min=0)
        trust = (group["kl_clip"] / change).sqrt().clamp(max=1)
        return grads | {p: trust.to(direction) * direction for p, direction in natural.items()}

    def _due(self, setting: str) -> bool:
        """Whether this step is one of every so many; the model's parameters are the first group."""
        group = self.param_groups[0]
        return bool(group["steps"] % group[setting] == 0)

    def _watch(self, layer: Layer, x: Tensor, output: Tensor) -> None:
        """Ask for the gradient after the output, if the layer learns and factors are due."""
        own = layer.weight in self._layers and not is_functorch_wrapped_tensor(output)
        learns = any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
        active = layer.training and output.requires_grad and self._due("update_factors_every")
        if own and learns and active:
            output.register_hook(partial(self._collect, layer, x.detach()))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _collect(self, layer: Layer, x: Tensor, grad_output: Tensor) -> None:
        found = statistics(layer, x, grad_output.detach(), self.param_groups[0]["flavour"])
        seen = self._statistics.get(layer.weight)
        self._statistics[layer.weight] = found if seen is None else seen + found

    def _update_factors(self, weight: Tensor) -> None:
        """``A <- A + (1 - β)/(1 - βᵗ) (A_t - A)``: weights βᵗ⁻ʲ for update j, normalised."""
        found = self._statistics.pop(weight, None)
        if found is None or not found.samples:
            return
        state, decay = self.state[weight], self.param_groups[0]["decay"]
        state["updates"] = state.get("updates", 0) + 1
        share = (1 - decay) / (1 - decay ** state["updates"])
        for name, new in zip("AB", found.factors, strict=True):
            old = state.setdefault(name, new)
            state[name] = old.lerp(new.to(old.dtype), share)

    def _update_inverses(self, layer: Layer) -> None:
        state, damping = self.state.get(layer.weight, {}), self.param_groups[0]["damping"]
        group = self.param_groups[0]
        early = group["steps"] < group["update_inverses_every"] or "A_inverse" not in state
        if "A" not in state or not (early or self._due("update_inverses_every")):
            return
        inverses = damped_inverses(state["A"], state["B"], damping)
        state["A_inverse"], state["B_inverse"] = inverses
        if layer.bias is not None:
            self.state[layer.bias]["B_inverse"] = inverse(state["B"], damping)


class Hook:
    """Shows a layer's input and output to a watcher that still lives; copies show it to nobody."""

    def __init__(self, watcher: Callable[[], Watcher | None]) -> None:
        self._watcher = watcher

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it would recompile every step
    def __call__(
        self, layer: Layer, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], output: Tensor
    ) -> None:
        if (watch := self._watcher()) is not None:
            watch(layer, args[0] if args else kwargs["input"], output)

    def __reduce__(self) -> tuple[object, ...]:
        return Hook, (_nobody,)


def _nobody() -> None:
    return None


def _descend(parameter: Tensor, direction: Tensor, state: State, group: Mapping[str, Any]) -> None:
    """``v <- μ v + direction + γ W``,  ``W <- W - η v``."""
    if group["weight_decay"]:
        direction = direction.add(parameter, alpha=group["weight_decay"])
    if group["momentum"]:
        buffer = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
        direction = buffer.mul_(group["momentum"]).add_(direction)
    parameter.add_(direction, alpha=-group["lr"])


def _preconditioned(grad: Tensor, state: State) -> Tensor:
    """``P(G) = B⁻¹ G A⁻¹`` per group of a weight, ``B⁻¹ G`` for a bias."""
    left: Tensor = state["B_inverse"]
    matrix = left @ grad.to(left.dtype).reshape(*left.shape[:2], -1)
    if "A_inverse" in state:
        matrix = matrix @ state["A_inverse"]
    return matrix.reshape(grad.shape).to(grad.dtype)


_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda value: 0 <= value < inf, "a number, at least 0"),
    "momentum": (lambda value: 0 <= value < 1, "a number in [0, 1)"),
    "damping": (lambda value: 0 < value < inf, "a positive number"),
    "decay": (lambda value: 0 <= value < 1, "a number in [0, 1)"),
    "weight_decay": (lambda value: 0 <= value < inf, "a number, at least 0"),
    "flavour": (lambda value: value in ("expand", "reduce"), "'expand' or 'reduce'"),
    "kl_clip": (lambda value: value > 0, "a positive number"),
    "update_factors_every": (lambda value: value >= 1 and value % 1 == 0, "an int, at least 1"),
    "update_inverses_every": (lambda value: value >= 1 and value % 1 == 0, "an int, at least 1"),
}
"""What each hyper-parameter may be, as a test and in words."""


def _check(model: object, settings: Mapping[str, Any]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    for name, value in settings.items():
        allowed, words = _ALLOWED[name]
        if not allowed(value):
            raise ValueError(f"{name} is {value!r}; expected {words}")
