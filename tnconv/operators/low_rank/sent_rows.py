"""Rows of a Jacobian that are never held: vectors go backwards again for every product.

A product ``Vᵀ u`` or a Gram matrix takes all vectors, layer by layer. A product ``V c = Jᵀ S c`` is
the gradient for the combined vectors ``S c``, whose number is that of the combinations.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tnconv import diagrams
from tnconv.models.terms import Term
from tnconv.operators.low_rank.grams import cross_gram, gram
from tnconv.operators.low_rank.orders import Orders, order_of
from tnconv.operators.low_rank.row_products import Rows
from tnconv.operators.low_rank.rows import JacobianRows
from tnconv.operators.low_rank.sending import SentBatch
from tnconv.operators.low_rank.sending_schedules import Schedule, Span
from tnconv.operators.low_rank.term_parts import between, squares
from tnconv.quantities.base import Statistic

Names = frozenset[str]


@dataclass(eq=False)
class SentVectors:
    """All vectors ``(m, *output)`` of a batch, and how they are sent.

    ``owners`` are the samples of the output's entries, where these are not the rows of dimension 0.
    ``groups`` are the parameters that Gram matrices are asked for; all are made at once.
    """

    batch: SentBatch
    values: Tensor
    owners: Tensor | None
    samples: int
    schedule: Schedule
    order: Orders
    groups: set[Names] = field(default_factory=set)
    grams: dict[Names, Tensor] = field(default_factory=dict)

    def gram(self, names: Names) -> Tensor:
        """``(m, n, m', n')`` in some of the parameters."""
        if names not in self.grams:
            self._make({*self.groups, names} - self.grams.keys())
        return self.grams[names]

    def _make(self, groups: set[Names]) -> None:
        size = (len(self.values), self.samples) * 2
        dtype = torch.promote_types(self.values.dtype, torch.float32)
        found = {group: self.values.new_zeros(size, dtype=dtype) for group in groups}
        done = set[Span]()
        with self.batch.again() as sender:
            for spans in self.schedule.pairs(len(self.values)):
                fresh = {*spans} - done
                done |= fresh

                def take(
                    name: str, term: Term, spans: Sequence[Span] = spans, fresh: set[Span] = fresh
                ) -> None:
                    for group, total in found.items():
                        if name in group:
                            self._add(total, name, term, spans, fresh)

                sender.send(torch.cat([self.values[a:b] for a, b in spans]), take)
        self.grams |= found

    def _add(
        self, total: Tensor, name: str, term: Term, spans: Sequence[Span], fresh: set[Span]
    ) -> None:
        """Add inner products of the spans' vectors, and within those that are fresh."""
        order, limit = order_of(self.order, name), self.schedule.left[name]
        at, parts = 0, list[Term]()
        for start, stop in spans:
            whole = len(spans) == 1
            parts.append(term if whole else between(term, at, at + stop - start))
            at += stop - start
        for (start, stop), part in zip(spans, parts, strict=True):
            if (start, stop) in fresh:
                total[start:stop, :, start:stop] += gram(part, order, limit)
        if len(spans) == 2:
            (a, b), (c, d) = spans
            block = cross_gram(parts[0], parts[1], order, limit)
            total[a:b, :, c:d] += block
            total[c:d, :, a:b] += block.permute(2, 3, 0, 1)

    def each(self, vectors: Tensor, take: Callable[[Span, str, Term], None]) -> None:
        """Send vectors, a few at a time: ``take`` is told which ones a term is of."""
        if not len(vectors):
            return
        with self.batch.again() as sender:
            for span in self.schedule.spans(len(vectors)):
                start, stop = span

                def taken(name: str, term: Term, span: Span = span) -> None:
                    take(span, name, term)

                sender.send(vectors[start:stop], taken)

    def along_samples(self, factors: Tensor) -> Tensor:  # (..., n)
        """Factors of samples as factors of the output's entries, ``(..., *output)`` or fewer."""
        shape = self.values.shape[1:]
        if self.owners is None:
            return factors.reshape(*factors.shape, *[1] * (len(shape) - 1))
        found = factors.index_select(-1, self.owners.flatten())
        return found.reshape(*factors.shape[:-1], *shape)


