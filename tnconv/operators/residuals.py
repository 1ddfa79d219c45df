"""Where a network itself is curved: second derivatives of the nodes of its autograd graph.

The Hessian of a loss L in parameters θ is the Gauss-Newton matrix plus, for every node f of the
graph with inputs u, ``Σ_f (∂u/∂θ)ᵀ ∂²f (∂u/∂θ)``, where ``∂²f = ∂²(g · f) / ∂u ∂u'`` for the
gradient g after f. Little is known here of operations: f's backward formula gives ``g ∂f/∂u``, and
its derivative in u is asked of autograd. It is zero for all that is (piecewise) linear; it couples
an input with a weight where f is a layer, which is no concern of single entries of parameters
unless the input depends on the same weight. That it is diagonal, for `ENTRYWISE` ones, is known.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Backward = Callable[..., Tensor | tuple[Tensor | None, ...] | None]

ENTRYWISE = frozenset(
    "Sigmoid LogSigmoid Tanh Gelu Silu Mish Elu Celu Softplus Hardswish Pow Exp Exp2 Expm1 Log Log2"
    " Log10 Log1P Sqrt Rsqrt Reciprocal Sin Cos Tan Sinh Cosh Asin Acos Atan Asinh Acosh Atanh Erf"
    " Erfc Erfinv Lgamma Logit Sinc".split()
)
"""Operations on every entry of one tensor by itself, by autograd's names without "Backward"."""

PIECEWISE_LINEAR = frozenset(
    "Relu LeakyRelu Threshold Hardtanh Hardsigmoid"
    " MaxPool2DWithIndices MaxPool3DWithIndices".split()
)
"""Some operations whose second derivative is zero, which need not be asked."""

MULTILINEAR = frozenset({"Convolution", "Addmm", "Mm", "Bmm"})
"""Some whose second derivative is zero but for one input and another, which is costly to ask."""


@dataclass(frozen=True)
class Residual:
    """``∂²f = diag(values)`` at the input of an entry-wise node, which ``edge`` leads to."""

    node: Node
    edge: GradientEdge
    values: Tensor  # in the input's shape


def residuals(
    root: Tensor,
    gradient: Tensor,
    parameters: Collection[Tensor],
    describe: Callable[[Node], str],
) -> list[Residual]:
    """All ``∂²f`` that matter to second derivatives in single entries of parameters.

    ``gradient`` is the loss's after ``root``; ``describe`` names a node in an error.

    Raises:
        NotImplementedError: a node whose second derivative is neither diagonal nor without effect.
    """
    reached = _reached(root, parameters)
    found: list[Residual] = []
    for node, given in _incoming(root, gradient, parameters, reached).items():
        try:
            found += _of_node(node, given, reached)
        except (NotImplementedError, RuntimeError) as reason:
            raise NotImplementedError(
                f"{describe(node)} couples entries that depend on one parameter, in its second "
                "derivative; expected piecewise linear operations or functions of single entries"
            ) from reason
    return found


def _of_node(
    node: Node, given: Sequence[Tensor | None], reached: Mapping[Node, int]
) -> Iterator[Residual]:
    """``∂²f``, one pair of inputs after the other.

    Raises:
        NotImplementedError: it is not zero for one input and another, or the same, that depend on
            one parameter, and the node is not entry-wise.
    """
    edges = {
        at: GradientEdge(below, number)
        for at, (below, number) in enumerate(node.next_functions)
        if below is not None
    }
    masks = {at: reached[edge.node] for at, edge in edges.items()}
    apart = sum(masks.values()) == reduce(or_, masks.values(), 0)
    if operation(node) in PIECEWISE_LINEAR or (operation(node) in MULTILINEAR and apart):
        return
    entrywise = len(edges) == 1 and _is_entrywise(node)
    for at, pulled in enumerate(_pulled(node, given)):
        ends = [edge for other, edge in edges.items() if masks.get(at, 0) & masks[other]]
        if pulled is None or not pulled.requires_grad or not ends:
            continue
        weights = torch.ones_like(pulled) if entrywise else _random(pulled)
        changes = torch.autograd.grad(pulled, ends, weights, retain_graph=True, allow_unused=True)
        for edge, change in zip(ends, changes, strict=True):
            if change is None or not change.any():
                continue
            if not entrywise:
                raise NotImplementedError(operation(node))
            yield Residual(node, edge, change)


def _is_entrywise(node: Node) -> bool:
    """Whether a node is one of torch's, or of a function that says so, as this library's do."""
    function = getattr(node, "_forward_cls", None)
    if function is None:
        return operation(node) in ENTRYWISE
    return bool(getattr(function, "entrywise", False))


def operation(node: Node) -> str:
    """What a node is the gradient of."""
    return type(node).name(node).rstrip("0123456789").removesuffix("Backward")


def _random(like: Tensor) -> Tensor:
    """Entries of any size: a matrix times them is zero if and only if the matrix is."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.empty_like(like).uniform_(1, 2, generator=generator)


def _pulled(node: Node, given: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """``g ∂f/∂u`` for every input u, as a graph."""
    itself: Any = node
    backward: Backward = getattr(node, "apply", itself)  # a custom function's, or torch's own
    with torch.enable_grad():
        found = backward(*given)
    return found if isinstance(found, tuple) else (found,)


def _reached(root: Tensor, parameters: Collection[Tensor]) -> dict[Node, int]:
    """For every node a number whose bits are the parameters that it depends on."""
    bits = {id(parameter): 1 << at for at, parameter in enumerate(parameters)}
    found: dict[Node, int] = {}
    waiting = [get_gradient_edge(root).node]
    while waiting:
        node = waiting[-1]
        below = [each for each, _ in node.next_functions if each is not None]
        missing = [each for each in below if each not in found]
        if missing and node not in found:
            waiting += missing
            continue
        waiting.pop()
        found[node] = bits.get(id(getattr(node, "variable", None)), 0)
        for each in below:
            found[node] |= found[each]
    return found


def _incoming(
    root: Tensor, gradient: Tensor, parameters: Collection[Tensor], reached: Mapping[Node, int]
) -> dict[Node, tuple[Tensor | None, ...]]:
    """The gradients after every node that leads to a parameter."""
    found: dict[Node, tuple[Tensor | None, ...]] = {}

    def noting(node: Node) -> Callable[[tuple[Tensor, ...]], None]:
        def note(gradients: tuple[Tensor, ...]) -> None:
            found[node] = gradients

        return note

    inner = [node for node, mask in reached.items() if mask and not hasattr(node, "variable")]
    hooks = [node.register_prehook(noting(node)) for node in inner]
    try:
        torch.autograd.grad(root, tuple(parameters), gradient, retain_graph=True, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    return found
