"""The recursion from its definition: dense Jacobians and second derivatives of torch.func.

A network is a list of operations on earlier values. Backwards through each, in every argument u
(an input, or a parameter of its own),

    ``s_u = (J∘J)ᵀ s + Σ_o g_o ∂²y_o / ∂u²``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

Values = dict[str, Tensor]


@dataclass
class Operation:
    """A module, and which earlier values it reads; value 0 is the network's input."""

    module: nn.Module
    inputs: tuple[int, ...]


class Network(nn.Module):
    """Operations in order; the last one's result is the output."""

    def __init__(self, *operations: Operation | nn.Module) -> None:
        super().__init__()
        self.operations = [
            each if isinstance(each, Operation) else Operation(each, (at,))
            for at, each in enumerate(operations)
        ]
        self.parts = nn.ModuleList([each.module for each in self.operations])

    def values(self, x: Tensor) -> list[Tensor]:
        """All values; operations in place change copies."""
        found = [x]
        for each in self.operations:
            found.append(each.module(*[found[at].clone() for at in each.inputs]))
        return found

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for each in self.operations:
            found.append(each.module(*[found[at] for at in each.inputs]))
        return found[-1]


def loss_derivatives(loss_fn, output: Tensor, targets) -> tuple[Tensor, Tensor]:
    """The gradient and the whole Hessian in the outputs."""
    y = output.detach()
    gradient = torch.func.grad(lambda y: loss_fn(y, targets))(y)
    whole = hessian(lambda y: loss_fn(y, targets))(y)
    return gradient, whole.reshape(y.numel(), y.numel())


def start_of(loss_fn, output: Tensor, targets, method: str) -> tuple[Tensor, Tensor]:
    """g and s at the output."""
    gradient, whole = loss_derivatives(loss_fn, output, targets)
    if method == "bl89" and isinstance(loss_fn, nn.CrossEntropyLoss):

        def of_probabilities(q: Tensor) -> Tensor:
            return torch.func.vjp(lambda q: _likelihood(loss_fn, q, targets), q)[0]

        q = output.detach().softmax(1)
        slope = torch.func.grad(of_probabilities)(q)
        bend = hessian(of_probabilities)(q).reshape(q.numel(), q.numel()).diagonal()
        first, second = q - q**2, q - 3 * q**2 + 2 * q**3
        return gradient, bend.reshape(q.shape) * first**2 + slope * second
    return gradient, whole.diagonal().reshape(output.shape)


def _likelihood(loss_fn: nn.CrossEntropyLoss, q: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of probabilities q: every entry by itself."""
    how = {"ignore_index": loss_fn.ignore_index, "reduction": loss_fn.reduction}
    if targets.is_floating_point() or loss_fn.label_smoothing:
        total = -(loss_fn.weight.reshape(-1, *[1] * (q.dim() - 2)) * targets * q.log()).sum()
        return total / (q.numel() / q.shape[1])
    return nn.functional.nll_loss(q.log(), targets, loss_fn.weight, **how)


def explicit(
    network: Network, x: Tensor, loss_fn, targets, method: str = "hesscale"
) -> dict[nn.Parameter, Tensor]:
    """s of every parameter, by the definition."""
    values = [value.detach() for value in network.values(x)]
    flows: dict[int, tuple[Tensor, Tensor]] = {}
    flows[len(values) - 1] = start_of(loss_fn, values[-1], targets, method)
    found: dict[nn.Parameter, Tensor] = {}
    curved = method != "gn"
    for at in range(len(network.operations), 0, -1):
        if at not in flows:
            continue
        g, s = flows[at]
        each = network.operations[at - 1]
        own = dict(each.module.named_parameters())
        read = sorted({*each.inputs})

        def run(arguments: Values, name: str, u: Tensor, each=each) -> Tensor:
            """The operation as a function of one argument."""
            arguments = arguments | {name: u}
            given = [arguments[str(i)].clone() for i in each.inputs]
            named = {k: v for k, v in arguments.items() if not k.isdigit()}
            return functional_call(each.module, named, tuple(given))

        arguments = {str(i): values[i] for i in read}
        arguments |= {name: p.detach() for name, p in own.items()}
        for name, u in arguments.items():
            if name == "0":
                continue
            before = _through(partial(run, arguments, name), u, g, s, curved)
            if name.isdigit():
                old = flows.get(int(name))
                flows[int(name)] = before if old is None else _plus(old, before)
            elif own[name] in found:
                found[own[name]] = found[own[name]] + before[1]
            else:
                found[own[name]] = before[1]
    return found


def _through(function, u: Tensor, g: Tensor, s: Tensor, curved: bool) -> tuple[Tensor, Tensor]:
    jacobian = jacrev(function)(u).reshape(g.numel(), u.numel())
    diagonal = (jacobian**2).T @ s.flatten()
    if curved:
        second = hessian(lambda u: (g * function(u)).sum())(u).reshape(u.numel(), u.numel())
        diagonal = diagonal + second.diagonal()
    return (jacobian.T @ g.flatten()).reshape(u.shape), diagonal.reshape(u.shape)


def _plus(one: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return one[0] + other[0], one[1] + other[1]
