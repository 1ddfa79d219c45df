"""Adaptive methods without the square root.

A mean loss has the gradient ``g = 1/B Σ_n g_n``, and ``B g²`` estimates the diagonal of the
empirical Fisher matrix: with it, unlike with its root, a step is a natural gradient step. Source:
Lin et al. 2024, "Can we remove the square root in adaptive gradient methods? A second-order
perspective". The factor B keeps hyper-parameters from depending on the batch size.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from math import inf
from typing import Any, overload

import torch
from torch import Tensor, nn

from tnconv.optim.batch_sizes import BatchSize, Samples
from tnconv.optim.memory import Memory, size
from tnconv.optim.saving import restore

Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]
Alike = list[tuple[torch.dtype, list[nn.Parameter]]]


class RootFree(torch.optim.Optimizer):
    """What `RFRMSProp` and `RFAdamW` have in common: all parameters of a kind in one kernel."""

    def __init__(self, params: Parameters, batch_size: BatchSize, defaults: dict[str, Any]) -> None:
        self._samples = Samples(batch_size)
        super().__init__(params, defaults)

    def memory(self) -> Memory:
        """How many bytes the state has of each parameter, by group and place, and by kind."""
        sizes, states = {}, {}
        for at, group in enumerate(self.param_groups):
            for place, p in enumerate(p for p in group["params"] if p.requires_grad):
                name, each = f"{at}.{place}", size(p, group["state_dtype"])
                sizes[name] = size(p)
                states[name] = {"s": each} | ({"m": each} if group.get("momentum", 1) else {})
        return Memory(sizes, states)

    def remove_hooks(self) -> None:
        """Stop counting the samples of a model."""
        self._samples.stop()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients; samples whose gradients no step has used count no longer."""
        self._samples.drop_unused()
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name, value in group.items():
            allowed, words = _ALLOWED.get(name, (lambda value: True, ""))
            if not allowed(value):
                raise ValueError(f"{name} is {value!r}; expected {words}")
        if any(p.is_complex() for p in group["params"]):
            raise NotImplementedError("a parameter is complex; expected real parameters")

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters with a gradient.

        Raises:
            RuntimeError: no samples were counted, or a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        samples = self._samples.take()
        for group in self.param_groups:
            for dtype, parameters in _alike(group):
                self._start(parameters, dtype, samples, group)
                grads = [p.grad for p in parameters if p.grad is not None]
                if any(p.dtype != dtype for p in parameters):
                    grads = [grad.to(dtype) for grad in grads]
                self._update(parameters, grads, samples, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from another run's `state_dict`; the state keeps its own dtype."""
        super().load_state_dict(state_dict)
        restore(self, state_dict)
        self._samples.forget()

    def __getstate__(self) -> dict[str, Any]:
        return dict(super().__getstate__()) | {"samples": self._samples.given}

    def __setstate__(self, state: dict[str, Any]) -> None:
        given = dict(state)
        if "samples" in given:  # a copy; loading a state calls this, too
            self._samples = Samples(given.pop("samples"))
        super().__setstate__(given)

    @abstractmethod
    def _update(
        self, parameters: list[Any], grads: list[Tensor], samples: float, group: Mapping[str, Any]
    ) -> None:
        """The formula, for parameters of one device and dtype."""

    def _start(
        self,
        parameters: list[nn.Parameter],
        dtype: torch.dtype,
        samples: float,
        group: Mapping[str, Any],
    ) -> None:
        """``s = 1/B``, so that a first step is one of gradient descent, and nothing else.

        A state follows its parameter to another device or dtype.
        """
        for parameter in parameters:
            state = self.state[parameter]
            for name in {"s", "m"} & state.keys():
                state[name] = state[name].to(parameter.device, dtype)
            if not state:
                state["s"] = torch.full_like(parameter, 1 / samples, dtype=dtype)
                if group.get("momentum", 1):
                    state["m"] = torch.zeros_like(parameter, dtype=dtype)
                if group.get("bias_correction"):
                    state["step"] = 0

    def _states(self, parameters: list[nn.Parameter], name: str) -> list[Tensor]:
        return [self.state[parameter][name] for parameter in parameters]


class RFRMSProp(RootFree):
    """``s <- β s + (1 - β) g²``,  ``v <- μ v + g / (B s + ε) + γ w``,  ``w <- w - η v``.

    ``s`` starts at ``1/B``. η is ``lr``, β ``decay``, ε ``eps``, μ ``momentum``, γ
    ``weight_decay``.

    Args:
        params: parameters, or groups of them.
        lr: the learning rate η.
        decay: β in [0, 1).
        eps: ε, positive.
        weight_decay: γ, at least 0.
        momentum: μ in [0, 1).
        batch_size: B, a number, a callable, or the model whose samples are counted; 1 for losses
            that are sums.
        state_dtype: what s and v are stored and computed in, by default the parameter's.

    >>> weight = nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = RFRMSProp([weight], lr=0.1, momentum=0.0, batch_size=4, eps=1e-8)
    >>> (2 * weight).sum().backward()
    >>> optimizer.step()
    >>> weight.data  # 1 - 0.1 · 2 / (0.99 + 0.01 · 4 · 4)
    tensor([0.8261])
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 5e-3,
        decay: float = 0.99,
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        *,
        batch_size: BatchSize,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {"lr": lr, "decay": decay, "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            params, batch_size, defaults | {"momentum": momentum, "state_dtype": state_dtype}
        )

    def _update(
        self, parameters: list[Any], grads: list[Tensor], samples: float, group: Mapping[str, Any]
    ) -> None:
        s = self._states(parameters, "s")
        torch._foreach_mul_(s, group["decay"])
        torch._foreach_addcmul_(s, grads, grads, 1 - group["decay"])
        scales = torch._foreach_mul(s, samples)
        torch._foreach_add_(scales, group["eps"])
        if not group["momentum"] and not group["weight_decay"]:
            _add(parameters, grads, scales, -group["lr"])
            return
        direction = list(torch._foreach_div(grads, scales))
        if group["weight_decay"]:
            own = [p.to(d.dtype) for p, d in zip(parameters, direction, strict=True)]
            torch._foreach_add_(direction, own, alpha=group["weight_decay"])
        if group["momentum"]:
            m = self._states(parameters, "m")
            torch._foreach_mul_(m, group["momentum"])
            torch._foreach_add_(m, direction)
            direction = m
        torch._foreach_add_(parameters, _as(parameters, direction), alpha=-group["lr"])


class RFAdamW(RootFree):
    """``m <- β₁ m + (1 - β₁) g``,  ``s <- β₂ s + (1 - β₂) g²``,  ``w <- w - η m / (B s + ε)``.

    Before that, ``w <- (1 - η γ) w``. ``s`` starts at ``1/B`` and m at 0; with ``bias_correction``
    both are divided by ``1 - βᵗ``, which a preconditioner that starts at 1 does not need.

    Args:
        params: parameters, or groups of them.
        lr: the learning rate η.
        betas: β₁ and β₂ in [0, 1).
        eps: ε, positive.
        weight_decay: γ, at least 0.
        batch_size: B, a number, a callable, or the model whose samples are counted; 1 for losses
            that are sums.
        bias_correction: divide m and s as Adam does.
        state_dtype: what s and m are stored and computed in, by default the parameter's.

    >>> weight = nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = RFAdamW([weight], lr=0.1, betas=(0.0, 0.99), batch_size=4, weight_decay=0.0)
    >>> (2 * weight).sum().backward()
    >>> optimizer.step()
    >>> weight.data
    tensor([0.8261])
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 1e-2,
        *,
        batch_size: BatchSize,
        bias_correction: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        more = {"bias_correction": bias_correction, "state_dtype": state_dtype}
        super().__init__(params, batch_size, defaults | more)

    def _update(
        self, parameters: list[Any], grads: list[Tensor], samples: float, group: Mapping[str, Any]
    ) -> None:
        first, second = group["betas"]
        m, s = self._states(parameters, "m"), self._states(parameters, "s")
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(m, grads, 1 - first)
        torch._foreach_mul_(s, second)
        torch._foreach_addcmul_(s, grads, grads, 1 - second)
        if not group["bias_correction"]:
            scales = torch._foreach_mul(s, samples)
            torch._foreach_add_(scales, group["eps"])
            _add(parameters, m, scales, -group["lr"])
            return
        for parameter in parameters:
            self.state[parameter]["step"] += 1
        steps = [self.state[parameter]["step"] for parameter in parameters]
        scales = torch._foreach_mul(s, [samples / (1 - second**step) for step in steps])
        torch._foreach_add_(scales, group["eps"])
        _add(parameters, m, scales, [-group["lr"] / (1 - first**step) for step in steps])


def _add(
    parameters: list[Any], over: list[Tensor], under: Iterable[Tensor], factor: float | list[float]
) -> None:
    """``w <- w + factor over / under``."""
    if over[0].dtype == parameters[0].dtype:
        torch._foreach_addcdiv_(parameters, over, list(under), factor)
        return
    steps = torch._foreach_div(over, list(under))
    torch._foreach_mul_(steps, factor)
    torch._foreach_add_(parameters, _as(parameters, steps))


def _as(parameters: list[Any], values: Iterable[Tensor]) -> list[Tensor]:
    """Values in the parameters' dtype."""
    return [value.to(p.dtype) for p, value in zip(parameters, values, strict=True)]


def _alike(group: Mapping[str, Any]) -> Alike:
    """Parameters with a gradient, those of one device and dtype together, with their state's dtype.

    Raises:
        RuntimeError: a sparse gradient.
    """
    found: dict[Any, list[nn.Parameter]] = {}
    for p in group["params"]:
        if p.grad is None:
            continue
        if p.grad.is_sparse:
            raise RuntimeError(f"the gradient of shape {tuple(p.shape)} is sparse; expected dense")
        key = p.device, group["state_dtype"] or p.dtype, p.dtype
        found.setdefault(key, []).append(p)
    return [(dtype, own) for (_, dtype, _), own in found.items()]


_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda value: 0 <= value < inf, "a number, at least 0"),
    "decay": (lambda value: 0 <= value < 1, "a number in [0, 1)"),
    "betas": (
        lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
        "two numbers in [0, 1)",
    ),
    "eps": (lambda value: 0 < value < inf, "a positive number"),
    "weight_decay": (lambda value: 0 <= value < inf, "a number, at least 0"),
    "momentum": (lambda value: 0 <= value < 1, "a number in [0, 1)"),
}
