"""One batch's graph, and products with the derivatives that it holds, as often as wanted.

Second derivatives are products with a graph of the gradient, built once: a product runs backwards
through it and nothing runs forwards again. The same gives a Jacobian times a tangent: ``Jᵀ w`` is
linear in w, so its derivative in w, transposed, is J.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from tnconv.models.capture import alone
from tnconv.models.checkpoints import refusing_reentrant
from tnconv.models.modules import named_modules, uncompiled
from tnconv.operators.parameter_space import Vector
from tnconv.operators.second_derivative import SecondDerivative, named_if_missing


@dataclass(eq=False)
class Graph:
    """A batch's outputs and loss as functions of some parameters' values."""

    parameters: Vector
    output: Any
    targets: Any
    loss_fn: Callable[[Any, Any], Tensor]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        names: Sequence[str],
        loss_fn: Callable[[Any, Any], Tensor],
        arguments: tuple[tuple[Any, ...], Mapping[str, Any]],
        targets: Any,
    ) -> "Graph":
        """Run the model once; its buffers and its parameters' gradients stay as they are."""
        values = {name: parameter.detach() for name, parameter in model.named_parameters()}
        leaves = tuple(values[name].requires_grad_() for name in names)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        args, kwargs = arguments
        with (
            torch.enable_grad(),
            uncompiled(model),
            alone(model),
            refusing_reentrant(named_modules(model)),
            sdpa_kernel(SDPBackend.MATH),  # the only one with second derivatives
        ):
            output = functional_call(model, (values, buffers), args, dict(kwargs))
        return cls(leaves, output, targets, loss_fn)

    def hessian(self, vector: Vector) -> Vector:
        """``Σ_j ∂²L / ∂θ_i ∂θ_j v_j``."""
        return self._second(vector)

    def push(self, vector: Vector) -> Vector:
        """``Σ_j ∂y_i / ∂θ_j v_j`` for every output y."""
        return derivative(self._pulled, self._cotangents, vector)

    def pull(self, cotangents: Vector) -> Vector:
        """``Σ_i ∂y_i / ∂θ_j u_i`` for every parameter θ."""
        return derivative(self.outputs, self.parameters, cotangents)

    def loss_hessian(self, vector: Vector) -> Vector:
        """``Σ_j ∂²L / ∂y_i ∂y_j u_j``."""
        ends, gradient = self._loss_gradient
        return derivative(gradient, ends, vector)

    @property
    def loss_gradient(self) -> Vector:
        """``∂L / ∂y``."""
        return tuple(each.detach() for each in self._loss_gradient[1])

    @cached_property
    def outputs(self) -> Vector:
        """The tensors among the model's outputs that depend on a parameter."""
        return tuple(each for each in tree_flatten(self.output)[0] if _learned(each))

    @cached_property
    def _second(self) -> SecondDerivative:
        with torch.enable_grad():
            loss = _scalar(self.loss_fn(self.output, self.targets))
            return SecondDerivative(loss, self.parameters)

    @cached_property
    def _cotangents(self) -> Vector:
        return tuple(torch.zeros_like(y).requires_grad_() for y in self.outputs)

    @cached_property
    def _pulled(self) -> Vector:
        with torch.enable_grad():
            return gradient(self.outputs, self.parameters, self._cotangents)

    @cached_property
    def _loss_gradient(self) -> tuple[Vector, Vector]:
        """The outputs as ends of a graph of the loss alone, and its gradient there."""
        flat, spec = tree_flatten(self.output)
        ends = [each.detach().requires_grad_() if _learned(each) else each for each in flat]
        with torch.enable_grad():
            loss = _scalar(self.loss_fn(tree_unflatten(ends, spec), self.targets))
            learned = tuple(each for each in ends if _learned(each))
            return learned, gradient(loss, learned)


def gradient(value: Tensor | Vector, ends: Vector, cotangents: Vector | None = None) -> Vector:
    """The gradient at some ends of a graph, as a graph of its own; zero where nothing arrives."""
    values = (value,) if isinstance(value, Tensor) else value
    if not ends or not any(each.requires_grad for each in values):
        return tuple(torch.zeros_like(end) for end in ends)
    return torch.autograd.grad(
        values, ends, cotangents, create_graph=True, allow_unused=True, materialize_grads=True
    )


def derivative(values: Vector, ends: Vector, vector: Vector) -> Vector:
    """``Σ_i ∂values_i / ∂ends_j vector_i``; the graph stays for other vectors."""
    given = [(each, v) for each, v in zip(values, vector, strict=True) if each.requires_grad]
    if not given or not ends:
        return tuple(torch.zeros_like(end) for end in ends)
    with named_if_missing():
        return torch.autograd.grad(
            [each for each, _ in given],
            ends,
            [v for _, v in given],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )


def _learned(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _scalar(loss: Tensor) -> Tensor:
    if loss.dim():
        raise ValueError(f"the loss has shape {tuple(loss.shape)}; expected a scalar")
    return loss