@dataclass(frozen=True, eq=False)
class SentRows(Rows):
    """``factors[m, n] J[m, n, θ]`` for some of all vectors, which are sent when they are needed."""

    source: SentVectors
    like: Mapping[str, Tensor]
    vectors: int
    samples: int
    start: int = 0
    factors: Tensor | None = None  # (m, n)

    @property
    def held_bytes(self) -> int:
        return self.source.values.nbytes

    def only(self, names: Iterable[str]) -> "SentRows":
        chosen = list(names)
        self.source.groups.add(frozenset(chosen))
        return replace(self, like={name: self.like[name] for name in chosen})

    def between(self, start: int, stop: int) -> "SentRows":
        factors = None if self.factors is None else self.factors[start:stop]
        return replace(self, start=self.start + start, vectors=stop - start, factors=factors)

    def scaled(self, factors: Tensor) -> "SentRows":
        own = factors if self.factors is None else factors * self.factors
        return replace(self, factors=own)

    def gram(self) -> Tensor:
        return self.gram_with(self.vectors)

    def gram_with(self, count: int) -> Tensor:
        every, start = self.source.gram(frozenset(self.like)), self.start
        found = every[start : start + self.vectors, :, start : start + count]
        if self.factors is None:
            return found
        own = self.factors.to(found)
        return own[:, :, None, None] * found * own[:count]

    def gram_under(self, other: JacobianRows) -> Tensor:
        total = self._zeros((other.vectors, other.samples, self.vectors, self.samples))

        def take(span: Span, name: str, term: Term) -> None:
            if name in self.like and name in other.terms:
                order, limit = order_of(self.source.order, name), self.source.schedule.left[name]
                part = total[:, :, span[0] : span[1]]
                part += cross_gram(other.terms[name], term, order, limit)

        self.source.each(self._sent, take)
        return total

    def combined(self, coefficients: Tensor) -> dict[str, Tensor]:
        given = coefficients.to(self.device, self.dtype)
        found = {n: p.new_zeros(len(given), *p.shape) for n, p in self.like.items()}

        def take(span: Span, name: str, term: Term) -> None:
            for at in range(*span) if name in self.like else ():
                found[name][at] = _summed(term, at - span[0]).reshape(self.like[name].shape)

        self.source.each(self._mixed(given), take)
        return found

    def summed(self, vector: int = 0) -> dict[str, Tensor]:
        one = torch.zeros(1, self.vectors, self.samples)
        one[:, vector] = 1
        return {name: found[0] for name, found in self.combined(one).items()}

    def projected(self, directions: Mapping[str, Tensor]) -> Tensor:
        count = len(next(iter(directions.values())))
        total = self._zeros((count, self.vectors, self.samples))

        def take(span: Span, name: str, term: Term) -> None:
            few = max(1, (span[1] - span[0]) // 2)
            for at in range(0, count if name in self.like else 0, few):
                some = {"directions": directions[name][at : at + few].to(self.device, self.dtype)}
                how = (len(some["directions"]),)
                each = Statistic(diagrams.gradient_projections, how)
                total[at : at + few, span[0] : span[1]] += term.values([each], None, some)[0]

        if count:
            self.source.each(self._sent, take)
        return total

    def squares(self) -> dict[str, Tensor]:
        found = {name: torch.zeros_like(p) for name, p in self.like.items()}

        def take(span: Span, name: str, term: Term) -> None:
            if name in self.like:
                each = squares(term, self.samples, self.source.schedule.left[name])
                found[name] += each.reshape(found[name].shape)

        self.source.each(self._sent, take)
        return found

    @property
    def _sent(self) -> Tensor:
        """The vectors of these rows."""
        own = self.source.values[self.start : self.start + self.vectors]
        if self.factors is None:
            return own
        return own * self.source.along_samples(self.factors.to(own))

    def _mixed(self, coefficients: Tensor) -> Tensor:  # (f, m, n)
        """``Σ_m c[f, m, n] S[m, n]``, one combination at a time."""
        own = self._sent
        found = own.new_empty(len(coefficients), *own.shape[1:])
        for at, one in enumerate(coefficients):
            found[at] = (self.source.along_samples(one) * own).sum(0)
        return found

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


def _summed(term: Term, vector: int) -> Tensor:
    """``Σ_n J[m, n, θ]`` of one vector."""
    if term.v is None:
        return between(term, vector, vector + 1).gradients.sum((0, 1))
    one = replace(term, v=term.v[vector], vectors=None)
    return one.values([Statistic(diagrams.gradient_sum)])[0]
