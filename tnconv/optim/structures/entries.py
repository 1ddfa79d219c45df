"""What a pass adds to a structured Kronecker factor, from a layer's x, or the vectors after it.

Where the entries of a factor A that a family keeps are `sufficient`, they are collected, whatever
the member S of the moment is: ``⟨A, E[e]⟩``. For other families it is ``⟨Sᵀ A S, E[e]⟩``, from the
rows that A is made of. Both add up over passes and workers, and have one number per parameter.
"""

from collections.abc import Iterator
from itertools import accumulate, pairwise
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from tnconv import diagrams
from tnconv.codegen import Program
from tnconv.codegen.tiers import Build, device_of, looked_up
from tnconv.diagrams import Axis, Roles, TensorNetwork, View
from tnconv.diagrams.network import array_dimension
from tnconv.models.layers import Operation
from tnconv.models.terms import Term
from tnconv.optim.structures.factor_parts import (
    Side,
    block,
    outermost,
    pieces,
    row_sums,
    rows,
    whole_pieces,
)
from tnconv.optim.structures.grids import Dense, Grid
from tnconv.optim.structures.structure import Structure
from tnconv.optim.structures.triangles import Triangular
from tnconv.quantities.base import Statistic
from tnconv.quantities.kronecker_factors import factor_statistic, factored


def collected(
    term: Term,
    side: Side,
    family: Structure,
    member: Tensor | None,  # (g, count); None for the identity
) -> Tensor:  # (g, count)
    """``⟨A, E[e]⟩``, or ``⟨Sᵀ A S, E[e]⟩`` where that is not enough."""
    layer = factored(term.operation.networks[term.operand], term.operand)
    if isinstance(family, Dense | Triangular):
        statistic = factor_statistic(side.output, side.flavour, side.joint)
        return family.taken(term.values([statistic])[0])
    positions = layer.size(Roles.of(layer, term.operand).positions)
    scale = 1.0 if side.output else 1 / max(1, positions) ** (2 if side.averaged else 1)
    if isinstance(family, Grid) and _by_blocks(layer, term.operand, side, family):
        found = _blocks(term, layer, side, family)
    else:
        each = _rows(term, layer, side, positions)
        found = torch.stack([_products(part, family, member) for part in each]).sum(0)
    return scale * found


def _by_blocks(layer: TensorNetwork, operand: str, side: Side, family: Grid) -> bool:
    """Whether blocks of a factor are cheaper than rows: where there are many rows."""
    if side.averaged or not family.sufficient or not side.legs(layer, operand)[1]:
        return False
    ends = [0, *accumulate(family.intervals)]
    return all(
        count == 1
        or r == 1
        or (
            whole_pieces(layer, operand, side, (ends[i], ends[i + 1]), count)
            and not (side.joint and ends[i + 1] == family.size)
        )
        for (i, _), (count, r, _) in family.shapes.items()
    )


