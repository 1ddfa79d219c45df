"""What one pass through a model adds to the Kronecker factors of one parameter."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tnconv.models.terms import Arrival, Term
from tnconv.optim.ekfac import Basis, moments
from tnconv.quantities.kronecker_factors import KFAC


@dataclass(eq=False)
class Contribution:
    """Sums of the statistics of Kronecker factors, and of `moments` in a basis that is known.

    ``terms`` are what moments in a basis that is still to come are made of, with their weights.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    terms: list[tuple[Term, float]] = field(default_factory=list)

    def add(self, other: "Contribution") -> None:
        """Add another one."""
        for name, value in other.sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.terms += other.terms

    def moments(self, basis: Basis, joint: bool) -> Tensor:
        """The second moments of all terms."""
        assert self.terms
        found = [weight * moments(term, basis, joint) for term, weight in self.terms]
        return torch.stack(found).sum(0)


@dataclass(frozen=True)
class Wanted:
    """What is made of the calls of a parameter: factors, and moments in a basis, if it has one.

    ``kfac`` is ``joint`` where the parameter has a bias's column.
    """

    kfac: KFAC
    basis: Basis | None = None
    keep: bool = False

    @torch.no_grad()
    def of(
        self,
        parameter: nn.Parameter,
        arrivals: Sequence[tuple[str, Arrival]],  # with the parameter's name in its layer
        samples: int,
        weight: float = 1,
    ) -> Contribution:
        """What arrived after all calls of a parameter in one pass; B is ``weight`` times its sum.

        It is in the parameter's dtype, or in float32 if that is wider.
        """
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        with torch.autocast(parameter.device.type, enabled=False):
            each = [arrived.term(name, parameter, samples, dtype) for name, arrived in arrivals]
            term = Term.of(each, factored=True)
            sums = {name: value.to(dtype) for name, value in self.sums(term).items()}
        for name in {"grad_output", "moments"} & sums.keys():
            sums[name] = weight * sums[name]
        return Contribution(sums, [(term, weight)] if self.keep else [])

    def sums(self, term: Term) -> dict[str, Tensor]:
        """What adds up over passes: the number of samples, and of both factors the sums."""
        named = self.kfac.statistics()
        sums = dict(zip(named, term.values(list(named.values())), strict=True))
        if self.basis is not None and not self.keep:
            sums["moments"] = moments(term, self.basis, self.kfac.joint)
        return sums
