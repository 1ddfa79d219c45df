"""References for whole networks: one sample at a time, by autograd alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Any, Any], Tensor]


def per_sample_gradients(
    model: nn.Module,
    loss_fn: Loss,
    inputs: Tensor | tuple[Tensor, ...],
    targets: Tensor,
    factor: float = 1.0,
) -> dict[str, Tensor]:
    """``g[n, θ]`` of every parameter that the loss reaches, times a factor."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    args = (inputs,) if isinstance(inputs, Tensor) else inputs
    for n in range(len(args[0])):
        loss = factor * loss_fn(model(*(x[n : n + 1] for x in args)), targets[n : n + 1])
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for name, grad in zip(named, grads, strict=True):
            if grad is not None:
                rows[name].append(grad)
    return {name: torch.stack(each) for name, each in rows.items() if each}


def first_order(gradients: Tensor) -> dict[str, Tensor]:
    """Every first-order quantity from per-sample gradients, by the name of its class."""
    flat = gradients.flatten(1)
    squares = gradients.square()
    return {
        "Gradient": gradients.sum(0),
        "PerSampleGradients": gradients,
        "SquaredNorms": flat.square().sum(1),
        "DotProducts": flat @ flat.T,
        "SumOfSquares": squares.sum(0),
        "SecondMoment": squares.mean(0),
        "Variance": gradients.var(0, unbiased=False),
    }
