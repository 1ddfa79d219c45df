"""The rows ``J[m, n, θ]`` of a batch over all parameters of a network, never written out.

Every parameter keeps what its layers read and the vectors m after them; Gram matrices, combinations
of rows and projections onto directions are compiled networks over these (`tnconv.diagrams`), whose
planner chooses for every layer between forming J (parameter space), contracting positions of two
samples first (data space), the orders between, and products of pixels before the patterns.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tnconv import diagrams
from tnconv.diagrams import Expression
from tnconv.displays import Shown
from tnconv.models import computing
from tnconv.models.calls import Call, Pass
from tnconv.models.computing import Inputs
from tnconv.models.modules import unwrapped
from tnconv.models.observation import Observation
from tnconv.models.propagation import LossFunction
from tnconv.models.terms import Term
from tnconv.operators.low_rank import term_parts
from tnconv.operators.low_rank.collected_terms import Kept, TermCollector
from tnconv.operators.low_rank.combinations import combined
from tnconv.operators.low_rank.grams import (
    cross_gram,
    formed,
    gram,
    gram_plan,
    partial_plan,
    ran,
    shortened,
)
from tnconv.operators.low_rank.orders import Order, Orders, check_orders, order_of
from tnconv.operators.low_rank.row_products import Rows
from tnconv.operators.low_rank.sources import Given
from tnconv.quantities.base import Statistic, Vectors


class RowsObservation(Observation):
    """An observation of one batch whose rows are kept; the user's own backward pass is ignored.

    ``order`` and ``keep`` are those of `JacobianRows`.
    """

    collector_type = TermCollector

    def __init__(
        self,
        model: nn.Module,
        sources: Sequence[Vectors],
        memory_limit: int | None = None,
        batch_dim: int = 0,
        order: Orders = "auto",
        keep: bool = False,
    ) -> None:
        self.order, self.keep = order, keep and memory_limit is None
        super().__init__(model, [Kept(source) for source in sources], memory_limit, batch_dim)

    def _reset(self) -> None:
        super()._reset()
        if self.keep:
            cast(TermCollector, self.collector).shortened = self._shortened

    def _shortened(self, parameter: nn.Parameter, term: Term) -> Term:
        order = self.order
        if isinstance(order, Mapping):
            named = unwrapped(self.model).named_parameters()
            order = order_of(order, next(name for name, p in named if p is parameter))
        return shortened(term, order)

    def _hand_over(self, here: Pass, call: Call, grad_output: Tensor) -> None:
        if self._propagation is not None:
            super()._hand_over(here, call, grad_output)

    @property
    def calls(self) -> int:
        """How often the model was called since rows were taken."""
        return len(self._watch.passes)

    @property
    def size(self) -> int:
        """The size of all batches since rows were taken."""
        return sum(here.samples for here in self._watch.passes)

    def drawn(
        self, source: Vectors, loss_fn: LossFunction, output: Tensor, targets: Any
    ) -> tuple[Tensor, Tensor | None]:
        """All vectors of a source, and the samples of the output's entries, unless rows are these.

        Raises:
            NotImplementedError: a loss without them.
        """
        with self.propagating(output) as propagation:
            owners = self._owners(output)
            parts = [*propagation.parts(source, loss_fn, targets, owners)]
        return parts[0] if len(parts) == 1 else torch.cat(parts), owners

    def send_given(
        self,
        given: Mapping[Given, Sequence[int] | None],
        loss_fn: LossFunction,
        output: Tensor,
        targets: Any,
    ) -> None:
        """Propagate vectors that were drawn, in the place of their sources'."""
        statistics = [each for source in given for each in Kept(source).statistics().values()]
        skipped = self.collector.skipped
        self.collector = TermCollector(statistics, torch.float32, skipped=skipped)
        super().propagate(loss_fn, output, targets, chosen=dict(given.items()))

    def taken(
        self,
        wanted: Mapping[Any, Sequence[int] | None],
        memory_limit: int | None = None,
    ) -> list["JacobianRows"]:
        """The rows, after the vectors were propagated; what follows is another batch.

        ``wanted`` are the sources, with the samples whose rows are wanted, or None for all;
        ``memory_limit`` is that of the rows, by default the own one.

        Raises:
            RuntimeError: a vector that passed a layer unseen.
        """
        self.finish()
        collector, named = self.collector, dict(unwrapped(self.model).named_parameters())
        assert isinstance(collector, TermCollector)
        like = {name: p.detach() for name, p in named.items() if p.requires_grad}
        found = []
        for source, chosen in wanted.items():
            samples = sum(here.samples for here in collector.passes)
            terms = collector.taken(source, named)
            if chosen is not None:
                samples = len(chosen)
                if source not in self.narrowed:
                    terms = {n: term_parts.at(term, chosen) for n, term in terms.items()}
            vectors = next((t.vectors for t in terms.values() if t.vectors is not None), 0)
            how = memory_limit or self.memory_limit, self.order, self.keep
            found.append(JacobianRows(terms, like, vectors, samples, *how))
        self._watch.forget()
        self._reset()
        return found


