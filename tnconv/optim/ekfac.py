"""EKFAC: in the eigenbasis of the Kronecker factors, the second moments of the gradients.

With ``A = Q diag(λ) Qᵀ`` and ``B = R diag(μ) Rᵀ``, the block ``Σ_{m,n} J Jᵀ`` is approximated by
``(R ⊗ Q) diag(S) (R ⊗ Q)ᵀ``. KFAC has ``S = μ λᵀ``; of all diagonals, S here is the nearest to the
block. In an eigenspace of several dimensions, such as the null space of an A from few samples with
the flavour "reduce", the basis is what the decomposition gives, and S depends on it: two runs that
round differently then take different steps. Source: George et al. 2018.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tnconv import diagrams
from tnconv.diagrams import TensorNetwork, View
from tnconv.models.contracted import values
from tnconv.models.layers import Networks, Operation
from tnconv.models.terms import Term
from tnconv.models.unfolding import joined
from tnconv.optim.blocked import from_right, sizes
from tnconv.quantities.base import Statistic

Basis = tuple[Tensor, Tensor]
"""Eigenvectors Q of A ``(g, a, a)`` and R of B ``(g, d, d)``, or of their blocks."""
SQUARES = Statistic(diagrams.ggn_diagonal)


def grouped(samples: int, positions: int, groups: int, a: int, d: int) -> Networks:
    """``y[n, q, g, d] = Σ_a x[n, q, g, a] w[g, d, a]``."""
    sizes = {"n": samples, "q": positions, "g": groups, "a": a, "d": d}
    nodes = (
        diagrams.Tensor("x", View.of(sizes, "n", "q", "g", "a")),
        diagrams.Tensor("weight", View.of(sizes, "g", "d", "a")),
    )
    return {"weight": TensorNetwork(nodes, View.of(sizes, "n", "q", "g", "d"), sizes)}


def moments(
    term: Term,
    basis: Basis,
    joint: bool,  # with the bias's column: patches end with a 1
) -> Tensor:
    """``S[g, d', a'] = Σ_{m,n} (Σ_{d,a} R[g, d, d'] J[m, n, g, d, a] Q[g, a, a'])²``.

    Raises:
        RuntimeError: what the layer read was changed in place since.
    """
    assert term.v is not None
    term.expect_unchanged()
    found = joined([term.operation], term.operand, [(term.read, term.v)], term.vectors)
    assert found is not None
    q, r = (vectors.to(term.v.dtype) for vectors in basis)
    groups = len(q)
    x = found[1].reshape(*found[1].shape[:2], groups, -1)
    v = found[2].reshape(*found[2].shape[: 2 if term.vectors is None else 3], groups, -1)
    if joint:
        x = F.pad(x, (0, 1), value=1.0)
    x, v = _turned(x, q), _turned(v, r)
    layer = Operation(grouped, (x.shape[0], x.shape[1], groups, sizes(q), sizes(r)))
    operands = {"x": x, "grad_output": v}
    return values([SQUARES], layer, "weight", operands, term.vectors)[0]


def _turned(
    rows: Tensor,  # (..., q, g, a)
    vectors: Tensor,
) -> Tensor:
    """``Σ_a rows[..., g, a] Q[g, a, a']``."""
    if vectors.dim() == 3:
        return torch.einsum("...ga,gab->...gb", rows, vectors)
    return from_right(rows.transpose(-2, -3), vectors).transpose(-2, -3)
