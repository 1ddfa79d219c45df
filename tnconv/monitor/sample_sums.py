"""Sums over samples of what their gradients are: norms, projections, squares, histograms.

Everything is made of `Term`s, layer by layer. Where a layer has one position, its gradients are
outer products that are never written out; where it has many, they are contracted once, used for
everything, and freed. Nothing here knows a layer's type.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from tnconv import diagrams
from tnconv.diagrams.affine import Tensor as Operand
from tnconv.models.layers import Operation, explicit
from tnconv.models.terms import Term
from tnconv.monitor.histograms import Binning, counted, counted_pairs
from tnconv.monitor.kept_terms import samples_of
from tnconv.monitor.needs import GradientHistogram, JointHistogram
from tnconv.quantities.base import Statistic
from tnconv.quantities.first_order import NORMS, SQUARES

ROWS = 2**20  # entries of outer products that are written out at a time


@dataclass(frozen=True)
class Wanted:
    """What is to be made of the samples' gradients; times ``unit`` they are g[n]."""

    norms: bool = False
    squares: bool = False
    directions: int = 0
    histograms: Mapping[Hashable, tuple[GradientHistogram | JointHistogram, Binning]] = field(
        default_factory=dict
    )
    parameter_bins: Mapping[Hashable, Sequence[Tensor]] = field(default_factory=dict)
    largest: bool = False
    unit: float = 1.0


@dataclass
class Found:
    """Of one parameter in one pass: in the units of the terms, but for histograms and largest."""

    norms: Tensor | None = None  # (n)
    projections: Tensor | None = None  # (k, n)
    squares: Tensor | None = None
    counts: dict[Hashable, Tensor] = field(default_factory=dict)
    largest: float = 0.0


@torch.no_grad()
def contracted(term: Term, wanted: Wanted, directions: Tensor | None, at: int) -> Found:
    """What is wanted of one parameter's samples.

    Args:
        term: of the parameter, in one pass.
        wanted: says what.
        directions: ``(k, *parameter)``, to project on.
        at: the number of the parameter.
    """
    found = Found()
    factors = _factors(term)
    if factors is None and (wanted.histograms or wanted.directions or term.v is None):
        _from_gradients(term, wanted, directions, at, found)
        return found
    _by_programs(term, wanted, directions, found)
    if wanted.histograms or wanted.largest:
        gradients = None if factors is not None else term.gradients.flatten(1)
        if factors is not None:
            _of_products(*factors, wanted, at, found)
        elif gradients is not None:
            _count(gradients, wanted, at, found)
    return found


def _from_gradients(
    term: Term, wanted: Wanted, directions: Tensor | None, at: int, found: Found
) -> None:
    """Everything from one contraction."""
    each = term.gradients.flatten(1)
    if wanted.norms:
        found.norms = torch.linalg.vector_norm(each, dim=1).square_()
    if wanted.squares:
        found.squares = torch.linalg.vector_norm(each, dim=0).square_()
    if directions is not None:
        found.projections = directions.flatten(1).to(each.dtype) @ each.T
    _count(each, wanted, at, found)


def _by_programs(term: Term, wanted: Wanted, directions: Tensor | None, found: Found) -> None:
    """What needs no gradients written out, in one program."""
    statistics: list[Statistic] = [NORMS] * wanted.norms + [SQUARES] * wanted.squares
    given = {}
    if directions is not None:
        statistics.append(Statistic(diagrams.gradient_projections, (len(directions),)))
        like = next(iter(term.read.values())) if term.v is None else term.v
        given = {"directions": directions.to(like)}
    values = iter(term.values(statistics, None, given))
    found.norms = next(values) if wanted.norms else None
    found.squares = next(values).flatten() if wanted.squares else None
    found.projections = next(values) if directions is not None else None


def _count(each: Tensor, wanted: Wanted, at: int, found: Found) -> None:
    """Histograms of gradients ``(n, j)``; counts add to those that are there."""
    for key, (need, binning) in wanted.histograms.items():
        if isinstance(need, GradientHistogram):
            counts = counted(each, binning)
        else:
            numbers = wanted.parameter_bins[key][at]
            counts = counted_pairs(each, numbers, binning, need.parameter.count)
        found.counts[key] = found.counts[key] + counts if key in found.counts else counts
    if wanted.largest and each.numel():
        found.largest = max(found.largest, wanted.unit * float(each.abs().max()))