@dataclass(frozen=True, eq=False, repr=False)
class JacobianRows(Shown, Rows):
    """``J[m, n, θ]`` for the vectors m and samples n of a batch, θ all entries of some parameters.

    ``terms`` has, by parameter name, the operation that θ enters with its operands; ``like`` the
    parameters themselves. A parameter without a term has rows that are zero. ``memory_limit`` is
    how many bytes the products of one parameter may hold beside their operands, and beside results
    in the parameter's shape.

    ``order`` is how Gram matrices are contracted, for all parameters or by parameter name:
    ``"parameter_space"``, ``"data_space"``, ``"mixed"``, ``"one_sided"`` or ``"pixel_gram"`` (see
    `tnconv.operators.low_rank.orders`); by default, and for parameters that it does not name,
    ``"auto"``: the cheapest of these and of the planner's own, by the prices of kernels. With
    ``keep``, rows that a Gram matrix is made of are kept, if they are not large, for products that
    follow.

    Args:
        terms: by parameter name, the operation that it enters.
        like: the parameters.
        vectors: how many there are of each sample.
        samples: how many there are.
        memory_limit: in bytes.
        order: of contraction, for all parameters or by name.
        keep: whether rows are kept for later products.
    """

    terms: dict[str, Term]
    like: Mapping[str, Tensor]
    vectors: int
    samples: int
    memory_limit: int | None = None
    order: Orders = "auto"
    keep: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        loss_fn: LossFunction,
        inputs: Inputs,
        targets: Any,
        source: Vectors,
        memory_limit: int | None = None,
        batch_dim: int = 0,
        order: Orders = "auto",
        keep: bool = False,
    ) -> "JacobianRows":
        """The rows of a batch: one forward pass, and one backward pass for each vector.

        Args:
            model: Any model that `tnconv.compute` takes; its layers must keep samples apart.
            loss_fn: A function of the model's output and the targets.
            inputs: The model's input, or a sequence or mapping of its arguments, batch first.
            targets: The targets of the batch.
            source: What the vectors are.
            memory_limit: How many bytes the products of one parameter may hold.
            batch_dim: The dimension of the inputs that is the batch.
            order: How Gram matrices are contracted, as for the class.
            keep: Whether rows that a Gram matrix is made of are kept, as for the class.

        Raises:
            NotImplementedError: a layer that mixes samples or has no diagram, or a loss without
                the vectors.
            ValueError: a loss that is no scalar, or an unknown order.
        """
        check_orders(order, dict(unwrapped(model).named_parameters()))
        how: Any = memory_limit, batch_dim, order, keep
        observation = RowsObservation(model, [source], *how)
        with computing.ran(observation, loss_fn, inputs, targets):
            return observation.taken({source: None})[0]

    def only(self, names: Iterable[str]) -> "JacobianRows":
        """The rows in some of the parameters."""
        chosen = list(names)
        terms = {name: self.terms[name] for name in chosen if name in self.terms}
        return replace(self, terms=terms, like={name: self.like[name] for name in chosen})

    def between(self, start: int, stop: int) -> "JacobianRows":
        """The rows of the vectors ``start <= m < stop``."""
        terms = {name: term_parts.between(term, start, stop) for name, term in self.terms.items()}
        return replace(self, terms=terms, vectors=stop - start)

    def of_samples(self, start: int, stop: int) -> "JacobianRows":
        """The rows of the samples ``start <= n < stop``, as views of what these hold."""
        if (start, stop) == (0, self.samples):
            return self
        terms = {name: term.of_samples(start, stop) for name, term in self.terms.items()}
        return replace(self, terms=terms, samples=stop - start)

    def scaled(self, factors: Tensor) -> "JacobianRows":  # (m, n)
        """The rows ``factors[m, n] J[m, n, θ]``."""
        terms = {name: term_parts.scaled(term, factors) for name, term in self.terms.items()}
        return replace(self, terms=terms)

    def to(self, dtype: torch.dtype) -> "JacobianRows":
        """The rows in another dtype."""
        terms = {name: term_parts.converted(term, dtype) for name, term in self.terms.items()}
        return replace(self, terms=terms, like={n: p.to(dtype) for n, p in self.like.items()})

    @property
    def held_bytes(self) -> int:
        """What the rows hold: operands that several parameters share count once."""
        every = (each for term in self.terms.values() for each in term.operands.values())
        stored = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in every}
        return sum(each.nbytes() for each in stored.values())

    def gram(self, order: Orders | None = None) -> Tensor:
        """``K[m, n, m', n'] = Σ_θ J[m, n, θ] J[m', n', θ]``; halves that mirror are made once.

        Raises:
            ValueError: an unknown order, or a memory limit below what is needed.
        """
        orders = self._orders(order)
        total = self._zeros((self.vectors, self.samples) * 2)
        explicit, terms = dict[str, Term](), self.terms
        if self.memory_limit is None:
            explicit, terms = term_parts.explicit_ones(self.terms, total.dtype)
        plans = {
            name: gram_plan(term, order_of(orders, name), self.memory_limit)
            for name, term in terms.items()
        }
        if explicit:
            total += gram(term_parts.side_by_side(explicit.values()))
        # rows that are kept come first, as their vectors are freed before other products
        for name in sorted(plans, key=lambda name: -plans[name].kept):
            term, plan = self.terms[name], plans[name]
            if self.keep and plan.form is not None:
                term = self.terms[name] = formed(plan, term)
                plan = gram_plan(term, order_of(orders, name))
            total += ran(plan, term)
        return total

    def cross_gram(self, other: "JacobianRows", order: Orders | None = None) -> Tensor:
        """``K[m, n, m', n'] = Σ_θ J[m, n, θ] J'[m', n', θ]`` with the rows of another batch.

        Raises:
            ValueError: an unknown order, or a memory limit below what is needed.
        """
        orders = self._orders(order)
        total = self._zeros((self.vectors, self.samples, other.vectors, other.samples))
        for name in [name for name in self.terms if name in other.terms]:  # a set has no order
            how = order_of(orders, name)
            both = self._alike(other, name, how), other._alike(self, name, how)
            total += cross_gram(*both, how, self.memory_limit)
        return total

    def gram_with(self, count: int) -> Tensor:
        """The Gram matrix's columns of the vectors ``m' < count``."""
        if count == self.vectors:
            return self.gram()
        for name, term in list(self.terms.items()) if self.keep else ():
            if term.v is not None:
                plan = partial_plan(term, count, order_of(self.order, name))
                self.terms[name] = formed(plan, term)
        return self.cross_gram(self.between(0, count))

    def gram_under(self, other: "JacobianRows") -> Tensor:
        """``K[m, n, m', n'] = Σ_θ J'[m, n, θ] J[m', n', θ]`` with rows J' of another batch."""
        return other.cross_gram(self)

    def _alike(self, other: "JacobianRows", name: str, order: Order) -> Term:
        """The term of a parameter, as explicit rows where the others are, if rows are kept."""
        if self.keep and other.terms[name].v is None:
            self.terms[name] = formed(gram_plan(self.terms[name], order), self.terms[name])
        return self.terms[name]

    def _orders(self, order: Orders | None) -> Orders:
        orders = self.order if order is None else order
        if order is not None:
            check_orders(order, self.like)
        return orders

    def squared_norms(self) -> Tensor:
        """``K[m, n] = Σ_θ J[m, n, θ]²``: the diagonal of `gram`."""
        return self._total((self.vectors, self.samples), diagrams.gradient_norms)

    def combined(self, coefficients: Tensor) -> dict[str, Tensor]:  # (f, m, n)
        """``Σ_{m,n} c[f, m, n] J[m, n, θ]`` by parameter name, ``(f, *parameter)``."""
        given = coefficients.to(self.device, self.dtype)
        found = {}
        for name, like in self.like.items():
            if name not in self.terms or not len(given):
                found[name] = like.new_zeros(len(given), *like.shape)
                continue
            every = combined(self.terms[name], given, self.memory_limit)
            found[name] = every.reshape(-1, *like.shape)
        return found

    def summed(self, vector: int = 0) -> dict[str, Tensor]:
        """``Σ_n J[m, n, θ]`` of one vector m, by parameter name."""
        found = {}
        for name, like in self.like.items():
            term = self.terms.get(name)
            if term is None:
                found[name] = torch.zeros_like(like)
            elif term.v is None:
                found[name] = term_parts.between(term, vector, vector + 1).gradients.sum((0, 1))
            else:
                one = replace(term, v=term.v[vector], vectors=None)
                found[name] = self._value(one, {}, diagrams.gradient_sum).reshape(like.shape)
        return found

    def projected(self, directions: Mapping[str, Tensor]) -> Tensor:  # each (f, *parameter)
        """``Σ_θ J[m, n, θ] u[f, θ]``, of shape ``(f, m, n)``."""
        count = len(next(iter(directions.values())))
        total = self._zeros((count, self.vectors, self.samples))
        for name, term in self.terms.items() if count else ():
            given = {"directions": directions[name].to(self.device, self.dtype)}
            total += self._value(term, given, diagrams.gradient_projections, (count,))
        return total

    def squares(self) -> dict[str, Tensor]:
        """``Σ_{m,n} J[m, n, θ]²`` by parameter name: the diagonal of ``Jᵀ J``."""
        return {
            name: term_parts.squares(self.terms[name], self.samples, self.memory_limit).reshape(
                like.shape
            )
            if name in self.terms
            else torch.zeros_like(like)
            for name, like in self.like.items()
        }

    def _total(self, shape: Sequence[int], diagram: Callable[..., Expression]) -> Tensor:
        total = self._zeros(shape)
        for term in self.terms.values():
            total += self._value(term, {}, diagram)
        return total

    def _zeros(self, shape: Sequence[int]) -> Tensor:
        return torch.zeros(tuple(shape), dtype=self.dtype, device=self.device)

    def _value(
        self,
        term: Term,
        given: Mapping[str, Tensor],
        diagram: Callable[..., Expression],
        arguments: tuple[Any, ...] = (),
    ) -> Tensor:
        return term_parts.value(term, Statistic(diagram, arguments), self.memory_limit, given)
