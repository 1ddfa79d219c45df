"""Gram matrices of the rows of one parameter, within a batch and between two."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tnconv import diagrams
from tnconv.codegen.tiers import Build, device_of, looked_up
from tnconv.diagrams import Expression, Leg, TensorNetwork
from tnconv.models.layers import Operation, explicit, known
from tnconv.models.terms import Term
from tnconv.operators.low_rank.gram_plans import GramPlan, Limit, Settings, planned
from tnconv.operators.low_rank.orders import Order


def gram(term: Term, order: Order = "auto", memory_limit: int | None = None) -> Tensor:
    """``K[m, n, m', n'] = Σ_θ J[m, n, θ] J[m', n', θ]``.

    Raises:
        ValueError: a memory limit below what is needed, naming the operand and its layer's shapes.
    """
    plan, operands = _plan(term, order, memory_limit), term.operands
    return plan.run(*[operands[name] for name in plan.operands])


def formed(term: Term, order: Order = "auto") -> Term:
    """The rows as one tensor, where their Gram matrix is best made of that and it is not large."""
    plan = _plan(term, order, None)
    if plan.form is None:
        return term
    rows = plan.form.run(*[term.operands[name] for name in plan.form.operands])
    return Term.known(rows, term.vectors, samples_first=True)


def _plan(term: Term, order: Order, memory_limit: int | None) -> GramPlan:
    what = term.operation, term.operand, term.vectors
    return _found(_gram_plan, term.operands, what, term.operand, order, memory_limit)


def cross_gram(
    term: Term, other: Term, order: Order = "auto", memory_limit: int | None = None
) -> Tensor:
    """``K[m, n, m', n'] = Σ_θ J[m, n, θ] J'[m', n', θ]``; explicit rows where layers differ.

    Raises:
        ValueError: a memory limit below what is needed, naming the operand and its layer's shapes.
    """
    term, other = comparable(term, other)
    what = term.operation, other.operation, term.operand, term.vectors, other.vectors
    given = term.operands | {f"other_{name}": each for name, each in other.operands.items()}
    plan = _found(_cross_plan, given, what, term.operand, order, memory_limit)
    return plan.run(*[given[name] for name in plan.operands])


def comparable(term: Term, other: Term) -> tuple[Term, Term]:
    """The terms as they are, or both as explicit rows where only those have a network together."""
    if (term.v is None) == (other.v is None) and term.operand == other.operand:
        return term, other
    return Term.known(term.gradients, term.vectors), Term.known(other.gradients, other.vectors)


def pair_network(
    operation: Operation,
    other: Operation,
    operand: str,
    vectors: int | None,
    other_vectors: int | None,
    tied: tuple[Leg, ...] = (),
    summed: tuple[Leg, ...] = (),
) -> Expression:
    """`tnconv.diagrams.ntk_block` of two operations; rows that are explicit have no cotangent."""
    layers = operation.networks[operand], other.networks[operand]
    network: Expression = diagrams.ntk_block(*layers, operand, vectors, other_vectors, tied, summed)
    for cotangent, each in (("grad_output", operation), ("other_grad_output", other)):
        network = known(network, cotangent) if each.recipe is explicit else network
    return network


def _found(
    build: Any,
    given: Mapping[str, Tensor],
    what: tuple[object, ...],
    operand: str,
    order: Order,
    memory_limit: int | None,
) -> GramPlan:
    like = next(iter(given.values()))
    limit = None if memory_limit is None else (memory_limit, like.dtype)
    try:
        plan: GramPlan = looked_up(build, device_of(like), order, limit, *what)
    except ValueError as error:
        if limit is None:
            raise
        shapes = {name: tuple(array.shape) for name, array in given.items()}
        raise ValueError(f"{operand!r} of a layer with operands {shapes}: {error}") from error
    return plan


def _gram_plan(
    compiled: Build,
    device: str,
    order: Order,
    limit: Limit,
    operation: Operation,
    operand: str,
    vectors: int | None,
) -> GramPlan:
    layer = operation.networks[operand]
    settings = Settings(compiled, device, order, limit)
    network: Expression = diagrams.gradient_dots(layer, operand, vectors)
    if operation.recipe is explicit:
        return planned(settings, known(network))
    pair = diagrams.ntk_block(layer, layer, operand, vectors, vectors)
    rows = diagrams.per_sample_gradients(layer, operand, vectors)
    return planned(settings, network, pair, rows)


def _cross_plan(
    compiled: Build,
    device: str,
    order: Order,
    limit: Limit,
    operation: Operation,
    other: Operation,
    operand: str,
    vectors: int | None,
    other_vectors: int | None,
) -> GramPlan:
    settings = Settings(compiled, device, order, limit)
    network = pair_network(operation, other, operand, vectors, other_vectors)
    return planned(settings, network, network if isinstance(network, TensorNetwork) else None)
