"""Terms of all parameters as vectors arrive, in parts, until their rows are taken."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tnconv import diagrams
from tnconv.models.calls import Pass
from tnconv.models.collector import Collector
from tnconv.models.terms import Term
from tnconv.quantities.base import LOSS_GRADIENT, Quantity, Statistic, Vectors


@dataclass(frozen=True)
class Kept(Quantity[Tensor]):
    """What makes an observation send vectors backwards; `TermCollector` keeps them."""

    source: Vectors

    def statistics(self) -> Mapping[str, Statistic]:
        how: dict[str, Any] = {"factored": True, "parts": "rows", "vectors": self.source}
        return {"rows": Statistic(diagrams.per_sample_gradients, samples=1, **how)}

    def result(self, found: Mapping[str, Tensor], samples: int) -> Tensor:
        return found["rows"]


@dataclass(eq=False)
class TermCollector(Collector):
    """A collector that keeps the operation of every parameter with its operands, and no more.

    ``shortened`` makes a term smaller as soon as it is there: what others read of it is freed.
    """

    shortened: Callable[[nn.Parameter, Term], Term] = lambda parameter, term: term
    terms: dict[Vectors, dict[nn.Parameter, dict[Pass | None, list[Term]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    )

    def add(
        self,
        parameter: nn.Parameter,
        term: Term,
        here: Pass | None = None,
        source: Vectors = LOSS_GRADIENT,
        part: int = 0,
    ) -> None:
        self.terms[source][parameter][here].append(self.shortened(parameter, term))

    def taken(self, source: Vectors, parameters: Mapping[str, nn.Parameter]) -> dict[str, Term]:
        """The terms of parameters by name, which are kept no more."""
        last, found = _Last(), {}
        for name, parameter in parameters.items():
            if parts := self.terms[source].pop(parameter, {}):
                found[name] = Term.joined([_lined_up(each, last) for each in parts.values()])
        return found


@dataclass
class _Last:
    """What was joined last: weight and bias of a layer have the same vectors, and share them."""

    parts: Sequence[Tensor] = ()
    whole: Tensor = field(default_factory=lambda: torch.empty(0))

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The parts as one tensor, along their vectors."""
        if len(parts) != len(self.parts) or not all(map(_is_same, parts, self.parts)):
            self.parts, self.whole = parts, torch.cat([*parts])
        return self.whole


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether tensors that both exist are one place in memory, read alike."""
    alike = one.shape == other.shape and one.stride() == other.stride()
    return alike and one.dtype == other.dtype and one.data_ptr() == other.data_ptr()


def _lined_up(parts: Sequence[Term], last: _Last) -> Term:
    """Terms of some vectors each as that of all."""
    if len(parts) == 1:
        return parts[0]
    first, counts = parts[0], [term.vectors or 0 for term in parts]
    given = [term.v for term in parts if term.v is not None]
    if len(given) == len(parts):
        return replace(first, v=last.joined(given), vectors=sum(counts))
    first_samples = all(t.v is None and samples_first(t) for t in parts)
    each = [term.read["x"] if first_samples else term.gradients for term in parts]
    return Term.known(torch.cat(each, int(first_samples)), sum(counts), first_samples)


def samples_first(term: Term) -> bool:
    """Whether explicit gradients have samples before vectors."""
    return len(term.operation.arguments) > 3
