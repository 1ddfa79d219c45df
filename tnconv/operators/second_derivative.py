"""Products with the Hessian of a loss, on a graph of its gradient that is built once.

torch's second derivative of a convolution also computes the gradient of what the convolution reads,
whether anything asks for it or not. Convolutions that read data alone, as a network's first does,
are therefore left out of the graph: their output a is linear in weight and bias with a constant
Jacobian J, so that the Hessian in both is ``Jᵀ H J`` with the Hessian H in a. Piecewise linear
functions are recorded without the zeros of their second derivatives.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from tnconv.operators.parameter_space import Vector
from tnconv.operators.piecewise_linear import without_zeros

CONVOLUTION = "ConvolutionBackward0"


@dataclass(frozen=True)
class Entry:
    """A convolution of data: where its output is in the graph, and its parameters' numbers."""

    node: Any
    weight: int
    bias: int | None

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of weight and bias among all parameters."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def _settings(self) -> tuple[Any, ...]:
        node = self.node
        geometry = node._saved_stride, node._saved_padding, node._saved_dilation
        how = node._saved_transposed, node._saved_output_padding, node._saved_groups
        return *geometry, *how

    def push(self, vector: Sequence[Tensor]) -> Tensor:
        """``J v`` of a vector of all parameters."""
        bias = None if self.bias is None else vector[self.bias]
        given = self.node._saved_input, vector[self.weight], bias
        found: Tensor = torch.ops.aten.convolution(*given, *self._settings)
        return found

    def pull(self, arrived: Tensor) -> tuple[Tensor, ...]:
        """``Jᵀ u``, of weight and bias."""
        node, has_bias = self.node, self.bias is not None
        sizes = [arrived.shape[1]] if has_bias else None
        given = arrived, node._saved_input, node._saved_weight, sizes
        mask = [False, True, has_bias]
        _, weight, bias = torch.ops.aten.convolution_backward(*given, *self._settings, mask)
        return (weight, bias) if has_bias else (weight,)


class SecondDerivative:
    """Products with the Hessian of a loss in some parameters; the loss's graph stays as it is.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hessian = SecondDerivative((w[0] ** 2 * w[1]).sum(), (w,))
    >>> hessian.gradient, hessian((torch.tensor([1.0, 0.0]),))
    ((tensor([4., 1.]),), (tensor([4., 2.]),))
    """

    def __init__(self, loss: Tensor, parameters: Vector) -> None:
        self.parameters = parameters
        uses = uses_of_nodes(loss)
        self._entries = [*entries(uses, parameters)]
        inside = {at for entry in self._entries for at in entry.numbers}
        self._rest = [at for at in range(len(parameters)) if at not in inside]
        edges = [GradientEdge(entry.node, 0) for entry in self._entries]
        self._ends: Any = (*edges, *(parameters[at] for at in self._rest))
        self._values: Sequence[Tensor | None] = [None] * len(self._ends)
        if loss.requires_grad and self._ends:
            how: dict[str, Any] = {"create_graph": True, "allow_unused": True}
            with without_zeros(uses):
                self._values = torch.autograd.grad(loss, self._ends, **how)

    @property
    def gradient(self) -> Vector:
        """The loss's gradient, without a graph."""
        return self._of_all([None if each is None else each.detach() for each in self._values])

    @property
    def known_gradient(self) -> Vector:
        """The gradient, with zeros for the convolutions that are left out of the graph."""
        found = [torch.zeros_like(p) for p in self.parameters]
        for at, each in zip(self._rest, self._values[len(self._entries) :], strict=True):
            if each is not None:
                found[at] = each.detach()
        return tuple(found)

    def __call__(self, vector: Vector) -> Vector:
        """``Σ_j ∂²L / ∂θ_i ∂θ_j v_j``.

        Raises:
            NotImplementedError: an operation without a second derivative.
        """
        with torch.no_grad():
            pushed = [entry.push(vector) for entry in self._entries]
        given = [*pushed, *(vector[at] for at in self._rest)]
        pairs = [(g, v) for g, v in zip(self._values, given, strict=True)
                 if g is not None and g.requires_grad]  # fmt: skip
        if not pairs:
            return self._of_all([None] * len(self._ends))
        with named_if_missing():
            values, vectors = zip(*pairs, strict=True)
            how: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
            return self._of_all(torch.autograd.grad(values, self._ends, vectors, **how))

    @torch.no_grad()
    def _of_all(self, arrived: Sequence[Tensor | None]) -> Vector:
        """By parameter, from what arrived at the ends of the graph."""
        found: list[Tensor | None] = [None] * len(self.parameters)
        for entry, each in zip(self._entries, arrived, strict=False):
            if each is not None:
                for at, own in zip(entry.numbers, entry.pull(each), strict=True):
                    found[at] = own
        for at, each in zip(self._rest, arrived[len(self._entries) :], strict=True):
            found[at] = each
        pairs = zip(found, self.parameters, strict=True)
        return tuple(torch.zeros_like(p) if each is None else each for each, p in pairs)


def uses_of_nodes(loss: Tensor) -> Counter[Node]:
    """The nodes of a loss's graph, and how often each one's results are read."""
    if not loss.requires_grad:
        return Counter()
    first = get_gradient_edge(loss).node
    uses, waiting = Counter[Node]({first: 0}), [first]
    while waiting:
        for below, _ in waiting.pop().next_functions:
            if below is not None:
                if below not in uses:
                    waiting.append(below)
                uses[below] += 1
    return uses


def entries(uses: Counter[Node], parameters: Vector) -> Iterator[Entry]:
    """The convolutions of a graph that read no result of others, if that is all their use."""
    numbers = {id(parameter): at for at, parameter in enumerate(parameters)}
    for node in uses:
        if node.name() != CONVOLUTION or node.next_functions[0][0] is not None:
            continue
        learned = [each for each, _ in node.next_functions[1:]]
        found = [numbers.get(id(getattr(each, "variable", None))) for each in learned]
        own = [each for each in learned if each is not None]
        alone = all(uses[each] == 1 for each in own)
        if found[0] is not None and alone and len(own) == sum(at is not None for at in found):
            yield Entry(node, found[0], found[1])


@contextmanager
def named_if_missing() -> Iterator[None]:
    """Say what to do where an operation has no second derivative.

    Raises:
        NotImplementedError: there is one.
    """
    try:
        yield
    except RuntimeError as reason:
        if not re.search(r"derivative for .* is not implemented|not.*double backward", str(reason)):
            raise
        raise NotImplementedError(
            "an operation of the model has no second derivative in torch, which products with "
            f"matrices need ({reason}); expected another implementation of it: for attention "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), for cuDNN's recurrent layers "
            "torch.backends.cudnn.flags(enabled=False)"
        ) from reason
