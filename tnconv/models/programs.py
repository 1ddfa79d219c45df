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
    """The value of each statistic, for one parameter of one layer; ``operands`` can be too many."""
    programs = [_program(each, operation, operand, vectors) for each in statistics]
    return [program.run(*[operands[name] for name in program.operands]) for program in programs]


@lru_cache(maxsize=4096)
def _program(
    statistic: Statistic, operation: Operation, operand: str, vectors: int | None
) -> Program:
    layer = operation.networks[operand]
    network = statistic.diagram(layer, operand, vectors, *statistic.arguments)
    return compile(known(network) if operation.recipe is explicit else network)
