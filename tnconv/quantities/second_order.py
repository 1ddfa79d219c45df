"""Quantities of the Gauss-Newton or Fisher matrix ``Σ_{m,n} J[m, n] J[m, n]ᵀ`` of the loss.

J are the backpropagated columns m of a root of the loss's Hessian: all of them, or sampled ones
(`tnconv.quantities.columns`). For the losses here, Gauss-Newton and (type-2) Fisher are one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tnconv import diagrams
from tnconv.quantities.base import Quantity, Statistic, Vectors
from tnconv.quantities.columns import ExactColumns, SampledColumns

Fisher = Literal["type-2", "mc"]


@dataclass(frozen=True)
class GGNDiagonal(Quantity[Tensor]):
    """``Σ_{m,n} J[m, n, θ]²``, in the parameter's shape.

    With ``per_sample`` it is ``Σ_m J[m, n, θ]²``, of shape ``(n, *parameter)``.
    ``fisher="type-2"`` propagates all columns, ``fisher="mc"`` so many ``samples`` from
    ``generator`` (neither means anything to ``"type-2"``). The factor of the loss's reduction is
    kept: with a mean over N samples, it is the diagonal for the mean.

    >>> import tnconv
    >>> model, loss_fn = torch.nn.Linear(3, 4), torch.nn.CrossEntropyLoss()
    >>> x, labels = torch.rand(8, 3), torch.randint(4, (8,))
    >>> exact, each = GGNDiagonal(), GGNDiagonal("mc", per_sample=True)
    >>> result = tnconv.compute(model, loss_fn, x, labels, [exact, each])
    >>> result[exact]["weight"].shape, result[each]["weight"].shape
    (torch.Size([4, 3]), torch.Size([8, 4, 3]))

    Args:
        fisher: "type-2" or "mc".
        samples: vectors per sample for "mc".
        generator: where "mc" draws from.
        per_sample: whether samples are kept apart.

    Raises:
        ValueError: a ``fisher`` that there is not, or fewer than one sample of ``"mc"``.
    """

    fisher: Fisher = "type-2"
    samples: int = 1
    generator: torch.Generator | None = None
    per_sample: bool = False

    def __post_init__(self) -> None:
        columns(self.fisher, self.samples, self.generator)

    def statistics(self) -> Mapping[str, Statistic]:
        each, source = self.per_sample, columns(self.fisher, self.samples, self.generator)
        samples = 0 if each else None
        found = Statistic(diagrams.ggn_diagonal, (each,), samples, parts="sum", vectors=source)
        return {"diagonal": found}

    def result(self, found: Mapping[str, Tensor], samples: int) -> Tensor:
        return found["diagonal"]


def columns(fisher: Fisher, samples: int, generator: torch.Generator | None) -> Vectors:
    """The columns that a kind of Fisher needs; equal ones are propagated once.

    Raises:
        ValueError: a kind that there is not, or fewer than one sample.
    """
    if fisher == "type-2":
        return ExactColumns()
    if fisher == "mc":
        return SampledColumns(samples, generator)
    raise ValueError(f"fisher is {fisher!r}; expected 'type-2' or 'mc'")
