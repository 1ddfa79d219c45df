"""A call's operands with the samples in front, wherever the call had them.

Layers that treat every row of their last dimensions alike take any other dimension as the batch:
what is left of it are positions. A batch that is folded into dimension 0 of other layers is so many
calls of one operation.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tnconv.models.capture import Call
from tnconv.models.layers import Operation, describe, repeated
from tnconv.models.sample_maps import Batch, Fold, Owned, Shape, Shared, folded, front, is_fast

OWN_DIMENSIONS: Mapping[type[nn.Module], Callable[[Any], int]] = {
    nn.Linear: lambda layer: 1,
    nn.Embedding: lambda layer: 1,
    nn.LayerNorm: lambda layer: len(layer.normalized_shape),
    nn.RMSNorm: lambda layer: len(layer.normalized_shape),
}


def own_dimensions(module: nn.Module) -> int | None:
    """How many of its output's last dimensions a layer makes, the others being rows; or unknown."""
    for kind, count in OWN_DIMENSIONS.items():
        if isinstance(module, kind):
            return count(module)
    return None


def is_arranged(call: Call, samples: int) -> bool:
    """Whether a described call's operands can be put in order: its map, its type, and its input."""
    if not call.inputs:
        return False
    x, known, own = call.inputs[0], call.map, own_dimensions(call.module)
    if isinstance(known, Shared):
        return bool(call.output_shape) and (own is not None or x.shape[:1] == call.output_shape[:1])
    if is_fast(known):
        return x.shape[:1] == (samples,)
    if not isinstance(known, Owned):
        return False
    if own is not None:
        return known.dim < len(call.output_shape) - own
    return known.dim == 0 and x.shape[:1] == call.output_shape[:1]


def arranged(
    call: Call,
    v: Tensor,  # (*o), or (n, *o) after a shared call; several vectors with their dimension before
    samples: int,
    lead: int = 0,
) -> tuple[Operation, Tensor, Tensor]:
    """A call's operation, its operand x, and the gradient after it, both with the samples n."""
    known, x, shape = call.map, call.x, call.output_shape
    if isinstance(known, Shared):
        return _shared(call, v, samples, lead)
    assert isinstance(known, Owned)
    if is_fast(known):
        operation, x = describe(call.module, x, shape)
    elif own_dimensions(call.module) is not None:
        v = front(v, known, samples, lead)
        x = front(x, known, samples)
        operation, x = describe(call.module, x, tuple(v.shape[lead:]))
    else:
        return _repeated(call.module, known, x, v, samples, lead)
    return operation, x, v


def _shared(call: Call, v: Tensor, samples: int, lead: int) -> tuple[Operation, Tensor, Tensor]:
    """Every sample sees all of the input, with a gradient of its own after the output."""
    shape, x = call.output_shape, call.x
    if own_dimensions(call.module) is not None:
        operation, operand = describe(call.module, x[None], (1, *shape))
        if samples != 1:
            many = x[None].expand(samples, *x.shape)
            operation = _operation(call.module, many, (samples, *shape))
        return operation, operand.expand(samples, *operand.shape[1:]), v
    rows = shape[0]
    x = x.expand(samples, *x.shape).flatten(0, 1)
    whole = Batch(0) if rows == 1 else Fold(0, rows, "nt")
    v = v.flatten(lead, lead + 1)
    if isinstance(whole, Batch):
        operation, x = describe(call.module, x, tuple(v.shape[lead:]))
        return operation, x, v
    return _repeated(call.module, whole, x, v, samples, lead)


def _repeated(
    module: nn.Module, known: Owned, x: Tensor, v: Tensor, samples: int, lead: int
) -> tuple[Operation, Tensor, Tensor]:
    """A fold in dimension 0: t calls of the operation on one batch."""
    if isinstance(known, Batch):  # t is 1 where there is one sample
        operation, x = describe(module, x, tuple(v.shape[lead:]))
        return operation, x, v
    one = _operation(module, x[:samples], (samples, *v.shape[lead + 1 :]))
    operand = describe(module, x, tuple(v.shape[lead:]))[1]
    operation = Operation(repeated, (known.t, one.recipe, *one.arguments))
    return operation, folded(operand, known, samples), folded(v, known, samples, lead)


def _operation(module: nn.Module, x: Tensor, shape: Shape) -> Operation:
    """The operation alone, without its operand where that can be left out."""
    try:
        return describe(module, torch.empty_like(x, device="meta"), shape)[0]
    except (RuntimeError, NotImplementedError):  # the operand needs values
        return describe(module, x, shape)[0]