def _blocks(term: Term, layer: TensorNetwork, side: Side, family: Grid) -> Tensor:
    """All blocks in one program."""
    own, ends = family.size - side.joint, [0, *accumulate(family.intervals)]
    spans = [(min(a, own), min(b, own)) for a, b in pairwise(ends)]
    lengths = [end - start for start, end in spans]
    wanted: dict[object, Statistic] = {}
    for (i, j), (count, r, _) in family.shapes.items():
        if count > 1:
            wanted[i, j] = Statistic(pieces, (side, spans[i], lengths[i] // r))
        elif lengths[i] and lengths[j]:
            wanted[i, j] = Statistic(block, (side, spans[i], spans[j]))
    if side.joint:
        wanted["sums"] = Statistic(row_sums, (side,))
    found = dict(zip(wanted, term.values(list(wanted.values())), strict=True))
    groups, like = layer.size(Roles.of(layer, term.operand).groups), next(iter(found.values()))
    sums = found["sums"].reshape(groups, own) if side.joint else None
    inner, number = outermost(layer, term.operand, side), _count(term, layer, side)
    blocks = {}
    for (i, j), (count, r, _) in family.shapes.items():
        last = ends[i + 1] > own, ends[j + 1] > own
        at = [spans[side_at][0] % inner for side_at in (i, j)]
        if count > 1:
            value = found[i, j]
            if r == 1:
                value = value[:, at[0] : at[0] + lengths[i]]
                value = F.pad(value, (0, 0, 0, 0, 0, 1), value=number) if last[0] else value
            blocks[i, j] = value
            continue
        whole = found.get((i, j), like.new_zeros(groups, lengths[i], lengths[j]))
        value = whole[:, at[0] : at[0] + lengths[i], at[1] : at[1] + lengths[j]]
        if sums is not None:
            parts = [F.pad(sums[:, a:b], (0, int(end)), value=number) for (a, b), end in
                     zip((spans[i], spans[j]), last, strict=True)]  # fmt: skip
            value = torch.cat([value, sums[:, None, slice(*spans[j])]], 1) if last[0] else value
            value = torch.cat([value, parts[0].unsqueeze(2)], 2) if last[1] else value
        blocks[i, j] = value.unsqueeze(1)
    return family.member(blocks)


def _count(term: Term, layer: TensorNetwork, side: Side) -> float:
    """The number of rows."""
    half = side.half(layer, term.operand, term.vectors)
    kept = {leg for each in side.legs(layer, term.operand) for leg in each}
    return float(half.size(leg for leg in half.result.legs if leg not in kept))


def _rows(term: Term, layer: TensorNetwork, side: Side, positions: int) -> Iterator[Tensor]:
    """The rows ``(q, g, a)``, of so many samples at a time that they hold no more than x does."""
    half = side.half(layer, term.operand, term.vectors)
    given = sum(prod(node.shape) for node in half.tensors)
    samples = layer.sizes["n"]
    step = max(1, min(samples, 2 * samples * given // max(1, half.size(half.result.legs))))
    for start in range(0, samples, step):
        count = min(step, samples - start)
        what = term.operation, term.operand, term.vectors, side, count
        program = looked_up(_program, device_of(next(iter(term.operands.values()))), *what)
        names, operands = program.operands, term.operands
        found: Tensor = program.run(*[_part(half, n, operands[n], start, count) for n in names])
        ones = float(positions) if side.averaged else 1.0
        yield F.pad(found, (0, 1), value=ones) if side.joint else found


def _program(
    compiled: Build,
    device: str,
    operation: Operation,
    operand: str,
    vectors: int | None,
    side: Side,
    samples: int,
) -> Program[Tensor]:
    network = rows(operation.networks[operand], operand, vectors, side)
    return compiled(_of_samples(network, samples), device=device)


def _of_samples(network: TensorNetwork, samples: int) -> TensorNetwork:
    """A network of rows, for another number of samples."""
    before = network.sizes["n"]
    if samples == before:
        return network

    def resized(view: View) -> View:
        at = _samples_in(network, view)
        if at is None:
            return view
        axes, shape = list(view.axes), list(view.shape)
        axes[at] = Axis(samples, 0, axes[at].terms)
        dimension = array_dimension(view, at)
        shape[dimension] = shape[dimension] * samples // before
        return View(tuple(shape), tuple(axes))

    nodes = [
        node.read_through(resized(node.view)) if isinstance(node, diagrams.Tensor) else node
        for node in network.nodes
    ]
    sizes = dict(network.sizes) | {"n": samples}
    return TensorNetwork(tuple(nodes), resized(network.result), sizes, network.scale)


def _part(half: TensorNetwork, name: str, operand: Tensor, start: int, count: int) -> Tensor:
    """An operand of some samples."""
    view = next(node.view for node in half.tensors if node.name == name)
    at = _samples_in(half, view)
    if at is None or count == half.sizes["n"]:
        return operand
    return operand.narrow(array_dimension(view, at), start, count)


def _samples_in(network: TensorNetwork, view: View) -> int | None:
    """The axis that is the samples."""
    plain = [axis.plain(network.sizes) for axis in view.axes]
    return plain.index("n") if "n" in plain else None


def _products(
    part: Tensor,  # (q, g, a)
    family: Structure,
    member: Tensor | None,
) -> Tensor:
    columns = part.permute(1, 2, 0)
    if not family.sufficient and member is not None:
        columns = family.rmatmat(member.to(columns.dtype), columns)
    return family.inner_products(columns)
