"""Vectors that flow backwards for Gauss-Newton and Fisher: roots of the loss's Hessian.

With the Hessian ``∂²L / ∂y ∂y' = Σ_m S[m] S[m]ᵀ`` in the model's outputs y, the Gauss-Newton matrix
is ``Σ_{m,n} J[m, n] J[m, n]ᵀ`` of what S becomes in a parameter. The factor of the loss's reduction
is part of S, so that the matrix is the one of the loss that was given, mean or sum.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tnconv.losses.roots import curvature
from tnconv.quantities.base import Vectors


@dataclass(frozen=True)
class ExactColumns(Vectors):
    """All columns of a root of the Hessian: C-1 for cross-entropy with C classes, C for others.

    Where outputs have positions, as many for each of them.
    """

    by_sample = True

    def columns(
        self, loss_fn: Callable[[Any, Any], Tensor], output: Tensor, targets: Any
    ) -> Tensor:
        return curvature(loss_fn, output, targets).vectors()

    def parts(
        self,
        loss_fn: Callable[[Any, Any], Tensor],
        output: Tensor,
        targets: Any,
        size: int,
        owners: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """The columns, so many at a time.

        Args:
            loss_fn: the loss.
            output: what the model gave.
            targets: the targets of the batch.
            size: how many columns each part has at most.
            owners: the samples that entries of the output belong to.
        """
        found = curvature(loss_fn, output, targets, owners)
        for at in range(0, max(1, found.columns), size):
            yield found.vectors(at, min(at + size, found.columns))


@dataclass(frozen=True)
class SampledColumns(Vectors):
    """Gradients for targets drawn from the model's own likelihood, the Hessian in expectation.

    Source: Martens & Grosse 2015, section 5; torch's default generator where none is given.
    """

    samples: int = 1
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}; expected at least 1")

    def columns(
        self, loss_fn: Callable[[Any, Any], Tensor], output: Tensor, targets: Any
    ) -> Tensor:
        return curvature(loss_fn, output, targets).samples(self.samples, self.generator)


@dataclass(frozen=True)
class NoColumns(Vectors):
    """No vectors at all, for what layers read going forward: nothing is sent backwards."""

    def columns(
        self, loss_fn: Callable[[Any, Any], Tensor], output: Tensor, targets: Any
    ) -> Tensor:
        return output.new_zeros(0, *output.shape)
