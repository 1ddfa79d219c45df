"""What a layer computes, as diagrams: one description per type of module, and nothing else.

A description takes a call apart into an `Operation`, the diagrams that are linear in each
parameter, and the operands that they read: a module's inputs, padded, normalised or one-hot.
Quantities are functions of these diagrams and never ask which layer they come from.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tnconv import diagrams
from tnconv.diagrams import Expression, Sum, TensorNetwork
from tnconv.nn.conversion import patched

Shape = tuple[int, ...]
Networks = Mapping[str, TensorNetwork]


@dataclass(frozen=True)
class Operation:
    """Diagrams ``{parameter: y}`` by a recipe (a module's function) and its arguments.

    Each is linear in its parameter, an operand of that name, and has leg n, the sample. What else
    it reads are operands of the call, such as ``x``. Equal recipes and arguments mean equal
    diagrams: programs are looked up by them.
    """

    recipe: Callable[..., Networks]
    arguments: tuple[Any, ...]

    @property
    def networks(self) -> Networks:
        """The diagram of each parameter."""
        return _networks(self)


@lru_cache(maxsize=4096)
def _networks(operation: Operation) -> Networks:
    return operation.recipe(*operation.arguments)


Operand = Tensor | Callable[[], Tensor]
"""A tensor with the batch in dimension 0, or what computes it once it is needed."""

Operands = Mapping[str, Tensor]
Described = tuple[Operation, Operand | Mapping[str, Operand]]
Description = Callable[..., Described | None]
"""From a module, each tensor that a call of it reads, and the shape of what it gives.

What comes back is the operation and its operands by name; one alone is ``x``. None declines: such
calls count as those of a layer without a description.
"""

Layout = tuple[int, bool]
"""How a weight is a matrix per group: the number of groups, and whether inputs come first."""


class Registered(NamedTuple):
    """What is known of a type of module."""

    description: Description
    layout: Callable[[Any], Layout] | None = None
    dimensions: Callable[[Any], int] | None = None


_LAYERS: dict[type[nn.Module] | str, Registered] = {}
_NEAREST: dict[type[nn.Module], Registered | None] = {}
"""What was found for a type, until another is registered."""


def register_layer(
    kind: type[nn.Module] | str,
    layout: Layout | Callable[[Any], Layout] | None = None,
    dimensions: Callable[[Any], int] | None = None,
) -> Callable[[Description], Description]:
    """Describe a type of module, for all quantities: a decorator for a `Description`.

    The function gets the module, every tensor that the call reads (in the order of the parameters
    of ``forward``), and the output's shape; it returns the operation and its operands, or None for
    a call that it does not describe, which then runs sample by sample. Subclasses count as long as
    they inherit ``forward``.

    Args:
        kind: The type, or its qualified name, ``"package.module.Class"``, where importing it is not
            wanted.
        layout: For optimizers that read ``weight`` as one matrix ``(d, a)`` of outputs and inputs
            per group: the number of groups, and whether inputs come first in its shape; or a
            function of the module to these. Without it, they leave the layer alone.
        dimensions: For layers that treat all rows of their inputs' last dimensions alike: how many
            of the output's last dimensions they make, a function of the module. Then any other
            dimension can be the batch.

    >>> import torch
    >>> class Gate(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = nn.Parameter(torch.ones(3))
    ...     def forward(self, x, gate):
    ...         return x * gate * self.weight
    >>> def gated(shape):
    ...     sizes = dict(zip(("n", "d"), shape))
    ...     view = diagrams.View.of
    ...     nodes = [diagrams.Tensor(name, view(sizes, "n", "d")) for name in ("x", "gate")]
    ...     nodes.append(diagrams.Tensor("weight", view(sizes, "d")))
    ...     return {"weight": TensorNetwork(tuple(nodes), view(sizes, "n", "d"), sizes)}
    >>> @register_layer(Gate)
    ... def _(module, x, gate, output_shape):
    ...     if x.dim() != 2 or x.shape != gate.shape:
    ...         return None
    ...     return Operation(gated, (tuple(x.shape),)), {"x": x, "gate": gate}
    >>> operation, operands = describe(Gate(), [torch.rand(8, 3), torch.rand(8, 3)], (8, 3))
    >>> operation.networks["weight"].shape, list(operands)
    ((8, 3), ['x', 'gate'])
    >>> describes(Gate(), [torch.rand(8, 1), torch.rand(8, 3)], (8, 3))
    False
    """

    def register(description: Description) -> Description:
        found = (lambda module: layout) if isinstance(layout, tuple) else layout
        _LAYERS[kind] = Registered(description, found, dimensions)
        _NEAREST.clear()
        return description

    return register


def describes(
    module: nn.Module, inputs: Sequence[Tensor] | None = None, output_shape: Shape = ()
) -> bool:
    """Whether a module's type is described and its parameters are what its type computes with.

    With the tensors that a call of it read, whether its description takes that call.
    """
    found = _registered(module)
    if found is None or inputs is None:
        return found is not None
    return described(module, inputs, output_shape) is not None


def described(module: nn.Module, inputs: Sequence[Tensor], output_shape: Shape) -> Described | None:
    """What a description says of a call, if there is one and it takes the call."""
    found = _registered(module)
    if found is None or any(tensor.is_complex() for tensor in inputs):
        return None  # diagrams conjugate nothing
    return _described(found, module, inputs, output_shape)


def describe(
    module: nn.Module, inputs: Sequence[Tensor], output_shape: Shape
) -> tuple[Operation, Operands]:
    """The operation of one call that `describes` takes, and its operands."""
    registered = _registered(module)
    assert registered is not None, type(module)
    found = _described(registered, module, inputs, output_shape)
    assert found is not None, type(module)
    return computed(found)


def computed(found: Described) -> tuple[Operation, Operands]:
    """The operation, and its operands, those too that were only described."""
    operation, given = found
    named = given if isinstance(given, Mapping) else {"x": given}
    return operation, {key: at if isinstance(at, Tensor) else at() for key, at in named.items()}


def operation_of(module: nn.Module, inputs: Sequence[Tensor], output_shape: Shape) -> Operation:
    """The operation of a call alone; what only its operands need is not computed."""
    registered = _registered(module)
    assert registered is not None, type(module)
    found = _described(registered, module, inputs, output_shape)
    assert found is not None, type(module)
    return found[0]


def own_dimensions(module: nn.Module) -> int | None:
    """How many of its output's last dimensions a layer makes, the others being rows; or unknown."""
    found = _registered(module)
    return None if found is None or found.dimensions is None else found.dimensions(module)


def layout(module: nn.Module, name: str) -> Layout | None:
    """How a parameter of a described module is a matrix, if it is one: a bias is a column."""
    found = _registered(module)
    if found is None or found.layout is None or name not in ("weight", "bias"):
        return None
    return (1, False) if name == "bias" else found.layout(module)


def _described(
    found: Registered, module: nn.Module, inputs: Sequence[Tensor], output_shape: Shape
) -> Described | None:
    with torch.no_grad():
        return found.description(module, *inputs, output_shape)


def _registered(module: nn.Module) -> Registered | None:
    """The nearest described ancestor's, unless a subclass or the object computes something else."""
    if patched(module):
        return None
    kind = type(module)
    if kind not in _NEAREST:
        _NEAREST[kind] = _nearest(kind)
    return _NEAREST[kind]


def _nearest(kind: type[nn.Module]) -> Registered | None:
    for ancestor in kind.__mro__:
        called = f"{ancestor.__module__}.{ancestor.__qualname__}"
        found = _LAYERS.get(ancestor) or _LAYERS.get(called)
        if found is not None:
            names = ("forward", "_conv_forward")
            same = all(getattr(kind, m, None) is getattr(ancestor, m, None) for m in names)
            return found if same else None
    return None


def explicit(
    vectors: int | None, samples: int, shape: Shape, samples_first: bool = False
) -> Networks:
    """``y[n, o] = Σ_θ x[o, n, θ] θ``: the layer whose gradients are x, known already.

    For that, v[m, n, o] = δ[m, o], or v[n] = 1 without vectors: `known` puts them in. With
    ``samples_first`` x is (n, o, θ).
    """
    legs = [f"d{at}" for at in range(1, len(shape) + 1)]
    positions = {} if vectors is None else {"o1": vectors}
    sizes = positions | dict(zip(("n", *legs), (samples, *shape), strict=True))
    view = diagrams.View.of
    lead = ("n", *positions) if samples_first else (*positions, "n")
    nodes = (
        diagrams.Tensor("x", view(sizes, *lead, *legs)),
        diagrams.Tensor("parameter", view(sizes, *legs)),
    )
    return {"parameter": TensorNetwork(nodes, view(sizes, "n", *positions), sizes)}


def known(network: Expression, cotangent: str = "grad_output") -> Expression:
    """A diagram over an `explicit` layer, without the cotangent that such a layer has."""

    def without(term: TensorNetwork) -> TensorNetwork:
        nodes: list[diagrams.Node] = []
        for node in term.nodes:
            if not isinstance(node, diagrams.Tensor) or node.name != cotangent:
                nodes.append(node)
            elif len(legs := node.legs) == 3:
                nodes.append(diagrams.delta(legs[0], legs[2]))
        return term.with_(nodes)

    return Sum(tuple(map(without, network.terms)))


def repeated(calls: int, recipe: Callable[..., Networks], *arguments: Any) -> Networks:
    """Several calls of one operation: see `tnconv.diagrams.repeated`."""
    networks = _networks(Operation(recipe, arguments))
    return {
        name: diagrams.repeated(layer, calls, tuple(layer.operands.keys() - {name}))
        for name, layer in networks.items()
    }
