"""What is made of the rows ``J[m, n, θ]`` of a Jacobian, whoever has them.

`JacobianRows` holds the vectors after all layers, `SentRows` sends them backwards again whenever a
product is wanted.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tnconv.operators.low_rank.rows import JacobianRows


class Rows(ABC):
    """``J[m, n, θ]`` for the vectors m and samples n of a batch, θ all entries of some parameters.

    ``like`` are these parameters by name.
    """

    like: Mapping[str, Tensor]
    vectors: int
    samples: int

    @property
    def dtype(self) -> torch.dtype:
        """What holds the entries of all parameters."""
        dtypes = [each.dtype for each in self.like.values()]
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).bits)

    @property
    def device(self) -> torch.device:
        return next(iter(self.like.values())).device

    @property
    @abstractmethod
    def held_bytes(self) -> int:
        """What is held between products."""

    @abstractmethod
    def only(self, names: Iterable[str]) -> "Rows":
        """The rows in some of the parameters."""

    @abstractmethod
    def between(self, start: int, stop: int) -> "Rows":
        """The rows of the vectors ``start <= m < stop``."""

    @abstractmethod
    def scaled(self, factors: Tensor) -> "Rows":  # (m, n)
        """The rows ``factors[m, n] J[m, n, θ]``."""

    @abstractmethod
    def gram(self) -> Tensor:
        """``K[m, n, m', n'] = Σ_θ J[m, n, θ] J[m', n', θ]``."""

    @abstractmethod
    def gram_with(self, count: int) -> Tensor:
        """The Gram matrix's columns of the vectors ``m' < count``."""

    @abstractmethod
    def gram_under(self, other: "JacobianRows") -> Tensor:
        """``K[m, n, m', n'] = Σ_θ J'[m, n, θ] J[m', n', θ]`` with rows J' of another batch."""

    @abstractmethod
    def combined(self, coefficients: Tensor) -> dict[str, Tensor]:  # (f, m, n)
        """``Σ_{m,n} c[f, m, n] J[m, n, θ]`` by parameter name, ``(f, *parameter)``."""

    @abstractmethod
    def summed(self, vector: int = 0) -> dict[str, Tensor]:
        """``Σ_n J[m, n, θ]`` of one vector m, by parameter name."""

    @abstractmethod
    def projected(self, directions: Mapping[str, Tensor]) -> Tensor:  # each (f, *parameter)
        """``Σ_θ J[m, n, θ] u[f, θ]``, of shape ``(f, m, n)``."""

    @abstractmethod
    def squares(self) -> dict[str, Tensor]:
        """``Σ_{m,n} J[m, n, θ]²`` by parameter name: the diagonal of ``Jᵀ J``."""
