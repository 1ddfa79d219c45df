"""The vectors whose rows a low-rank matrix is made of: columns of a root, and the gradient."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tnconv.models.propagation import LossFunction
from tnconv.operators.low_rank.label_columns import LabelRoot, has_label_root, label_root
from tnconv.quantities.base import Vectors


@dataclass(frozen=True, eq=False)
class Given(Vectors):
    """Vectors that are there already."""

    vectors: Tensor

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def columns(self, loss_fn: LossFunction, output: Tensor, targets: Any) -> Tensor:
        return self.vectors


@dataclass(frozen=True)
class LossGradients(Vectors):
    """The loss's own gradient in the model's output as a single vector m."""

    def columns(self, loss_fn: LossFunction, output: Tensor, targets: Any) -> Tensor:
        end = output.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss_fn(end, targets), end)
        return gradient.unsqueeze(0)


@dataclass(frozen=True)
class WithGradient(LossGradients):
    """The columns of a source of vectors with the loss's own gradient among them.

    It is the last one; for exact columns of cross-entropy of labels it is one of the root's own,
    and ``roots`` notes that root, or else None.
    """

    source: Vectors
    exact: bool
    roots: "list[LabelRoot | None]" = field(default_factory=list, hash=False, compare=False)
    by_sample = True

    def parts(
        self,
        loss_fn: LossFunction,
        output: Tensor,
        targets: Any,
        size: int,
        owners: Tensor | None = None,
    ) -> Iterator[Tensor]:
        if owners is None:
            yield from super().parts(loss_fn, output, targets, size)
            return
        self.roots.append(None)
        given: Any = {"owners": owners} if self.source.by_sample else {}
        found = [*self.source.parts(loss_fn, output, targets, size, **given)]
        yield torch.cat([*found, super().columns(loss_fn, output, targets)])

    def columns(self, loss_fn: LossFunction, output: Tensor, targets: Any) -> Tensor:
        if self.exact and has_label_root(loss_fn, targets):
            root = label_root(loss_fn, output, targets)
            self.roots.append(root)
            return root.vectors()
        self.roots.append(None)
        gradient = super().columns(loss_fn, output, targets)
        return torch.cat([self.source.columns(loss_fn, output, targets), gradient])
