"""How many bytes an optimizer's state has, before there is any."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Kinds = Mapping[str, int]


@dataclass(frozen=True, repr=False)
class Memory:
    """Bytes by parameter: of itself, and of what its state will hold, by kind.

    >>> memory = Memory({"weight": 40}, {"weight": {"K": 12, "momentum_buffer": 40}})
    >>> memory.total, memory.ratio
    (52, 1.3)
    """

    parameters: Mapping[str, int]
    states: Mapping[str, Kinds]

    @property
    def kinds(self) -> dict[str, int]:
        """The bytes of each kind of state."""
        found: dict[str, int] = {}
        for each in self.states.values():
            for kind, size in each.items():
                found[kind] = found.get(kind, 0) + size
        return found

    @property
    def total(self) -> int:
        """The bytes of all states."""
        return sum(self.kinds.values())

    @property
    def ratio(self) -> float:
        """Over the bytes of all parameters."""
        return self.total / max(1, sum(self.parameters.values()))

    def __repr__(self) -> str:
        return f"<Memory: state of {self.total} bytes, {self.ratio:.3f} of parameters>"

    def __str__(self) -> str:
        rows = [
            f"{name}: {self.parameters[name]} bytes; state "
            + (", ".join(f"{kind} {size}" for kind, size in kinds.items()) or "none")
            for name, kinds in self.states.items()
        ]
        return "\n".join(
            [*rows, f"state in all: {self.total} bytes, {self.ratio:.3f} of parameters"]
        )


def size_of(count: int, dtype: torch.dtype) -> int:
    """The bytes of so many numbers."""
    return count * dtype.itemsize


def size(tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    """The bytes of a tensor, or of one like it in another dtype."""
    return size_of(tensor.numel(), dtype or tensor.dtype)
