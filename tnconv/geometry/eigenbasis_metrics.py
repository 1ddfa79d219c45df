"""Metrics that are diagonal in the eigenbases of Kronecker factors: EKFAC."""

from collections.abc import Mapping
from copy import copy
from functools import cached_property

import torch
from torch import Tensor, nn

from tnconv.geometry.diagonal_metrics import constant_entries
from tnconv.geometry.kronecker_metrics import Kronecker
from tnconv.geometry.layer_matrices import Blockwise, Rows
from tnconv.geometry.metric import Metric
from tnconv.geometry.points import Point

Bases = Mapping[str, tuple[Tensor, Tensor]]


def eigenbases(metric: Kronecker) -> tuple[Bases, dict[str, Tensor]]:
    """Q ``(g, a, a)`` of A and R ``(g, d, d)`` of B by parameter, and eigenvalues ``μ λᵀ``."""
    bases, scales = {}, {}
    for name, (a, b) in metric.factors.items():
        (of_a, q), (of_b, r) = torch.linalg.eigh(a), torch.linalg.eigh(b)
        bases[name], scales[name] = (q, r), of_b.unsqueeze(2) * of_a.unsqueeze(1)
    return bases, scales


class KroneckerEigen(Blockwise):
    """``(R ⊗ Q) diag(S) (R ⊗ Q)ᵀ`` with eigenvectors Q of A and R of B: EKFAC.

    Extrinsic, since the bases' eigenvectors are not those of other parameters' factors. Its root is
    symmetric, and so the same whatever signs eigenvectors have. Source: George et al. 2018.

    Args:
        bases: Q ``(g, a, a)`` and R ``(g, d, d)`` of each parameter, see `eigenbases`.
        scales: S ``(g, d, a)``, positive where an inverse is asked for.
        space: the parameters.
        model: whose layers say how a weight is a matrix.
    """

    def __init__(
        self,
        bases: Bases,
        scales: Mapping[str, Tensor],
        space: Point,
        model: nn.Module | None = None,
    ) -> None:
        self.bases, self.scales, self.space = bases, scales, space
        self.rows = Rows(space, model, {name: len(s) for name, s in scales.items()})

    @cached_property
    def _positive(self) -> Mapping[str, Tensor]:
        for name, s in self.scales.items():
            if not bool((s > 0).all()):
                raise ValueError(
                    f"the scales of {name!r} are not all positive; expected a damping: "
                    "metric + 1e-3 * Euclidean(theta)"
                )
        return self.scales

    def _times(self, name: str, w: Tensor) -> Tensor:
        return self._out(name, self.scales[name] * self._in(name, w))

    def _solved(self, name: str, w: Tensor) -> Tensor:
        return self._out(name, self._in(name, w) / self._positive[name])

    def _rooted(self, name: str, w: Tensor) -> Tensor:
        return self._out(name, self._in(name, w) / self._positive[name].sqrt())

    _unrooted = _rooted

    def logdet(self) -> Tensor:
        return torch.stack([s.log().sum() for s in self._positive.values()]).sum()

    def _in(self, name: str, w: Tensor) -> Tensor:
        q, r = self.bases[name]
        return r.mT @ w @ q

    def _out(self, name: str, w: Tensor) -> Tensor:
        q, r = self.bases[name]
        return r @ w @ q.mT

    def __add__(self, other: Metric) -> Metric:
        """``G + D``: exactly in the same bases, where D is one number for every parameter."""
        constants = constant_entries(other)
        if constants is None or constants.keys() != self.scales.keys():
            return super().__add__(other)
        found = copy(self)
        found.__dict__.pop("_positive", None)
        found.scales = {name: s + constants[name] for name, s in self.scales.items()}
        return found
