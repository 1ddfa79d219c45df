"""Sums over samples of what their gradients are: norms, projections, squares, histograms.

Everything is made of `Term`s, layer by layer. Where a layer has one position, its gradients are
outer products that are not written out; where it has many, they are contracted once, used for
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
from tnconv.quantities.first_order import NORMS, SQUARES

ROWS = 2**20  # entries of outer products that are written out at a time


@dataclass(frozen=True)
class Wanted:
    """What is to be made of the samples' gradients; times ``unit`` they are g[n]."""

    norms: bool = False
    squares: bool = False
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
def contracted(term: Term, wanted: Wanted, directions: Sequence[Tensor], at: int) -> Found:
    """What is wanted of one parameter's samples.

    Args:
        term: of the parameter, in one pass.
        wanted: says what.
        directions: to project on, each in the parameter's shape.
        at: the number of the parameter.
    """
    found = Found()
    if (factors := _factors(term)) is not None:
        _of_products(*factors, wanted, directions, at, found)
    elif wanted.histograms or directions or term.v is None:
        _of_gradients(term, wanted, directions, at, found)
    else:
        _by_program(term, wanted, found)
    return found


def _of_gradients(
    term: Term, wanted: Wanted, directions: Sequence[Tensor], at: int, found: Found
) -> None:
    """Everything from one contraction."""
    each = term.gradients.flatten(1)
    if wanted.norms:
        found.norms = torch.linalg.vector_norm(each, dim=1).square_()
    if wanted.squares:
        found.squares = torch.linalg.vector_norm(each, dim=0).square_()
    if directions:
        stacked = torch.stack([u.reshape(-1).to(each.dtype) for u in directions])
        found.projections = stacked @ each.T
    _count(each, wanted, at, found)


def _by_program(term: Term, wanted: Wanted, found: Found) -> None:
    """What needs no gradients written out, in one program."""
    statistics = [NORMS] * wanted.norms + [SQUARES] * wanted.squares
    values = iter(term.values(statistics))
    found.norms = next(values) if wanted.norms else None
    found.squares = next(values).flatten() if wanted.squares else None


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


def _of_products(
    v: Tensor, x: Tensor, wanted: Wanted, directions: Sequence[Tensor], at: int, found: Found
) -> None:
    """Everything of ``v[n, d] x[n, c]``, which is not written out but for some histograms."""
    if wanted.norms:
        found.norms = v.square().sum(1) * x.square().sum(1)
    if wanted.squares:
        found.squares = (v.square().T @ x.square()).flatten()
    if directions:
        each = [(v * (x @ u.reshape(v.shape[1], -1).to(x.dtype).T)).sum(1) for u in directions]
        found.projections = torch.stack(each)
    if wanted.largest:
        found.largest = wanted.unit * float((v.abs().amax(1) * x.abs().amax(1)).max())
    joint = {k: h for k, h in wanted.histograms.items() if isinstance(h[0], JointHistogram)}
    for key, (_, binning) in wanted.histograms.items():
        if key not in joint:
            found.counts[key] = _counts_of_products(v, x, binning)
    if joint:
        _joint_of_products(v, x, wanted, joint, at, found)


def _counts_of_products(v: Tensor, x: Tensor, binning: Binning) -> Tensor:
    """The histogram of ``v[n, d] x[n, c]``.

    Rows whose entries are all next to zero are told from signs, if zero is an edge; others are
    written out, a few at a time.
    """
    zero, counts = binning.zero, torch.zeros(binning.bins.count, dtype=torch.int64, device=x.device)
    near = torch.zeros(v.shape, dtype=torch.bool, device=v.device)
    if zero is not None and 0 < zero < binning.bins.count:
        bound = 0.999 * binning.width / max(binning.scale, 1e-300)
        near = v.abs() * x.abs().amax(1, keepdim=True) < bound
        up, down = (near & (v > 0)).sum(1), (near & (v < 0)).sum(1)
        below = (up * (x < 0).sum(1) + down * (x > 0).sum(1)).sum()
        counts[zero - 1] += below
        counts[zero] += near.sum() * x.shape[1] - below
    rows, outputs = (~near).nonzero(as_tuple=True)
    size = max(1, ROWS // x.shape[1])
    for n, d in zip(torch.split(rows, size), torch.split(outputs, size), strict=True):
        if len(n):
            counts += counted(v[n, d][:, None] * x[n], binning)
    return counts


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
