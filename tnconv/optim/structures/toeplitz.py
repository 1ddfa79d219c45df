"""Triangular Toeplitz matrices: one number for each diagonal.

Products with them are convolutions of length d, which fast Fourier transforms compute in
``O(d log d)`` operations a column; transforms need float32 or more. ``Π(Sᵀ M S)`` depends on all
of M, and is made of a root of M.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tnconv import diagrams
from tnconv.diagrams import Axis, TensorNetwork, View
from tnconv.optim.structures.structure import Structure, wide

TRANSFORMED = 2**15
"""So many numbers are transformed at a time."""


@dataclass(frozen=True)
class TriangularToeplitz(Structure):
    """``S[i, j] = θ[i - j]`` at and below the diagonal, or the transposed with ``upper``.

    >>> TriangularToeplitz(3).dense(torch.tensor([1.0, 2.0, 3.0])).round().abs()
    tensor([[1., 0., 0.],
            [2., 1., 0.],
            [3., 2., 1.]])
    """

    upper: bool = False

    @cached_property
    def count(self) -> int:
        """The number of parameters."""
        return self.size

    def diagram(self) -> TensorNetwork:
        """``S[k + j, j] = θ[k]``, inside of the matrix."""
        sizes = {"k": self.size, "j": self.size}
        node = diagrams.Tensor("parameters", View.of(sizes, "k"))
        far, near = Axis(self.size, 0, (("j", 1), ("k", 1))), Axis(self.size, 0, (("j", 1),))
        axes = (near, far) if self.upper else (far, near)
        return TensorNetwork((node,), View((self.size, self.size), axes), sizes)

    def matmat(self, member: Tensor, x: Tensor) -> Tensor:
        """``S X`` for x of shape (..., size, columns)."""
        return self._filtered(member, x, self.upper)

    def rmatmat(self, member: Tensor, x: Tensor) -> Tensor:
        """``Sᵀ X`` for x of shape (..., size, columns)."""
        return self._filtered(member, x, not self.upper)

    def inner_products(self, y: Tensor, z: Tensor | None = None) -> Tensor:
        """``⟨Y Zᵀ, E[e]⟩`` for Y and Z of shape (..., size, columns), Z = Y by default."""
        pairs = [(part, part) for part in self._pieces(y)]
        if z is not None:
            pairs = list(zip(self._pieces(y), self._pieces(z), strict=True))
        together = sum(map(self._correlation, *zip(*pairs, strict=True)), torch.zeros(()))
        found: Tensor = torch.fft.irfft(together, self._length, -1)
        return found[..., : self.size].to(y.dtype)

    def inner(self, member: Tensor, x: Tensor | None = None) -> Tensor:
        """``Π(Sᵀ X Xᵀ S)`` for x of shape (..., size, columns), or ``Π(Sᵀ S)``.

        Without x by ``⟨Sᵀ S, E[k]⟩ = Σ_m (d - k - m) θ[m] θ[m + k]``: the pairs of entries k apart
        in a column that starts m + k before the end; likewise for rows of upper matrices.
        """
        if x is not None:
            return super().inner(member, x)
        own = member.to(wide(member)).unsqueeze(-1)
        later = own * self.multiplicities(own).unsqueeze(-1)
        first, second = self._spectrum(later), self._spectrum(own)
        pairs: Tensor = torch.fft.irfft((first * second.conj()).squeeze(-1), self._length, -1)
        found = pairs[..., : self.size] / self.weights(pairs)
        return found.to(member.dtype)

    def product(self, first: Tensor, second: Tensor) -> Tensor:
        """The member ``S T``."""
        return self._filtered(first, second.unsqueeze(-1), False).squeeze(-1)

    def constants(self) -> dict[str, Tensor]:
        counts = torch.arange(self.size, 0, -1, dtype=torch.float64)
        first = torch.zeros_like(counts)
        first[0] = 1
        return {"identity": first, "weights": counts * (1 + first) / 2, "multiplicities": counts}

    def _filtered(self, member: Tensor, x: Tensor, correlated: bool) -> Tensor:
        """``Σ_k θ[k] x[i - k]``, or ``x[i + k]``."""
        own = self._spectrum(member.unsqueeze(-1))
        own = own.conj().resolve_conj() if correlated else own

        def filtered(part: Tensor) -> Tensor:
            found: Tensor = torch.fft.irfft(self._spectrum(part).mul_(own), self._length, -2)
            return found[..., : self.size, :].to(member.dtype)

        pieces = self._pieces(x)
        if len(pieces) == 1:
            return filtered(x)
        lead = torch.broadcast_shapes(member.shape[:-1], x.shape[:-2])  # type: ignore[no-untyped-call]
        found: Tensor = member.new_empty(*lead, *x.shape[-2:])
        for part, place in zip(pieces, self._pieces(found), strict=True):
            place.copy_(filtered(part))
        return found

    def _correlation(self, y: Tensor, z: Tensor) -> Tensor:
        """The spectrum of what Y and Z have in common, over all columns."""
        first = self._spectrum(y)
        second = first if y is z else self._spectrum(z)
        if self.upper:
            first, second = second, first
        return (first * second.conj()).sum(-1)

    def _pieces(self, x: Tensor) -> list[Tensor]:
        """Columns of which as many are transformed at a time as need little memory."""
        return list(torch.split(x, max(1, TRANSFORMED // self._length), -1))

    def _spectrum(self, x: Tensor) -> Tensor:
        found: Tensor = torch.fft.rfft(x.to(wide(x)), self._length, -2)
        return found

    @cached_property
    def _length(self) -> int:
        """The least product of 2, 3 and 5 with room for a convolution of two vectors."""
        length = max(1, 2 * self.size - 1)
        while True:
            rest = length
            for prime in (2, 3, 5):
                while rest % prime == 0:
                    rest //= prime
            if rest == 1:
                return length
            length += 1
