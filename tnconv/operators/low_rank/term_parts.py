"""Parts and mixtures of the vectors of one parameter's rows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor

from tnconv.diagrams import ggn_diagonal
from tnconv.diagrams.errors import TooLittleMemory
from tnconv.models.terms import Term
from tnconv.operators.low_rank.collected_terms import samples_first
from tnconv.quantities.base import Statistic

SQUARES = Statistic(ggn_diagonal)
COPIES = 8  # of rows, that are held while kernels make them


def at(term: Term, chosen: Sequence[int]) -> Term:
    """The term at some samples of all, from explicit gradients."""
    each = term.gradients
    return Term.known(each.index_select(1, torch.tensor(chosen, device=each.device)), term.vectors)


def explicit_ones(
    terms: Mapping[str, Term], dtype: torch.dtype
) -> tuple[dict[str, Term], dict[str, Term]]:
    """Terms that are explicit gradients ``(m, n, *parameter)`` of a dtype, and all others."""
    found = {
        name: term
        for name, term in terms.items()
        if term.v is None and not samples_first(term) and term.read["x"].dtype == dtype
    }
    return found, {name: term for name, term in terms.items() if name not in found}


def side_by_side(terms: Iterable[Term]) -> Term:
    """Explicit gradients of several parameters as those of one that has all their entries."""
    each = [*terms]
    whole = torch.cat([term.read["x"].flatten(2) for term in each], 2)
    return Term.known(whole, each[0].vectors)


def between(term: Term, start: int, stop: int) -> Term:
    """The term with the vectors ``start <= m < stop`` alone."""
    if term.v is None:
        first_samples = samples_first(term)
        each = term.read["x"].narrow(int(first_samples), start, stop - start)
        return Term.known(each, stop - start, first_samples)
    return replace(term, v=term.v[start:stop], vectors=stop - start)


def mixed(term: Term, coefficients: Tensor) -> Term:  # (1, m, n)
    """The term with the one vector ``Σ_m c[m, n] v[m, n]``, without a dimension m."""
    assert term.v is not None
    axes = term.operation.networks[term.operand].result.axes
    at = [axis.terms for axis in axes].index((("n", 1),))
    before, after = (prod(axis.size for axis in some) for some in (axes[:at], axes[at + 1 :]))
    v = term.v.reshape(len(term.v), before, -1, after)
    if len(v) == 1:
        found = coefficients[:, :, None, :, None].squeeze(1) * v
    else:
        found = torch.einsum("fmn,mpnq->fpnq", coefficients, v)
    return replace(term, v=found.reshape(term.v.shape[1:]), vectors=None)


def value(
    term: Term,
    statistic: Statistic,
    memory_limit: int | None = None,
    given: Mapping[str, Tensor] = MappingProxyType({}),
) -> Tensor:
    """What a statistic is; its result alone may be larger than the limit."""
    try:
        return term.values([statistic], memory_limit, given)[0]
    except TooLittleMemory:
        return term.values([statistic], None, given)[0]


def converted(term: Term, dtype: torch.dtype) -> Term:
    """The term with operands in a dtype."""
    v = None if term.v is None else term.v.to(dtype)
    term.expect_unchanged()
    return term.reading({name: x.to(dtype) for name, x in term.read.items()}, v)


def scaled(term: Term, factors: Tensor) -> Term:  # (m, n)
    """The term with the vectors ``factors[m, n] v[m, n]``."""
    if term.v is None:
        each = term.gradients
        lead = factors.reshape(*factors.shape, *[1] * (each.dim() - 2))
        return Term.known(each * lead.to(each), term.vectors)
    axes = term.operation.networks[term.operand].result.axes
    shape = [len(factors), *(1 for _ in axes)]
    shape[1 + [axis.terms for axis in axes].index((("n", 1),))] = factors.shape[1]
    by_axis = term.v.reshape(len(factors), *(axis.size for axis in axes))
    return replace(term, v=(by_axis * factors.reshape(shape).to(term.v)).reshape(term.v.shape))


def squares(term: Term, samples: int, limit: int | None = None) -> Tensor:
    """``Σ_{m,n} J[m, n, θ]²``; within a limit from few rows at a time, each as large as θ."""
    vectors = term.vectors or 0
    if limit is None or not vectors * samples:
        return term.values([SQUARES])[0]
    row = COPIES * prod(_shape(term)) * next(iter(term.operands.values())).element_size()
    few = max(1, min(vectors, limit // (samples * row)))
    some = samples if samples * row <= limit else 1
    parts = (
        between(term.of_samples(n, min(n + some, samples)), m, min(m + few, vectors))
        for n in range(0, samples, some)
        for m in range(0, vectors, few)
    )
    return cast(Tensor, sum(part.values([SQUARES])[0] for part in parts))


def _shape(term: Term) -> tuple[int, ...]:
    """The parameter's."""
    return term.operation.networks[term.operand].operands[term.operand]
