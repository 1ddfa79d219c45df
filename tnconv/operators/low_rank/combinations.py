"""Combinations ``Σ_{m,n} c[f, m, n] J[m, n, θ]`` of the rows of one parameter.

They are one contraction of all operands, or, where that is predicted to take longer or holds too
much, gradients of combined vectors ``Σ_m c[f, m, n] v[m, n]``, one f after the other. A contraction
can form the rows first, which takes as long as a gradient for each vector m instead of each f.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from tnconv import diagrams
from tnconv.codegen import Program
from tnconv.codegen.planner import ROUTES
from tnconv.codegen.tiers import Build, device_of, looked_up
from tnconv.diagrams.errors import TooLittleMemory
from tnconv.models.layers import Operation
from tnconv.models.terms import Term
from tnconv.operators.low_rank.term_parts import mixed, value
from tnconv.quantities.base import Statistic

AT_A_TIME = 16  # combinations: programs of few sizes serve any number
ROOM = 2**26  # bytes that are held beside operands and results where there is no limit
MIXED = 1.25  # gradients of combined vectors take as much longer than without combining


def combined(term: Term, coefficients: Tensor, memory_limit: int | None = None) -> Tensor:
    """All combinations, ``(f, *parameter)``, from coefficients ``(f, m, n)``.

    ``memory_limit`` is how many bytes are held beside operands and the result.
    """
    few = [_few(term, some, memory_limit) for some in torch.split(coefficients, AT_A_TIME)]
    return torch.cat(few) if len(few) > 1 else few[0]


def _few(term: Term, coefficients: Tensor, memory_limit: int | None) -> Tensor:
    if term.v is None:
        each = Statistic(diagrams.combined_gradients, (len(coefficients),))
        return value(term, each, memory_limit, {"coefficients": coefficients})
    if len(coefficients) > 1 and (program := _looked_up(term, coefficients, memory_limit)):
        given = term.operands | {"coefficients": coefficients}
        found: Tensor = program.run(*[given[name] for name in program.operands])
        return found
    return torch.stack([_alone(term, one, memory_limit) for one in torch.split(coefficients, 1)])


def _alone(term: Term, coefficients: Tensor, memory_limit: int | None) -> Tensor:  # (1, m, n)
    """The gradient of one combination of the vectors, for which there are native kernels."""
    return value(mixed(term, coefficients), Statistic(diagrams.gradient_sum), memory_limit)


def _looked_up(term: Term, coefficients: Tensor, memory_limit: int | None) -> Program | None:
    limit = ROOM if memory_limit is None else memory_limit, coefficients.dtype
    what = term.operation, term.operand, term.vectors, len(coefficients)
    found: Program | None = looked_up(_at_once, device_of(coefficients), limit, *what)
    return found


def _at_once(
    compiled: Build,
    device: str,
    limit: tuple[int, torch.dtype],
    operation: Operation,
    operand: str,
    vectors: int | None,
    count: int,
) -> Program | None:
    """A contraction of all operands, unless combining the vectors first is better."""
    layer = operation.networks[operand]
    network = diagrams.combined_gradients(layer, operand, vectors, count)
    # where routes are given, no program of another batch serves this one (0022)
    how: Any = {"device": device, "dtype": limit[1], "routes": tuple(ROUTES)}
    room = limit[0] + prod(network.shape) * limit[1].itemsize
    one = compiled(diagrams.gradient_sum(layer, operand), **how)
    try:
        found: Program = compiled(network, memory_limit=room, **how)
    except TooLittleMemory:
        return None
    return found if found.seconds <= MIXED * count * one.seconds else None
