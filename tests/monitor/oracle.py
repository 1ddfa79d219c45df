"""What measurements are, by loops, dense matrices and `torch.func`, from the definitions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

LossFunction = Callable[[Tensor, Tensor], Tensor]


class Residual(nn.Module):
    """Groups, circular and equal padding, a norm, a bypass, a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular")
        self.norm = nn.GroupNorm(2, 4)
        self.again = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.mid, self.head = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.first(x)))
        y = y + torch.sigmoid(self.again(self.again(y)))
        return self.head(torch.tanh(self.mid(y.mean((2, 3)))))


def chain() -> nn.Sequential:
    layers = nn.Conv2d(2, 3, 2, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(4, 3))


class Oracle:
    """One batch of a model at its present parameters; the loss is the mean over samples."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = model, x, y
        named = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
        self.sizes = [p.numel() for p in named.values()]
        self.shapes, self.names = [p.shape for p in named.values()], list(named)
        self.flat = torch.cat([p.reshape(-1) for p in named.values()])

        def one(flat: Tensor, at: Tensor, label: Tensor) -> Tensor:
            return loss_fn(self.output(flat, at[None]), label[None])

        self.each: Any = one
        self.loss_fn = loss_fn
        self.b = len(x)

    def output(self, flat: Tensor, x: Tensor) -> Tensor:
        parts = torch.split(flat, self.sizes)
        given = zip(self.names, parts, self.shapes, strict=True)
        found: Tensor = functional_call(self.model, {k: p.reshape(s) for k, p, s in given}, (x,))
        return found

    def losses(self) -> Tensor:
        pairs = zip(self.x, self.y, strict=True)
        return torch.stack([self.each(self.flat, a, b) for a, b in pairs])

    def gradients(self) -> Tensor:  # (n, j)
        pairs = zip(self.x, self.y, strict=True)
        return torch.stack([torch.func.grad(self.each)(self.flat, a, b) for a, b in pairs])

    def mean(self, flat: Tensor) -> Tensor:
        return self.loss_fn(self.output(flat, self.x), self.y)

    def hessian(self) -> Tensor:
        found: Tensor = hessian(self.mean)(self.flat)
        return found

    def ggn(self, loss_fn: LossFunction) -> Tensor:
        total = torch.zeros(len(self.flat), len(self.flat))
        for a, b in zip(self.x, self.y, strict=True):
            y = self.output(self.flat, a[None])
            j = jacrev(self.output)(self.flat, a[None])[0]
            h = hessian(lambda out, b=b: loss_fn(out, b[None]))(y)[0, :, 0]
            total += j.T @ h @ j / self.b
        return total

    def by_parameter(self, vector: Tensor) -> list[Tensor]:
        return list(torch.split(vector, self.sizes))

    def values(self, eta: float = 0.0) -> dict[str, Any]:
        """Everything that needs gradients alone."""
        b, each = self.b, self.gradients()
        g, loss = each.mean(0), self.losses().mean()
        norms, dots, square = each.square().sum(1), each @ g, g @ g
        found: dict[str, Any] = {
            "Loss": loss,
            "NormTest": ((norms.sum() - b * square) / (b * (b - 1) * square)).sqrt(),
            "InnerTest": ((dots.square().sum() - b * square**2) / (b * (b - 1) * square**2)).sqrt(),
            "OrthoTest": (
                (norms.sum() - dots.square().sum() / square) / (b * (b - 1) * square)
            ).sqrt(),
            "CABS": eta * each.var(0, correction=0).sum() / loss,
            "EarlyStopping": 1 - b * (g**2 / (each.var(0) + 1e-5)).mean(),
            "MeanGSNR": (g**2 / (each.var(0, correction=0) + 1e-5)).mean(),
            "LargestSample": norms.max() / norms.mean(),
        }
        noise, signal = each.var(0).sum(), square - each.var(0).sum() / b
        found["CriticalBatchSize"] = noise / signal if signal > 0 else torch.tensor(float("nan"))
        edges = np.linspace(-2, 2, 101)
        clipped = each.clamp(-2, 2).numpy()
        found["GradHist1d"] = np.histogram(clipped, edges)[0]
        theta = self.flat.expand_as(each).clamp(-2, 2).numpy().reshape(-1)
        sides = np.linspace(-1, 1, 41), np.linspace(-2, 2, 51)
        pairs = each.clamp(-1, 1).numpy().reshape(-1), theta
        found["GradHist2d"] = np.histogram2d(*pairs, sides)[0]
        return found


def alpha(first: Oracle, second: Oracle) -> float | None:
    """By weighted least squares, densely."""
    d = second.flat - first.flat
    tau = float(d.norm())
    if not tau:
        return -1.0
    slopes = [each.gradients() @ d / tau for each in (first, second)]
    losses = [each.losses() for each in (first, second)]
    y = torch.stack([*(each.mean() for each in losses), *(each.mean() for each in slopes)])
    v = torch.stack([*(each.var() for each in losses), *(each.var() for each in slopes)])
    v = torch.where(v == 0, 1e-10, v)
    phi = torch.tensor([[1, 0, 0], [1, tau, tau**2], [0, 1, 0], [0, 1, 2 * tau]])
    w = torch.diag(1 / v)
    mu = torch.linalg.solve(phi.T @ w @ phi, phi.T @ w @ y)
    return -1.0 if mu[2] < 0 else float(2 * tau / (-mu[1] / mu[2]) - 1)
