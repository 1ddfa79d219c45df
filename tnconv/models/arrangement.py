"""A call's operands with the samples in front, wherever the call had them.

Layers that treat every row of their last dimensions alike take any other dimension as the batch:
what is left of it are positions. A batch that is folded into dimension 0 of other layers is so many
calls of one operation.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from tnconv.models.calls import Call
from tnconv.models.layers import (
    Operands,
    Operation,
    computed,
    describe,
    described,
    operation_of,
    own_dimensions,
    repeated,
)
from tnconv.models.sample_maps import Batch, Fold, Owned, Shared, folded, front, is_fast
from tnconv.recursions import Rows

Arranged = tuple[Operation, Operands, Tensor]


def is_arranged(call: Call, samples: int) -> bool:
    """Whether a described call's operands can be put in order: its map, its type, its inputs."""
    if not call.inputs:
        return False
    known, own, shape = call.map, own_dimensions(call.module), call.output_shape
    if isinstance(known, Shared):
        return own is not None or _aligned(call)
    if not isinstance(known, Owned):
        return False
    if is_fast(known):
        return all(x.shape[:1] == (samples,) for x in call.inputs)
    if own is not None:
        return known.dim < len(shape) - own and all(
            x.shape[: known.dim + 1] == shape[: known.dim + 1] for x in call.inputs
        )
    return known.dim == 0 and _aligned(call)


def _aligned(call: Call) -> bool:
    """Whether all inputs have the output's dimension 0."""
    return bool(call.output_shape) and all(
        x.shape[:1] == call.output_shape[:1] for x in call.inputs
    )


def arranged(
    call: Call,
    v: Tensor,  # (*o), or (n, *o) after a shared call; several vectors with their dimension before
    samples: int,
    lead: int = 0,
) -> Arranged:
    """A call's operation, its operands, and the gradient after it, with the samples in front."""
    known, module = call.map, call.module
    if isinstance(known, Shared):
        return _shared(call, v, samples, lead)
    assert isinstance(known, Owned)
    if is_fast(known):
        return *operands_of(call), v
    given = call.given
    if own_dimensions(module) is not None:
        v = front(v, known, samples, lead)
        moved = [front(x, known, samples) for x in given]
        return *describe(module, moved, tuple(v.shape[lead:])), v
    return _repeated(module, known, given, v, samples, lead)


def operands_of(call: Call) -> tuple[Operation, Operands]:
    """A call's operation and operands as the layer read them: its rows are the samples.

    Raises:
        RuntimeError: they were changed in place since, or freed.
    """
    if call.description is not None:
        call.expect_unchanged()
        return computed(call.description)
    return describe(call.module, call.given, call.output_shape)


def narrowed(call: Call, rows: Rows) -> Call:
    """What a call whose rows are samples would have been for some of them alone."""
    given = tuple(rows.of(x) for x in call.given)
    shape = rows.shape(call.output_shape)
    found = Call(call.name, call.module, given, {}, shape, call.edge, False, call.parameters)
    found.map, found.description = call.map, described(call.module, given, shape)
    found.described = found.description is not None
    return found


def _shared(call: Call, v: Tensor, samples: int, lead: int) -> Arranged:
    """Every sample sees all of the inputs, with a gradient of its own after the output."""
    shape, given, module = call.output_shape, call.given, call.module
    if own_dimensions(module) is not None:
        operands = describe(module, [x[None] for x in given], (1, *shape))[1]
        many = [x.expand(samples, *x.shape) for x in given]
        operation = operation_of(module, many, (samples, *shape))
        return operation, {k: x.expand(samples, *x.shape[1:]) for k, x in operands.items()}, v
    many = [x.expand(samples, *x.shape).flatten(0, 1) for x in given]
    v = v.flatten(lead, lead + 1)
    whole = Batch(0) if shape[0] == 1 else Fold(0, shape[0], "nt")
    if isinstance(whole, Batch):
        return *describe(module, many, tuple(v.shape[lead:])), v
    return _repeated(module, whole, many, v, samples, lead)


def _repeated(
    module: nn.Module, known: Owned, given: Sequence[Tensor], v: Tensor, samples: int, lead: int
) -> Arranged:
    """A fold in dimension 0: t calls of the operation on one batch."""
    assert isinstance(known, Fold)
    shape = tuple(v.shape[lead + 1 :])
    one = operation_of(module, [x[:samples] for x in given], (samples, *shape))
    operands = describe(module, given, (v.shape[lead], *shape))[1]
    operation = Operation(repeated, (known.t, one.recipe, *one.arguments))
    read = {name: folded(x, known, samples) for name, x in operands.items()}
    return operation, read, folded(v, known, samples, lead)
