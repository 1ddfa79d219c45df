"""Statistics of one layer, compiled once and looked up by what the layer's operation is."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from torch import Tensor

from tnconv.codegen import Program, compile
from tnconv.models.layers import Operation, explicit, known
from tnconv.quantities.base import Statistic


def values(
    statistics: Sequence[Statistic],
    operation: Operation,
    operand: str,
    operands: Mapping[str, Tensor],
    vectors: int | None = None,
) -> list[Tensor]:
    """The value of each statistic, for one parameter of one layer; ``operands`` can be too many.

    What the statistics have in common is contracted once.
    """
    if not statistics:
        return []
    program = _program(tuple(statistics), operation, operand, vectors)
    return list(program.run(*[operands[name] for name in program.operands]))


@lru_cache(maxsize=4096)
def _program(
    statistics: tuple[Statistic, ...], operation: Operation, operand: str, vectors: int | None
) -> Program[tuple[Tensor, ...]]:
    layer = operation.networks[operand]
    networks = [each.diagram(layer, operand, vectors, *each.arguments) for each in statistics]
    return compile([known(net) if operation.recipe is explicit else net for net in networks])
