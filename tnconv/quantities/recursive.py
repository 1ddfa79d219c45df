"""KFRA: Kronecker factors from one Hessian, averaged over the batch, that is passed backwards.

With the loss's Hessians H[n] in outputs y, ``B = Σ_n H[n]`` starts at the output (the factor of the
loss's reduction is in H) and goes backwards through a layer as ``B <- 1/N Σ_n J[n]ᵀ B J[n]``. That
takes a matrix of features times features, so that chains of linear layers and activations, of a
limited width, are where it is for. Source: Botev et al. 2017.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tnconv.losses.roots import curvature
from tnconv.quantities.kronecker_factors import KroneckerFactors

ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Hardsigmoid, nn.Hardswish, nn.Tanh, nn.Tanhshrink, nn.Softplus),
    *(nn.Softsign, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Threshold, nn.Identity),
)
"""Modules that are one function of every entry by itself, the same for all."""


def kfra(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Tensor,  # (n, ...)
    targets: Tensor,
    most_features: int = 4096,
) -> dict[str, KroneckerFactors]:
    """The factors of every parameter of a chain of linear layers and activations, by name.

    ``A = 1/N Σ_n x[n] x[n]ᵀ`` of a layer's input (1 for a bias), and B of its output. The chain is
    a ``nn.Sequential``, nested or not, of ``nn.Linear``, `ACTIVATIONS`, dropout in evaluation mode,
    and ``nn.Flatten`` in front.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3))
    >>> x, labels = torch.rand(8, 3, 2, 2), torch.randint(3, (8,))
    >>> factors = kfra(model, nn.CrossEntropyLoss(), x, labels)
    >>> factors["1.weight"].input.shape, factors["1.weight"].grad_output.shape
    (torch.Size([1, 12, 12]), torch.Size([1, 5, 5]))

    Args:
        model: the chain.
        loss_fn: a loss whose Hessian is known.
        inputs: ``(n, ...)``.
        targets: as the loss takes them.
        most_features: of a layer's output; more would be a large matrix.

    Raises:
        NotImplementedError: another module, more than one position, or too many features.
    """
    chain = list(_chain(model))
    for name, module in chain:
        _check(name, module, most_features)
    read = [inputs.detach()]
    with torch.no_grad():
        for _, module in chain:
            read.append(module(read[-1].clone()))  # activations in place change the copy
    if any(x.dim() != 2 for (_, module), x in zip(chain, read, strict=False) if _learns(module)):
        raise NotImplementedError("a linear layer reads more than one position; expected (n, c)")
    s = curvature(loss_fn, read[-1], targets).vectors().flatten(0, 1)
    b, found = s.T @ s, dict[str, KroneckerFactors]()
    for (name, module), x in reversed(list(zip(chain, read, strict=False))):
        found |= _factors(name, module, x, b)
        if name == next(other for other, each in chain if _learns(each)):
            break
        b = _before(module, x, b)
    return found


def _factors(name: str, module: nn.Module, x: Tensor, b: Tensor) -> dict[str, KroneckerFactors]:
    own = {key: p for key, p in module.named_parameters() if p.requires_grad}
    inputs = {"weight": lambda: x.T @ x / len(x), "bias": lambda: x.new_ones(1, 1)}
    start = f"{name}." if name else ""
    return {start + key: KroneckerFactors(inputs[key]()[None], b[None]) for key in own}


def _before(module: nn.Module, x: Tensor, b: Tensor) -> Tensor:
    """``1/N Σ_n J[n]ᵀ B J[n]`` for the module's Jacobian at its input."""
    if isinstance(module, nn.Linear):
        weight = module.weight.detach()
        return weight.T @ b @ weight
    if isinstance(module, ACTIVATIONS):
        slopes = _slopes(module, x)
        return b * (slopes.T @ slopes) / len(x)
    return b


def _slopes(activation: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        at = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(activation(at * 1).sum(), at)
    return found


def _chain(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of nested chains in order, with their names in the model."""
    if type(model) is not nn.Sequential:
        yield name, model
        return
    for key, child in model.named_children():
        yield from _chain(child, f"{name}.{key}" if name else key)


def _learns(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _check(name: str, module: nn.Module, most_features: int) -> None:
    known = (*ACTIVATIONS, nn.Linear, nn.Flatten, nn.Dropout)
    if type(module) not in known or (isinstance(module, nn.Dropout) and module.training):
        raise NotImplementedError(
            f"layer {name!r} ({type(module).__name__}) is in the model; expected a chain of "
            "nn.Linear, activations, and dropout that is off"
        )
    if isinstance(module, nn.Linear) and max(module.weight.shape) > most_features:
        raise NotImplementedError(
            f"layer {name!r} has a weight of shape {tuple(module.weight.shape)}; expected at most "
            f"{most_features} features, because the factors are as large as their square"
        )
