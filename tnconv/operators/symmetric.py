"""Symmetric matrices as linear operators on tensors and arrays, with the interface of SciPy."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

V = TypeVar("V")  # a tensor or an array


class SymmetricOperator(ABC):
    """A symmetric matrix that is seen through products with flat vectors, or with columns.

    It has the interface of SciPy's ``LinearOperator`` without needing SciPy.
    """

    @property
    @abstractmethod
    def size(self) -> int:
        """The number of rows, and of columns."""

    @property
    @abstractmethod
    def precision(self) -> torch.dtype:
        """The dtype of vectors."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where vectors are."""

    @abstractmethod
    def _times(self, columns: Tensor) -> Tensor:
        """The product with columns ``(size, k)``."""

    def __repr__(self) -> str:
        """The shape, and what it is of."""
        what = type(getattr(self, "model", None)).__name__
        of = "" if what == "NoneType" else f" of a {what}"
        return f"<{type(self).__name__} of shape {self.shape}{of}, {self.precision}, {self.device}>"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.size, self.size

    @property
    def dtype(self) -> "np.dtype[Any]":
        """The dtype of products with arrays: NumPy knows no bfloat16."""
        dtype = torch.float32 if self.precision == torch.bfloat16 else self.precision
        found: np.dtype[Any] = torch.empty(0, dtype=dtype).numpy().dtype
        return found

    def __matmul__(self, other: V) -> V:
        """The product with a flat vector, or with a matrix whose columns are vectors.

        Raises:
            TypeError: an array of complex numbers.
            ValueError: another shape.
        """
        if isinstance(other, Tensor):
            return cast(V, self._any(other.to(self.device, self.precision)))
        array = cast("np.ndarray[Any, Any]", other)
        if array.dtype.kind == "c":
            raise TypeError(f"an array has dtype {array.dtype}; expected real numbers")
        found = self._any(torch.from_numpy(array.copy()).to(self.device, self.precision))
        plain = found.float() if found.dtype == torch.bfloat16 else found
        return cast(V, plain.cpu().numpy())

    def matvec(self, vector: V) -> V:
        """The product with one vector."""
        return self @ vector

    matmat = rmatvec = rmatmat = matvec  # the matrix is symmetric

    def adjoint(self) -> "SymmetricOperator":
        """The operator itself: it is symmetric."""
        return self

    T = H = property(adjoint)

    def _any(self, given: Tensor) -> Tensor:
        if given.dim() not in (1, 2) or len(given) != self.size:
            size = self.size
            raise ValueError(
                f"operand has shape {tuple(given.shape)}; expected ({size},) or ({size}, k)"
            )
        columns = given if given.dim() == 2 else given.unsqueeze(1)
        return self._times(columns).reshape(given.shape)
