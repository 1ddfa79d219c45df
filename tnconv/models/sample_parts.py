"""Some samples of an operation, as an operation on parts of the same operands."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from tnconv.codegen.programs.parts import Window, read_only_what_is_needed
from tnconv.diagrams import TensorNetwork
from tnconv.models.layers import Networks, Operands, Operation


@dataclass(frozen=True)
class Part:
    """An operation on some samples, its diagram, and what this reads of the whole operands."""

    operation: Operation
    network: TensorNetwork
    windows: tuple[Window, ...]

    def read(self, operands: Mapping[str, Tensor]) -> Operands:
        """The operands of the part, as views."""
        found = dict(operands)
        for name, dim, start, stop in self.windows:
            found[name] = found[name].narrow(dim, start, stop - start)
        return found


@lru_cache(maxsize=4096)
def part_of(operation: Operation, operand: str, start: int, stop: int) -> Part:
    """The samples from ``start`` to ``stop`` of what an operation computes from a parameter."""
    network, windows = _narrowed(operation, operand, start, stop)
    how = operand, start, stop, operation.recipe, *operation.arguments
    return Part(Operation(some_samples, how), network, windows)


def some_samples(
    operand: str, start: int, stop: int, recipe: Callable[..., Networks], *arguments: Any
) -> Networks:
    """Some samples of an operation, for one of its parameters."""
    return {operand: _narrowed(Operation(recipe, arguments), operand, start, stop)[0]}


def _narrowed(
    operation: Operation, operand: str, start: int, stop: int
) -> tuple[TensorNetwork, tuple[Window, ...]]:
    network = operation.networks[operand].narrow("n", start, stop - start)
    part, windows = read_only_what_is_needed([network])
    assert isinstance(part, TensorNetwork)
    return part, windows
