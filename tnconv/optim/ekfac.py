"""EKFAC: in the eigenbasis of the Kronecker factors, the second moments of the gradients.

With ``A = Q diag(λ) Qᵀ`` and ``B = R diag(μ) Rᵀ``, the block ``Σ_{m,n} J Jᵀ`` is approximated by
``(R ⊗ Q) diag(S) (R ⊗ Q)ᵀ``. KFAC has ``S = μ λᵀ``; of all diagonals, S here is the nearest to the
block. Source: George et al. 2018.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tnconv import diagrams
from tnconv.diagrams import TensorNetwork, View
from tnconv.models.capture import Pass
from tnconv.models.collector import Collector
from tnconv.models.contracted import values
from tnconv.models.layers import Networks, Operation
from tnconv.models.terms import Term
from tnconv.models.unfolding import joined
from tnconv.quantities.base import LOSS_GRADIENT, Statistic, Vectors

Basis = tuple[Tensor, Tensor]
"""Eigenvectors Q of A ``(g, a, a)`` and R of B ``(g, d, d)``."""
SQUARES = Statistic(diagrams.ggn_diagonal)


def grouped(samples: int, positions: int, groups: int, a: int, d: int) -> Networks:
    """``y[n, q, g, d] = Σ_a x[n, q, g, a] w[g, d, a]``."""
    sizes = {"n": samples, "q": positions, "g": groups, "a": a, "d": d}
    nodes = (
        diagrams.Tensor("x", View.of(sizes, "n", "q", "g", "a")),
        diagrams.Tensor("weight", View.of(sizes, "g", "d", "a")),
    )
    return {"weight": TensorNetwork(nodes, View.of(sizes, "n", "q", "g", "d"), sizes)}


def moments(term: Term, basis: Basis) -> Tensor:
    """``S[g, d', a'] = Σ_{m,n} (Σ_{d,a} R[g, d, d'] J[m, n, g, d, a] Q[g, a, a'])²``.

    Patches are unfolded, and end with a 1 where the basis has an entry for it.
    """
    assert term.v is not None
    found = joined([term.operation], term.operand, [(term.read, term.v)], term.vectors)
    assert found is not None
    q, r = (vectors.to(term.v.dtype) for vectors in basis)
    groups, d, a = len(q), r.shape[-1], q.shape[-1]
    x = found[1].reshape(*found[1].shape[:2], groups, -1)
    if x.shape[-1] < a:
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    v = found[2].reshape(*found[2].shape[: 2 if term.vectors is None else 3], groups, d)
    layer = Operation(grouped, (x.shape[0], x.shape[1], groups, a, d))
    operands = {
        "x": torch.einsum("nqga,gab->nqgb", x, q),
        "grad_output": torch.einsum("...gd,gde->...ge", v, r),
    }
    return values([SQUARES], layer, "weight", operands, term.vectors)[0]


@dataclass(eq=False)
class MomentCollector(Collector):
    """A collector that also adds up `moments`, of the parameters that have a basis."""

    bases: Mapping[Tensor, Basis] = field(default_factory=dict)
    moments: dict[Tensor, Tensor] = field(default_factory=dict)

    def add(
        self,
        parameter: nn.Parameter,
        term: Term,
        here: Pass | None = None,
        source: Vectors = LOSS_GRADIENT,
        part: int = 0,
    ) -> None:
        super().add(parameter, term, here, source, part)
        if parameter in self.bases:
            new = moments(term, self.bases[parameter])
            old = self.moments.get(parameter)
            self.moments[parameter] = new if old is None else old + new
