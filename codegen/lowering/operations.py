"""Operations: what torch can compute, and how its calls are spelled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

_operations: dict[tuple[str, str], "Operation"] = {}


@dataclass(frozen=True, eq=False)
class Operation:
    """Something that torch computes.

    Args:
        name: A name, one for each operation of a module.
        call: Its call in torch, given the texts of its inputs and then its attributes.
        view: Whether the result shares the memory of the one input.
        native: Whether it is one of torch's convolution kernels, which real dtypes alone have.
        imports: The modules that the call needs, by their names in `programs.source.IMPORTS`.
        helper: The source of a function that the call needs, which has the operation's name.
        precise: Whether numbers of sixteen bits are too coarse for it: see `Program.run_cast`.
    """

    name: str
    call: Callable[..., str]
    view: bool = False
    native: bool = False
    imports: tuple[str, ...] = ()
    helper: str = ""
    precise: bool = False

    def __post_init__(self) -> None:
        assert _operations.setdefault((self.call.__module__, self.name), self) is self, self.name

    def __reduce__(self) -> tuple[object, ...]:
        return _operation, (self.call.__module__, self.name)


def _operation(module: str, name: str) -> Operation:
    import_module(module)
    return _operations[module, name]


def helpers() -> frozenset[str]:
    """The names of functions that calls need beside torch."""
    return frozenset(known.name for known in _operations.values() if known.helper)


def items(values: Sequence[Any]) -> str:
    """The text of several arguments, or of a tuple's entries."""
    if not values:
        return "()"
    return ", ".join(map(str, values)) + ("," if len(values) == 1 else "")
