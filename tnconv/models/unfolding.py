"""Calls of one parameter by several layers, or on several sizes, as one layer of patches.

Per-sample gradients of different operations can be added, but then they no longer show inputs and
output gradients apart, which Kronecker factors need. Unfolded, all calls are the one operation
``y[n, q, g, d] = Σ_a x[n, q, g, a] w[g, d, a]``, with the positions q of all calls in a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tnconv import diagrams
from tnconv.codegen import Program
from tnconv.codegen.tiers import Build, device_of, looked_up
from tnconv.diagrams import Roles, TensorNetwork, View
from tnconv.models.layers import Networks, Operands, Operation

Sizes = tuple[tuple[str, int], ...]


def of_patches(operand: str, view: View, roles: Roles, sizes: Sizes) -> Networks:
    """The layer of patches for a parameter that is read through a view."""
    size = dict(sizes)
    nodes = (
        diagrams.Tensor("x", View.of(size, "n", "q", *roles.groups, *roles.patch)),
        diagrams.Tensor(operand, view),
    )
    result = View.of(size, "n", "q", *roles.groups, *roles.outputs)
    return {operand: TensorNetwork(nodes, result, size)}


def joined(
    operations: Sequence[Operation],
    operand: str,
    given: Sequence[tuple[Operands, Tensor]],  # what each call read, and v after it
    vectors: int | None = None,
) -> tuple[Operation, Tensor, Tensor] | None:
    """Calls as one operation with its x and v; None if they read the parameter differently."""
    layers = [operation.networks[operand] for operation in operations]
    keys = {_parameter(layer, operand) for layer in layers}
    if len(keys) != 1:
        return None
    x, v = [], []
    for operation, (read, after) in zip(operations, given, strict=True):
        what = device_of(after), operation, operand, vectors
        patches, outputs = looked_up(_patches, *what), looked_up(_outputs, *what)
        x.append(patches.run(*[read[name] for name in patches.operands]).to(after))
        v.append(outputs.run(after))
    view, roles, own = keys.pop()
    rows, columns = torch.cat(x, 1), torch.cat(v, 1 if vectors is None else 2)
    sizes = (("n", rows.shape[0]), ("q", rows.shape[1]), *own)
    return Operation(of_patches, (operand, view, roles, sizes)), rows, columns


def _parameter(layer: TensorNetwork, operand: str) -> tuple[View, Roles, Sizes]:
    """How a layer reads its parameter: the view, what its legs do, and their sizes."""
    view = next(node.view for node in layer.tensors if node.name == operand)
    roles = Roles.of(layer, operand)
    sizes = tuple((leg, layer.sizes[leg]) for leg in dict.fromkeys(view.legs))
    return view, Roles(roles.groups, roles.outputs, roles.patch, ()), sizes


def _patches(
    compiled: Build, device: str, operation: Operation, operand: str, vectors: int | None
) -> Program:
    """From x to patches ``(n, q, *g, *a)``."""
    layer = operation.networks[operand]
    roles, patches = Roles.of(layer, operand), diagrams.input_half(layer, operand)
    rows = View.of(patches.sizes, "n", roles.positions, *roles.groups, *roles.patch)
    return compiled(patches.with_(result=rows), device=device)


def _outputs(
    compiled: Build, device: str, operation: Operation, operand: str, vectors: int | None
) -> Program:
    """From v to ``(m, n, q, *g, *d)``."""
    layer, m = operation.networks[operand], () if vectors is None else ("m",)
    roles, outputs = Roles.of(layer, operand), diagrams.output_half(layer, operand, vectors)
    columns = View.of(outputs.sizes, *m, "n", roles.positions, *roles.groups, *roles.outputs)
    return compiled(outputs.with_(result=columns), device=device)
