"""A network's linearisation as a module, and how far the network is from it."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from tnconv.given import instances
from tnconv.models.computing import Inputs, arguments
from tnconv.models.modules import unwrapped
from tnconv.ntk.sides import State, at_state, learning
from tnconv.operators.curvature_operators import refuse_dropout


class LinearizedModel(nn.Module):
    """``f_0(x) + J_0(x) (θ - θ_0)``, linear in the parameters θ that learn, which are ``moved``'s.

    ``moved`` is a copy of the model and holds θ under its own names; θ_0 is kept as it was. Outputs
    are differentiable in θ and in inputs, and any optimizer trains it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        refuse_dropout(model)
        self.moved = deepcopy(unwrapped(model))
        self.origin = deepcopy(self.moved).requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The linearisation's outputs, in the form of the model's."""
        start = {n: p.detach() for n, p in self.origin.named_parameters()}
        learned = {n: p for n, p in self.moved.named_parameters() if p.requires_grad}
        buffers = {n: b.clone() for n, b in self.origin.named_buffers()}
        changes = {n: p - start[n] for n, p in learned.items()}

        def function(values: dict[str, Tensor]) -> Any:
            return functional_call(self.origin, start | values | buffers, args, kwargs)

        with sdpa_kernel(SDPBackend.MATH):  # the only one with forward-mode derivatives
            y, change, *_ = jvp(function, ({n: start[n] for n in learned},), (changes,))
        return tree_map(torch.add, y, change)

    def train(self, mode: bool = True) -> "LinearizedModel":
        """Nothing changes: the function is that of the mode in which the model was linearised."""
        self.training = mode
        return self


def linearize(model: nn.Module) -> LinearizedModel:
    """The first-order Taylor expansion of a model in its parameters, as a trainable module.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> linear, x = linearize(model), torch.rand(5, 3)
    >>> bool(torch.equal(linear(x), model(x)))
    True
    >>> [name for name, _ in linear.named_parameters() if name.startswith("moved")][:2]
    ['moved.0.weight', 'moved.0.bias']

    Raises:
        NotImplementedError: a layer that drops entries at random.
    """
    instances(model=model)
    return LinearizedModel(model)


@torch.no_grad()
def linearization_gap(model: nn.Module, before: State, x: Inputs) -> float:
    """``‖f(x; θ) - f_lin(x; θ)‖ / ‖f(x; θ) - f(x; θ_0)‖``: 0 for a linear model.

    It is the part of the outputs' change since θ_0 that the linearisation there does not explain;
    0 also where nothing changed.
    """
    start = at_state(model, before, "before")
    linear = linearize(start)
    own = dict(unwrapped(model).named_parameters())
    for name, parameter in linear.moved.named_parameters():
        parameter.copy_(own[name])
    args, kwargs = arguments(x)
    y, y_0, y_linear = (m(*args, **kwargs) for m in (unwrapped(model), start, linear))
    moved = float((y - y_0).norm())
    return float((y - y_linear).norm()) / moved if moved else 0.0


@torch.no_grad()
def parameter_travel(
    model: nn.Module,
    before: State,
    parameters: Sequence[str] | None = None,
    relative: bool = True,
) -> float:
    """``‖θ - θ_0‖ / ‖θ_0‖``, or without the denominator.

    Args:
        model: The model as it is now, at θ.
        before: A module with the same parameters, or values of some of them by name: θ_0.
        parameters: The names of those that count, by default all that learn.
        relative: Whether to divide.
    """
    names = learning(model, parameters)
    own = dict(unwrapped(model).named_parameters())
    start = dict(unwrapped(at_state(model, before, "before")).named_parameters())
    moved = torch.stack([(own[n] - start[n]).double().norm() for n in names]).norm()
    if not relative:
        return float(moved)
    return float(moved / torch.stack([start[n].double().norm() for n in names]).norm())
