"""Vectors of all parameters: one flat array, or tensors in the parameters' shapes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

Vector = tuple[Tensor, ...]
"""One tensor per parameter, or per output."""


@dataclass(frozen=True)
class Space:
    """Where vectors live: some parameters by name, in order, with their shapes and dtypes."""

    names: tuple[str, ...]
    like: Vector

    @property
    def size(self) -> int:
        return sum(each.numel() for each in self.like)

    @property
    def dtype(self) -> torch.dtype:
        """What holds all the parameters' dtypes."""
        return reduce(torch.promote_types, (each.dtype for each in self.like))

    @property
    def device(self) -> torch.device:
        return self.like[0].device

    @property
    def array_dtype(self) -> "np.dtype[Any]":
        """NumPy's dtype, which knows no bfloat16."""
        dtype = torch.float32 if self.dtype == torch.bfloat16 else self.dtype
        found: np.dtype[Any] = torch.empty(0, dtype=dtype).numpy().dtype
        return found

    def split(self, flat: Tensor) -> Vector:
        """A flat vector in the parameters' shapes.

        Raises:
            ValueError: another shape.
        """
        if flat.shape != (self.size,):
            raise ValueError(f"a vector has shape {tuple(flat.shape)}; expected ({self.size},)")
        parts = torch.split(flat, [each.numel() for each in self.like])
        return self.vector([p.reshape(e.shape) for p, e in zip(parts, self.like, strict=True)])

    def join(self, vector: Vector) -> Tensor:
        """The flat vector: parameters one after the other, each in its own order."""
        return torch.cat([each.reshape(-1).to(self.dtype) for each in vector])

    def vector(self, given: Sequence[Tensor] | Mapping[str, Tensor]) -> Vector:
        """One tensor per parameter, checked.

        Raises:
            ValueError: other names, another number of tensors, or another shape.
        """
        if isinstance(given, Mapping):
            if given.keys() != set(self.names):
                other = ", ".join(sorted(given.keys() ^ set(self.names)))
                raise ValueError(f"tensors missing or unknown: {other}; expected the parameters'")
            given = [given[name] for name in self.names]
        shapes = [tuple(each.shape) for each in given]
        expected = [tuple(each.shape) for each in self.like]
        if shapes != expected:
            raise ValueError(f"tensors have shapes {shapes}; expected {expected}")
        return tuple(v.detach().to(e.dtype) for v, e in zip(given, self.like, strict=True))

    def from_array(self, array: "np.ndarray[Any, Any]") -> Tensor:
        """A NumPy array as a tensor beside the parameters.

        Raises:
            TypeError: complex numbers.
        """
        if array.dtype.kind == "c":
            raise TypeError(f"an array has dtype {array.dtype}; expected real numbers")
        return torch.from_numpy(array.copy()).to(self.device, self.dtype)

    def to_array(self, tensor: Tensor) -> "np.ndarray[Any, Any]":
        """A tensor as a NumPy array."""
        found: np.ndarray[Any, Any] = (
            tensor.cpu().to(torch.float32).numpy()
            if (tensor.dtype == torch.bfloat16)
            else tensor.cpu().numpy()
        )
        return found
