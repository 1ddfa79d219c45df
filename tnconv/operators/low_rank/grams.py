"""Gram matrices of the rows of one parameter, within a batch and between two."""

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import Any

from torch import Tensor

from tnconv import diagrams
from tnconv.codegen.tiers import Build, device_of, looked_up
from tnconv.diagrams import Expression, Leg, TensorNetwork
from tnconv.diagrams.errors import TooLittleMemory
from tnconv.models.layers import Operation, explicit, known
from tnconv.models.terms import Term
from tnconv.operators.low_rank.gram_plans import (
    GramPlan,
    Limit,
    Products,
    Settings,
    planned,
)
from tnconv.operators.low_rank.orders import Order
from tnconv.operators.low_rank.term_parts import between

SHORT = 8  # rows are formed at once that are so many times smaller than the vectors after a layer


def gram(term: Term, order: Order = "auto", memory_limit: int | None = None) -> Tensor:
    """``K[m, n, m', n'] = Σ_θ J[m, n, θ] J[m', n', θ]``.

    Raises:
        TooLittleMemory: a limit below what is needed, naming the operand and its layer's shapes.
    """
    return ran(gram_plan(term, order, memory_limit), term)


def gram_plan(term: Term, order: Order = "auto", memory_limit: int | None = None) -> GramPlan:
    """How `gram` is computed.

    Raises:
        TooLittleMemory: a limit below what is needed, naming the operand and its layer's shapes.
    """
    what = term.operation, term.operand, term.vectors
    return _found(_gram_plan, term.operands, what, term.operand, order, memory_limit)


def partial_plan(term: Term, count: int, order: Order = "auto") -> GramPlan:
    """How the Gram matrix's columns of the vectors ``m' < count`` are computed, of rows with v."""
    what = term.operation, term.operand, term.vectors, count
    given = _operands(term, between(term, 0, count))
    return _found(_partial_plan, given, what, term.operand, order, None)


def ran(plan: GramPlan, term: Term) -> Tensor:
    """The Gram matrix by a plan for it."""
    given = term.operands
    return plan.run(*[given[name] for name in plan.operands])


def formed(plan: GramPlan, term: Term) -> Term:
    """The rows as one tensor, where the plan for their Gram matrix says so."""
    if plan.form is None:
        return term
    given = term.operands
    rows = plan.form.run(*[given[name] for name in plan.form.operands])
    return Term.known(rows, term.vectors, samples_first=True)


def shortened(term: Term, order: Order = "auto") -> Term:
    """The rows as one tensor where that takes next to no memory beside the vectors.

    That is so for biases, and for layers with few channels and many positions.
    """
    if order not in ("auto", "parameter_space") or not is_short(term):
        return term
    return Term.known(term.gradients, term.vectors)


def is_short(term: Term) -> bool:
    """Whether the rows are `SHORT` times smaller than the vectors."""
    if term.v is None or term.vectors is None:
        return False
    return SHORT * term.vectors * _row_entries(term.operation, term.operand) <= term.v.numel()


@lru_cache(maxsize=4096)
def _row_entries(operation: Operation, operand: str) -> int:
    """Entries of all samples' rows for one vector."""
    layer = operation.networks[operand]
    samples = next(axis.size for axis in layer.result.axes if axis.terms == (("n", 1),))
    return samples * prod(layer.operands[operand])


def cross_gram(
    term: Term, other: Term, order: Order = "auto", memory_limit: int | None = None
) -> Tensor:
    """``K[m, n, m', n'] = Σ_θ J[m, n, θ] J'[m', n', θ]``; explicit rows where layers differ.

    Raises:
        TooLittleMemory: a limit below what is needed, naming the operand and its layer's shapes.
    """
    term, other = comparable(term, other)
    plan = cross_plan(term, other, order, memory_limit)
    given = _operands(term, other)
    return plan.run(*[given[name] for name in plan.operands])


def cross_plan(
    term: Term, other: Term, order: Order = "auto", memory_limit: int | None = None
) -> GramPlan:
    """How `cross_gram` is computed for terms that are `comparable`.

    Raises:
        TooLittleMemory: a limit below what is needed, naming the operand and its layer's shapes.
    """
    what = term.operation, other.operation, term.operand, term.vectors, other.vectors
    return _found(_cross_plan, _operands(term, other), what, term.operand, order, memory_limit)


def _operands(term: Term, other: Term) -> dict[str, Tensor]:
    return term.operands | {f"other_{name}": each for name, each in other.operands.items()}


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
    except TooLittleMemory as error:
        shapes = {name: tuple(array.shape) for name, array in given.items()}
        what_for = f"{operand!r} of a layer with operands {shapes}"
        raise TooLittleMemory(f"{what_for}: {error}", error.least) from error
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
    products = _products(layer, operand, vectors)
    return planned(settings, network, pair, products.rows, products)


def _partial_plan(
    compiled: Build,
    device: str,
    order: Order,
    limit: Limit,
    operation: Operation,
    operand: str,
    vectors: int,
    count: int,
) -> GramPlan:
    network = pair_network(operation, operation, operand, vectors, count)
    products = _products(operation.networks[operand], operand, vectors)
    return planned(Settings(compiled, device, order, limit), network, products=products)


def _products(layer: TensorNetwork, operand: str, vectors: int | None) -> Products:
    """What explicit rows of a layer's operand would be used for."""
    rows = diagrams.per_sample_gradients(layer, operand, vectors)
    return Products(rows, diagrams.gradient_sum(layer, operand))


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
