"""A root of cross-entropy's Hessian, one of whose columns is the loss's gradient up to a factor.

At a position with probabilities π, label y and factor a, the Hessian is ``a (diag(π) - π πᵀ)`` and
the gradient ``g = a (π - e_y)``. With ``q = √π``, ``diag(q)`` times an orthonormal basis of what is
orthogonal to q is a root (times √a); the basis vector along ``(I - q qᵀ) e_y`` gives the column
``-√(π_y / (a (1 - π_y))) g``. So a Gram matrix of these columns shows slopes and the gradient, too.
The column is propagated as g itself, which is finite for confident mistakes (``π_y`` near 0), and
its factor is applied to the Gram matrix afterwards.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnconv.losses.roots import Curvature, Softmax, complement, curvature, recognised
from tnconv.models.propagation import LossFunction


@dataclass(frozen=True, eq=False, repr=False)
class LabelRoot(Curvature):
    """``R[n, c, j, p]`` with ``j = 0`` the gradient g, the others the root's own columns."""

    factor: Tensor  # (n, p)
    labels: Tensor  # (n, p)

    @property
    def rank(self) -> int:
        return int(self.y.shape[1]) - 1

    def root(self) -> Tensor:
        order = self._one_hot.argsort(stable=True, dim=1)[:, :-1]  # all classes but the label
        others = self.y.gather(1, order)
        weights = (self.factor.unsqueeze(1) * self._probabilities.gather(1, order)).sqrt()
        basis = weights.unsqueeze(2) * complement(others.softmax(1).sqrt())
        n, _, columns, positions = basis.shape
        found = self.y.new_zeros(n, self.y.shape[1], columns, positions)
        found.scatter_(1, order.unsqueeze(2).expand_as(basis), basis)
        gradient = self.factor.unsqueeze(1) * (self._probabilities - self._one_hot)
        return torch.cat([gradient.unsqueeze(2), found], 2)

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        return Softmax(self.y, self.shape, self.factor).draw(generator)

    @property
    def scale(self) -> Tensor:
        """``(m, n)``: what makes vectors the root's columns; 0 where a gradient is 0."""
        right = (self._probabilities * self._one_hot).sum(1)
        wrong = (self._probabilities * (1 - self._one_hot)).sum(1)  # 1 - π_y without cancellation
        factors = (right / (self.factor * wrong)).sqrt().nan_to_num(0, 0, 0)
        scale = torch.ones(len(self.y), self.y.shape[2], self.rank).to(self.y)
        scale[:, :, 0] = factors
        return scale.flatten(1).T

    @property
    def gradient_weights(self) -> Tensor:
        """``(m,)``: the vectors that add up to the loss's gradient."""
        return (torch.arange(self.columns, device=self.y.device) % self.rank == 0).to(self.y)

    @property
    def _probabilities(self) -> Tensor:
        return self.y.softmax(1)

    @property
    def _one_hot(self) -> Tensor:
        hot = torch.zeros_like(self.y)
        return hot.scatter_(1, self.labels.unsqueeze(1), 1)


def label_root(loss_fn: LossFunction, output: Tensor, targets: Any) -> LabelRoot:
    """The root for a batch of labels."""
    found = curvature(loss_fn, output, targets)
    assert isinstance(found, Softmax)
    labels = targets.reshape(len(output), -1)
    labels = labels.where(found.factor > 0, 0).clamp(min=0)  # those that are ignored count nothing
    return LabelRoot(found.y, found.shape, found.factor, labels)


def has_label_root(loss_fn: LossFunction, targets: Any) -> bool:
    """Whether a loss is cross-entropy of labels without smoothing, of two classes or more."""
    function, settings = recognised(loss_fn)
    plain = not settings.get("label_smoothing", 0.0)
    return function is F.cross_entropy and plain and not targets.is_floating_point()
