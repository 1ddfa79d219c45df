"""AdaHessian (Yao et al. 2021), as small as it gets: what other optimizers are compared with."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class AdaHessian(torch.optim.Optimizer):
    """``θ <- θ - η / (1 - β₁ᵗ) m / (√(v / (1 - β₂ᵗ)) + ε)`` with ``m <- β₁ m + (1 - β₁) g``.

    ``v <- β₂ v + (1 - β₂) D²``, where D is ``|z ∘ H z|`` for one vector z of random signs
    (Hutchinson's estimate of the Hessian's diagonal), averaged over the taps of a kernel.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "steps": 0})

    def backward(self, loss: Tensor) -> None:
        """The gradient, and the estimate of the diagonal, which takes a second backward pass."""
        params = [p for group in self.param_groups for p in group["params"]]
        grads = torch.autograd.grad(loss, params, create_graph=True)
        signs = [torch.randint_like(p, 2) * 2 - 1 for p in params]
        products = torch.autograd.grad(grads, params, signs)
        for p, g, z, hz in zip(params, grads, signs, products, strict=True):
            p.grad = g.detach()
            taps = tuple(range(2, p.dim()))
            estimate = (z * hz).abs()
            self.state[p]["D"] = estimate.mean(taps, keepdim=True) if taps else estimate

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                self._update(p, group)

    def _update(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        state, (first, second), steps = self.state[p], group["betas"], group["steps"]
        m = state.setdefault("m", torch.zeros_like(p))
        v = state.setdefault("v", torch.zeros_like(state["D"]))
        m.mul_(first).add_(p.grad, alpha=1 - first)  # type: ignore[arg-type]
        v.mul_(second).add_(state["D"].square(), alpha=1 - second)
        d = (v / (1 - second**steps)).sqrt() + group["eps"]
        p.sub_(group["lr"] / (1 - first**steps) * m / d)
