"""Gram matrices of the rows of one parameter, within a batch and between two."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tnconv import diagrams
from tnconv.codegen import Program
from tnconv.codegen.tiers import Build, device_of, looked_up
from tnconv.diagrams import Expression
from tnconv.models.layers import Operation, explicit, known
from tnconv.models.terms import Term
from tnconv.operators.low_rank.orders import Order, contracted_in_order

Limit = tuple[int, torch.dtype] | None


def gram(term: Term, order: Order = "auto", memory_limit: int | None = None) -> Tensor:
    """``K[m, n, m', n'] = Σ_θ J[m, n, θ] J[m', n', θ]``.

    Raises:
        ValueError: a memory limit below what is needed, naming the operand and its layer's shapes.
    """
    what = term.operation, term.operand, term.vectors
    return _run(_gram_program, term.operands, what, term.operand, order, memory_limit)


def cross_gram(
    term: Term, other: Term, order: Order = "auto", memory_limit: int | None = None
) -> Tensor:
    """``K[m, n, m', n'] = Σ_θ J[m, n, θ] J'[m', n', θ]``; explicit rows where layers differ.

    Raises:
        ValueError: a memory limit below what is needed, naming the operand and its layer's shapes.
    """
    if (term.v is None) != (other.v is None) or term.operand != other.operand:
        term, other = (Term.known(each.gradients, each.vectors) for each in (term, other))
    what = term.operation, other.operation, term.operand, term.vectors, other.vectors
    given = term.operands | {f"other_{name}": each for name, each in other.operands.items()}
    return _run(_cross_program, given, what, term.operand, order, memory_limit)


def _run(
    build: Build,
    given: Mapping[str, Tensor],
    what: tuple[object, ...],
    operand: str,
    order: Order,
    memory_limit: int | None,
) -> Tensor:
    like = next(iter(given.values()))
    limit = None if memory_limit is None else (memory_limit, like.dtype)
    try:
        program = looked_up(build, device_of(like), order, limit, *what)
    except ValueError as error:
        if limit is None:
            raise
        shapes = {name: tuple(array.shape) for name, array in given.items()}
        raise ValueError(f"{operand!r} of a layer with operands {shapes}: {error}") from error
    found: Tensor = program.run(*[given[name] for name in program.operands])
    return found


def _gram_program(
    compiled: Build,
    device: str,
    order: Order,
    limit: Limit,
    operation: Operation,
    operand: str,
    vectors: int | None,
) -> Program:
    layer = operation.networks[operand]
    network: Expression = diagrams.gradient_dots(layer, operand, vectors)
    if operation.recipe is explicit:
        network = known(network)
    return contracted_in_order(compiled, network, order, **_options(device, limit))


def _cross_program(
    compiled: Build,
    device: str,
    order: Order,
    limit: Limit,
    operation: Operation,
    other: Operation,
    operand: str,
    vectors: int | None,
    other_vectors: int | None,
) -> Program:
    layers = operation.networks[operand], other.networks[operand]
    network: Expression = diagrams.ntk_block(*layers, operand, vectors, other_vectors)
    for cotangent, given in (("grad_output", operation), ("other_grad_output", other)):
        network = known(network, cotangent) if given.recipe is explicit else network
    return contracted_in_order(compiled, network, order, **_options(device, limit))


def _options(device: str, limit: Limit) -> dict[str, object]:
    options: dict[str, object] = {"device": device}
    if limit is not None:
        options |= {"memory_limit": limit[0], "dtype": limit[1]}
    return options