def _of_products(v: Tensor, x: Tensor, wanted: Wanted, at: int, found: Found) -> None:
    """Histograms of ``v[n, d] x[n, c]``.

    Rows whose entries are all next to zero are told from signs, if zero is an edge; others are
    written out, a few at a time.
    """
    largest = x.abs().amax(1)  # (n)
    if wanted.largest:
        found.largest = wanted.unit * float((v.abs().amax(1) * largest).max())
    joint = {k: h for k, h in wanted.histograms.items() if isinstance(h[0], JointHistogram)}
    single = {k: h for k, h in wanted.histograms.items() if k not in joint}
    positive, negative = (x > 0).sum(1), (x < 0).sum(1)
    for key, (_, binning) in single.items():
        zero, counts = binning.zero, torch.zeros(binning.bins.count, dtype=torch.int64)
        counts = counts.to(x.device)
        bound = 0.999 * binning.width / max(wanted.unit, 1e-300)
        near = v.abs() * largest[:, None] < bound
        if zero is None or not 0 < zero < binning.bins.count:
            near = torch.zeros_like(near)
        else:
            up, down = (near & (v > 0)).sum(1), (near & (v < 0)).sum(1)
            below = int((up * negative + down * positive).sum())
            counts[zero - 1] += below
            counts[zero] += int(near.sum()) * x.shape[1] - below
        rows, outputs = (~near).nonzero(as_tuple=True)
        size = max(1, ROWS // x.shape[1])
        for n, d in zip(torch.split(rows, size), torch.split(outputs, size), strict=True):
            counts += counted(v[n, d][:, None] * x[n], binning)
        found.counts[key] = counts
    if joint:
        _joint_of_products(v, x, wanted, joint, at, found)


def _joint_of_products(
    v: Tensor,
    x: Tensor,
    wanted: Wanted,
    joint: Mapping[Hashable, tuple[GradientHistogram | JointHistogram, Binning]],
    at: int,
    found: Found,
) -> None:
    for n in range(len(v)):
        each = (v[n][:, None] * x[n]).reshape(1, -1)
        for key, (need, binning) in joint.items():
            assert isinstance(need, JointHistogram)
            numbers = wanted.parameter_bins[key][at]
            counts = counted_pairs(each, numbers, binning, need.parameter.count)
            found.counts[key] = found.counts[key] + counts if n else counts


def _factors(term: Term) -> tuple[Tensor, Tensor] | None:
    """``v (n, d)`` and ``x (n, c)`` whose outer products are the gradients ``(n, d, c)``."""
    if term.v is None or term.vectors is not None or term.operation.recipe is explicit:
        return None
    name = _outer(term.operation, term.operand)
    if name is None:
        return None
    n = samples_of(term)
    return term.v.reshape(n, -1), term.read[name].reshape(n, -1)


@lru_cache(maxsize=4096)
def _outer(operation: Operation, operand: str) -> str | None:
    """The operand x of ``J[n, d, c] = v[n, d] x[n, c]``, where that is what J is."""
    j = diagrams.per_sample_gradients(operation.networks[operand], operand)
    nodes = [node for node in j.nodes if isinstance(node, Operand)]
    if len(nodes) != 2 or len(j.nodes) != 2 or j.scale != 1 or not _plain(j.result.axes):
        return None
    named = {node.name: node for node in nodes}
    if "grad_output" not in named or len(named) != 2 or len(j.result.axes) != 3:
        return None
    n, d, c = (axis.terms[0][0] for axis in j.result.axes)
    (other,) = named.keys() - {"grad_output"}
    legs = {name: [leg for leg in node.legs if j.sizes[leg] > 1] for name, node in named.items()}
    shown = {name: [leg for leg in (n, leg_) if j.sizes[leg] > 1]
             for name, leg_ in (("grad_output", d), (other, c))}  # fmt: skip
    return other if legs == shown and all(_plain(node.view.axes) for node in nodes) else None


def _plain(axes: Sequence[object]) -> bool:
    """Whether every axis is one leg, read from its start."""
    return all(
        len(a.terms) <= 1 and a.offset == 0 and all(c == 1 for _, c in a.terms)  # type: ignore[attr-defined]
        for a in axes
    )
