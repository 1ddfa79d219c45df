"""What flows backwards through one node of an autograd graph, and the rules that say how.

A value a has its gradient ``g = ∂L/∂a`` and ``s ≈ diag ∂²L/∂a²``. Before a node ``y = f(x)`` they
are ``g_x = Jᵀ g`` and

    ``s_x[i] = Σ_o J[o, i]² s[o] + Σ_o g[o] ∂²y[o] / ∂x[i]²``,  ``J[o, i] = ∂y[o] / ∂x[i]``,

the Hessian's diagonal but for the pairs of different entries of y, whose second derivatives are
taken to be zero (Becker & LeCun 1989; Elsayed & Mahmood 2022). A *rule* computes that for one
operation; where y is linear in x, it is the vjp with J squared entry by entry.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from tnconv.displays import Shown


@dataclass(slots=True, repr=False)
class Flow(Shown):
    """``g`` and ``s`` after a value; g is None where nothing needs it."""

    gradient: Tensor | None
    diagonal: Tensor

    def total(self) -> "Flow":
        """The flow itself: see `columns.Spread`."""
        return self

    def plus(self, other: "Flow") -> "Flow":
        """Another use of the same value: paths add up, what couples two of them is neglected."""
        both = self.gradient, other.gradient
        total = None if both[0] is None or both[1] is None else both[0] + both[1]
        return Flow(total, self.diagonal + other.diagonal)


Flows = Sequence[Flow | None]
Vjp = Callable[[Tensor], Tensor]


@dataclass(slots=True, repr=False)
class Step(Shown):
    """One node on the way, with what arrived after each of its results.

    ``wants`` and ``wants_gradient`` say for every input whether a parameter is before it, and
    whether its g is needed. ``curved`` is False where second derivatives of f are to be left out,
    as they are in Gauss-Newton quantities.

    Args:
        node: of the autograd graph.
        flows: what arrived after each of its results.
        wants: for each input, whether a parameter is before it.
        wants_gradient: for each input, whether its gradient is needed.
        curved: whether second derivatives count.
    """

    node: Any
    flows: Flows
    wants: Sequence[bool]
    wants_gradient: Sequence[bool]
    curved: bool = True

    @property
    def flow(self) -> Flow:
        """What arrived after the first result, for operations that have one."""
        found = self.flows[0]
        assert found is not None
        return found

    def saved(self, name: str) -> Tensor:
        """A tensor that the node saved, at least in the precision of s."""
        s, found = self.flow.diagonal, getattr(self.node, f"_saved_{name}")
        if not isinstance(found, Tensor):  # a number
            return torch.as_tensor(found, dtype=s.dtype, device=s.device)
        return found if found.dtype == s.dtype else found.to(s.dtype)

    def linear(self, at: int, vjp: Vjp, squared: Vjp) -> Flow | None:
        """The flow before input ``at``, in which y is linear: its vjp, and that of J squared."""
        if not self.wants[at]:
            return None
        g, s = self.flow.gradient, self.flow.diagonal
        gradient = vjp(g) if g is not None and self.wants_gradient[at] else None
        return Flow(gradient, squared(s))

    def entrywise(self, first: Tensor, second: Tensor | None) -> Flows:
        """The flow before the input of a function of single entries, from ``f'`` and ``f''``."""
        g, s = self.flow.gradient, self.flow.diagonal
        diagonal = first * first * s
        if second is not None and self.curved:
            assert g is not None
            diagonal.addcmul_(second, g)
        return (Flow(first * g if g is not None and self.wants_gradient[0] else None, diagonal),)

    def pulled(self, values: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """``Jᵀ v`` for one v per result, by the node's own formula: linear, whatever v is.

        v is scaled to the range of the node's dtype where that is a narrower one.
        """
        own = self.node._input_metadata
        values = [*values, *[None] * (len(own) - len(values))]
        v = next(value for value in values if value is not None)
        if all(each.dtype == v.dtype for each in own) or not v.numel():
            return self._call(values)
        top = torch.stack([u.abs().max() for u in values if u is not None]).max()
        top = torch.where(top > 0, top, 1)
        narrow = [
            None if u is None else (u / top).to(each.dtype)
            for u, each in zip(values, own, strict=True)
        ]
        return tuple(None if u is None else u.to(v.dtype) * top for u in self._call(narrow))

    def _call(self, values: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        own = getattr(self.node, "apply", None)  # a custom function's
        found = self.node(*values) if own is None else own(*values)
        found = found if isinstance(found, tuple) else (found,)
        if own is not None:
            return tuple(found)
        pairs = zip(found, self.node.next_functions, strict=False)
        return tuple(v if v is None else _reduced(v, *end) for v, end in pairs)


def _reduced(v: Tensor, node: Node | None, at: int) -> Tensor:
    """The sum over what was broadcast, which torch leaves to autograd's engine."""
    if node is None:
        return v
    shape = shape_of(node, at)
    return v if v.shape == shape else v.sum_to_size(shape)


def shape_of(node: Any, index: int) -> tuple[int, ...]:
    """The shape of a node's result: what is broadcast has another than y."""
    if hasattr(node, "variable"):
        return tuple(node.variable.shape)
    return tuple(node._input_metadata[index].shape)


Rule = Callable[[Step], Flows]
"""From what arrived after a node to what is before each of its inputs."""


@dataclass(frozen=True)
class Known:
    """A rule, and what the recursion asks about its operation before it starts."""

    rule: Rule
    curved: bool  # whether it needs g
    diagonal: bool  # whether J is diagonal: a function of single entries of one tensor


_RULES: dict[str, Known] = {}


def register_rule(
    *operations: str, curved: bool = False, diagonal: bool = False
) -> Callable[[Rule], Rule]:
    """Say how g and s go backwards through operations: a decorator for a `Rule`.

    Args:
        operations: autograd's names of their nodes, without "Backward" and the number.
        curved: whether the rule adds second derivatives, which take the gradient ``step.flow``.
        diagonal: whether an operation is a function of every entry of one tensor by itself.

    >>> import torch
    >>> class Cube(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, x):
    ...         ctx.save_for_backward(x)
    ...         return x**3
    ...     @staticmethod
    ...     def backward(ctx, v):
    ...         return 3 * ctx.saved_tensors[0] ** 2 * v
    >>> @register_rule("Cube", curved=True, diagonal=True)
    ... def cube(step):
    ...     (x,) = step.node.saved_tensors
    ...     return step.entrywise(3 * x**2, 6 * x)
    """

    def register(rule: Rule) -> Rule:
        for operation in operations:
            _RULES[operation] = Known(rule, curved, diagonal)
        return rule

    return register


def known(node: Node) -> tuple[str, Known | None]:
    """A node's operation, and the rule for it if there is one."""
    name = operation(node)
    return name, _RULES.get(name)


def node_name(node: Node) -> str:
    """A node's name, asked of its type: the context of a function can hold a name of its own."""
    found: str = type(node).name(node)
    return found


def operation(node: Node) -> str:
    """What a node is the gradient of."""
    return _operation(node_name(node))


@cache
def _operation(name: str) -> str:
    return name.rpartition("::")[2].rstrip("0123456789").removesuffix("Backward")
