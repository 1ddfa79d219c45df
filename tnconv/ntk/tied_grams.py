"""Kernels with c = d or n = m alone: an output, or a sample, that both sides share.

The two copies of a layer's Jacobian share the index, so that no product of two different classes,
or of two different samples, is ever computed.
"""

from typing import Literal

from torch import Tensor

from tnconv.codegen import Program
from tnconv.codegen.tiers import Build, device_of, looked_up
from tnconv.diagrams import Leg
from tnconv.models.layers import Operation
from tnconv.operators.low_rank.grams import comparable, pair_network
from tnconv.operators.low_rank.rows import JacobianRows

Tied = Literal["trace", "class_diagonal", "sample_diagonal"]
LEGS: dict[Tied, tuple[tuple[Leg, ...], tuple[Leg, ...]]] = {
    "trace": ((), ("m",)),
    "class_diagonal": (("m",), ()),
    "sample_diagonal": (("n",), ()),
}
"""Legs of rows (vectors m, samples n) that both sides share: those kept, and those summed."""


def tied_gram(rows: JacobianRows, other: JacobianRows | None, name: str, reduce: Tied) -> Tensor:
    """The kernel in one parameter: ``(n, m)``, ``(n, c, m)`` or ``(n, c, d)``."""
    second = rows if other is None else other
    if name not in rows.terms or name not in second.terms:
        return _zeros(rows, second, reduce)
    term, right = rows.terms[name], second.terms[name]
    term, right = comparable(term, right)
    given = term.operands | {f"other_{key}": each for key, each in right.operands.items()}
    like = next(iter(given.values()))
    limit = None if rows.memory_limit is None else (rows.memory_limit, like.dtype)
    what = term.operation, right.operation, term.operand, term.vectors, right.vectors, limit
    program = looked_up(_program, device_of(like), reduce, *what)
    found: Tensor = program.run(*[given[each] for each in program.operands])
    return found if reduce == "trace" else found.transpose(0, 1)


def _program(
    compiled: Build,
    device: str,
    reduce: Tied,
    operation: Operation,
    other: Operation,
    operand: str,
    vectors: int | None,
    other_vectors: int | None,
    limit: tuple[int, object] | None,
) -> Program:
    network = pair_network(operation, other, operand, vectors, other_vectors, *LEGS[reduce])
    if limit is None:
        return compiled(network, device=device)
    return compiled(network, device=device, memory_limit=limit[0], dtype=limit[1])


def _zeros(rows: JacobianRows, other: JacobianRows, reduce: Tied) -> Tensor:
    n, c, m = rows.samples, rows.vectors, other.samples
    shapes = {"trace": (n, m), "class_diagonal": (n, c, m)}
    like = next(iter(rows.like.values()))
    return like.new_zeros(shapes.get(reduce, (n, c, other.vectors)))
