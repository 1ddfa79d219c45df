"""Kronecker factors of an inverse curvature matrix, learned without inverting anything.

The preconditioner is ``K Kᵀ ⊗ C Cᵀ`` with K and C in families of structured matrices; both follow a
Riemannian gradient descent whose fixed point is the inverse of the damped curvature. Source: Lin
et al. 2024, "Structured inverse-free natural gradient descent", equations 5 to 9 and table 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tnconv.models.terms import Term
from tnconv.optim.collection import FactorWatch
from tnconv.optim.contributions import Wanted
from tnconv.optim.structures.entries import collected
from tnconv.optim.structures.factor_parts import Side
from tnconv.optim.structures.structure import Structure

NAMES = ("K", "C")
"""In a parameter's state: the factors of its inputs and of its output gradients."""
Families = tuple[Structure, Structure]


@dataclass(frozen=True)
class StructuredFactors(Wanted):
    """What is collected for two families: one number for each of their parameters."""

    families: Families | None = None
    members: tuple[Tensor, Tensor] | None = None  # (g, count); None for the identity

    def sums(self, term: Term) -> dict[str, Tensor]:
        """What adds up over passes: the number of samples, and of both factors the entries."""
        assert self.families is not None
        layer = term.operation.networks[term.operand]
        found: dict[str, Tensor] = {}
        for at, name in enumerate(("input", "grad_output")):
            if at and self.kfac.fisher == "forward-only":
                found[name] = found["input"].new_zeros(len(found["input"]), self.families[1].count)
                continue
            side = Side(bool(at), self.kfac.flavour, self.kfac.joint and not at)
            member = None if self.members is None else self.members[at]
            found[name] = collected(term, side, self.families[at], member)
        return {"count": found["input"].new_tensor(float(layer.sizes["n"]))} | found


class StructuredWatch(FactorWatch):
    """Collects of each parameter's factors what its two families need.

    ``members`` are the factors of the moment, where there are any.
    """

    families: Mapping[Tensor, Families]
    members: Mapping[Tensor, tuple[Tensor, Tensor]]

    def wanted(self, parameter: nn.Parameter) -> StructuredFactors:
        """What is collected of a parameter."""
        pair = self.families[parameter], self.members.get(parameter)
        return StructuredFactors(self.kfac_of(parameter), families=pair[0], members=pair[1])


@dataclass(frozen=True)
class Descent:
    """How factors follow the curvature: hyper-parameters of one update.

    Args:
        damping: λ, added to the curvature.
        rate: the step size β₁ of the factors.
        momentum: α₁ of the Riemannian momentum.
        kfac_like: each factor follows its own, without the other's mean eigenvalue.
        normalize: bound the largest entry of a step by its rate, and average the momentum.
    """

    damping: float
    rate: float
    momentum: float = 0.0
    kfac_like: bool = False
    normalize: bool = False

    def step(
        self,
        families: Sequence[Structure],
        members: Sequence[Tensor],  # (g, count)
        momenta: Sequence[Tensor],
        projected: Sequence[Tensor],  # Π(Kᵀ A K) and Π(Cᵀ B C)
    ) -> tuple[list[Tensor], list[Tensor]]:
        """``m <- α m + 1/2 [tr(H') H + λ tr(S'ᵀ S') Π(Sᵀ S) - I]``,  ``S <- S - β S m``.

        H and S are those of one side, H' and S' of the other, tr the trace over the size, and all
        of them are of before the step. The steps and the momenta are returned.
        """
        inner = [family.inner(s) for family, s in zip(families, members, strict=True)]
        found, kept = [], []
        share = (1 - self.momentum) / 2 if self.normalize else 0.5
        for at, family in enumerate(families):
            own, other = members[at], families[1 - at]
            curved, damped = projected[at], self.damping * inner[at]
            if not self.kfac_like:
                curved = curved * _mean(other, projected[1 - at])
                damped = damped * _mean(other, inner[1 - at])
            slope = share * (curved + damped - family.identity(own))
            m = self.momentum * momenta[at] + slope
            rate = (
                self.rate / m.abs().amax(-1, keepdim=True).clamp(min=1)
                if self.normalize
                else self.rate
            )
            found.append(own - rate * family.product(own, m))
            kept.append(m)
        return found, kept


def _mean(family: Structure, member: Tensor) -> Tensor:
    """The mean of its eigenvalues, (g, 1)."""
    return (family.trace(member) / family.size).unsqueeze(-1)


def projection(family: Structure, member: Tensor, entries: Tensor) -> Tensor:
    """``Π(Sᵀ A S)`` from what was `collected` of A."""
    if family.sufficient:
        return family.congruence(member, entries)
    return entries / family.weights(entries)


def whitened(
    rows: Tensor,  # (g, d, a)
    families: Families,
    members: Sequence[Tensor],
) -> Tensor:
    """``C Cᵀ G K Kᵀ``."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    k, c = (member.to(dtype) for member in members)
    found = families[0].outer(k, rows.to(dtype).mT).mT
    return families[1].outer(c, found).to(rows.dtype)


def identity_entries(family: Structure, member: Tensor) -> Tensor:
    """What would be `collected` of the identity."""
    if family.sufficient:
        return (family.identity(member) * family.multiplicities(member)).expand_as(member)
    return family.inner(member) * family.weights(member)


def state_of(family: Structure, groups: int, like: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The identity of every group, (g, count)."""
    found = torch.empty(0, dtype=dtype or like.dtype, device=like.device)
    return family.identity(found).repeat(groups, 1)


def any_state(state: Mapping[str, Any]) -> bool:
    """Whether a parameter's state has factors."""
    return all(name in state for name in NAMES)
