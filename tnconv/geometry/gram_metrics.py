"""Metrics of low rank plus a damping, by the Gram matrix of their factors."""

import torch
from torch import Tensor

from tnconv.geometry.damped_metrics import Damped, expect_metric
from tnconv.geometry.metric import Metric
from tnconv.geometry.points import Bilinear, Covector, Point, Vector, split
from tnconv.operators.krylov import Function
from tnconv.operators.low_rank import LowRankGGN


class LowRank(Damped):
    """``Vᵀ V + D`` for k rows V, exactly: by the k by k Gram matrix of ``V R``, R the root of D.

    ``f(1 + M) = f(1) + Eᵀ (f(1 + s) - f(1)) E`` with the unit eigenvectors E of ``M = (V R)ᵀ V R``
    and its positive eigenvalues s. V and E are held: twice k times the parameters. Source: the
    identities of Woodbury and Sylvester.

    Args:
        rows: V ``(k, entries)``, covectors in the damping's order of parameters; from a
            Gauss-Newton matrix by `LowRank.of`.
        damping: D, which must have a root.

    >>> from tnconv.geometry import Euclidean
    >>> metric = LowRank(torch.tensor([[2.0, 0.0]]), Euclidean({"w": torch.zeros(2)}))
    >>> metric.dense(), metric.logdet()
    (tensor([[5., 0.],
            [0., 1.]]), tensor(1.6094))

    Raises:
        TypeError: a number for D: it would mean the identity of these parameters.
    """

    def __init__(self, rows: Tensor, damping: Metric) -> None:
        expect_metric("damping", damping)
        self.rows, space = rows, damping.space

        def product(v: Vector) -> Covector:
            return Covector(split(rows.mT @ (rows @ v.flat(space)), space))

        super().__init__(Bilinear(product, space), damping)
        whitened = [damping.root_transposed(Covector(split(row, self.space))) for row in rows]
        turned = torch.stack(whitened) if whitened else rows.new_zeros(0, self.size)
        values, vectors = torch.linalg.eigh((turned @ turned.mT).double())
        kept = values > _threshold(values, rows.dtype)
        self.values: Tensor = values[kept].to(rows)
        self.directions = (vectors[:, kept] / values[kept].sqrt()).mT.to(rows) @ turned

    @classmethod
    def of(cls, matrix: LowRankGGN, damping: Metric) -> "LowRank":
        """A Gauss-Newton matrix, with all of its blocks."""
        expect_metric("damping", damping)
        return cls(factors(matrix, damping.space), damping)

    def relative_logdet(self) -> Tensor:
        return self.values.log1p().sum()

    def _applied(self, function: Function, flat: Tensor) -> Tensor:
        one = function(flat.new_ones(()))
        along = (function(1 + self.values) - one) * (self.directions @ flat)
        found: Tensor = one * flat + along @ self.directions
        return found


def _threshold(values: Tensor, dtype: torch.dtype) -> float:
    """Eigenvalues up to this are zero within rounding, see `LowRankBlock.threshold`."""
    largest = float(values[-1]) if len(values) else 0.0
    return len(values) * torch.finfo(dtype).eps * max(largest, 0.0)


def factors(matrix: LowRankGGN, space: Point) -> Tensor:
    """Rows V ``(k, entries)`` with ``Vᵀ V`` the matrix, as few as its rank, names as in space."""
    parts = []
    for block in matrix.blocks.values():
        pairs = block.eigh()
        rows = {name: v.flatten(1) for name, v in pairs.vectors.items()}
        every = [
            rows[name] if name in rows else like.new_zeros(len(pairs.values), like.numel())
            for name, like in space.items()
        ]
        parts.append(pairs.values.sqrt()[:, None] * torch.cat(every, 1))
    return torch.cat(parts)
