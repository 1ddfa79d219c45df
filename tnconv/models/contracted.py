"""Statistics of one layer, compiled once and looked up by what the layer's operation is."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tnconv.codegen import Program
from tnconv.codegen.tiers import Build, device_of, looked_up
from tnconv.diagrams.errors import TooLittleMemory
from tnconv.models.layers import Operation, explicit, known
from tnconv.quantities.base import Statistic


def values(
    statistics: Sequence[Statistic],
    operation: Operation,
    operand: str,
    operands: Mapping[str, Tensor],
    vectors: int | None = None,
    memory_limit: int | None = None,
) -> list[Tensor]:
    """The value of each statistic, for one parameter of one layer; ``operands`` can be too many.

    What the statistics have in common is contracted once. ``memory_limit`` is how many bytes that
    may hold beside the operands.

    Raises:
        TooLittleMemory: a limit below what is needed, naming the operand and its layer's shapes.
    """
    if not statistics:
        return []
    like = next(iter(operands.values()))
    limit = None if memory_limit is None else (memory_limit, like.dtype)
    what = tuple(statistics), operation, operand, vectors, limit
    try:
        program = looked_up(_program, device_of(like), *what)
    except TooLittleMemory as error:
        shapes = {name: tuple(array.shape) for name, array in operands.items()}
        what_for = f"{operand!r} of a layer with operands {shapes}"
        raise TooLittleMemory(f"{what_for}: {error}", error.least) from error
    return list(program.run(*[operands[name] for name in program.operands]))


def _program(
    compiled: Build,
    device: str,
    statistics: tuple[Statistic, ...],
    operation: Operation,
    operand: str,
    vectors: int | None,
    limit: tuple[int, torch.dtype] | None,
) -> Program[tuple[Tensor, ...]]:
    layer = operation.networks[operand]
    networks = [each.diagram(layer, operand, vectors, *each.arguments) for each in statistics]
    networks = [known(net) if operation.recipe is explicit else net for net in networks]
    if limit is None:
        return compiled(networks, device=device)
    return compiled(networks, memory_limit=limit[0], dtype=limit[1], device=device)
