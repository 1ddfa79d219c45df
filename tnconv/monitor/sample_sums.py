"""Sums over samples of what their gradients are: norms, projections, squares, histograms.

Everything is made of `Term`s, layer by layer. Where a layer has one position, its gradients are
outer products that are not written out; where it has many, they are contracted once, used for
everything, and freed. Nothing here knows a layer's type.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from tnconv import diagrams
from tnconv.codegen import Program, compile
from tnconv.diagrams import Expression, TensorNetwork, View
from tnconv.diagrams.affine import Tensor as Operand
from tnconv.models.layers import Operation, explicit
from tnconv.models.terms import Term
from tnconv.monitor.histograms import Binning, counted, counted_pairs
from tnconv.monitor.histograms_of_products import counted_product_pairs, counted_products
from tnconv.monitor.kept_terms import samples_of
from tnconv.monitor.needs import GradientHistogram, JointHistogram
from tnconv.quantities.base import Statistic
from tnconv.quantities.first_order import NORMS, SQUARES

MEASURED = 2**18  # entries of gradients from which on it pays to measure programs for them
LONG = 2**12  # entries of a row that are worth a call of their own
FORWARD = 1  # directions up to which forward passes are cheaper than gradients of samples


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

    @property
    def nothing_else(self) -> bool:
        """Whether nothing is wanted but projections, if any."""
        return not (self.norms or self.squares or self.histograms or self.largest)


@dataclass
class Found:
    """Of some parameters in one pass: in the units of the terms, but for histograms and largest.

    ``counts`` are of all of them together, or of each where the histogram is layerwise.
    """

    norms: Tensor | None = None  # (p, n), of each parameter
    projections: Tensor | None = None  # (k, n)
    squares: Sequence[Tensor] = ()  # of each parameter
    counts: dict[Hashable, list[Tensor]] = field(default_factory=dict)
    largest: float = 0.0

    def count(self, key: Hashable, counts: Tensor) -> None:
        """Add to the counts of one parameter."""
        held = self.counts.setdefault(key, [])
        held[:] = [held[0] + counts] if held else [counts]


class Directions:
    """Directions ``(k, *θ)`` to project on, by number of the parameter."""

    def __init__(self, sources: Sequence[Sequence[Tensor]]) -> None:
        self._sources = sources

    def __bool__(self) -> bool:
        return bool(self._sources)

    def of(self, at: int) -> list[Tensor]:
        """Each direction's part of one parameter."""
        return [each[at] for each in self._sources]

    def products(self, each: Tensor, numbers: Sequence[int]) -> Tensor:
        """``(k, n)``, of gradients ``(n, j)`` of some parameters one after the other."""
        found = []
        for source in self._sources:
            own = [source[at].reshape(-1) for at in numbers]
            found.append(each @ (own[0] if len(own) == 1 else torch.cat(own)).to(each.dtype))
        return torch.stack(found)


@torch.no_grad()
def contracted(term: Term, wanted: Wanted, directions: Directions, at: int) -> Found:
    """What is wanted of one parameter's samples.

    Args:
        term: of the parameter, in one pass.
        wanted: says what.
        directions: to project on.
        at: the number of the parameter.
    """
    if (factors := outer_factors(term)) is not None:
        return _of_products(*factors, wanted, directions.of(at), at)
    own = directions.of(at)
    if wanted.nothing_else and len(own) <= FORWARD and term.v is not None and term.vectors is None:
        each = [_projection(term, u) for u in own]
        return Found(projections=torch.stack(each) if each else None)
    if wanted.histograms or directions or term.v is None:
        return together({at: _written_out(term).flatten(1)}, wanted, directions)
    return _by_program(term, wanted)


@torch.no_grad()
def together(given: Mapping[int, Tensor], wanted: Wanted, directions: Directions) -> Found:
    """What is wanted of some parameters' gradients ``(n, j)``, by number, of the same samples."""
    found, parts = Found(), list(given.values())
    each = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    if wanted.norms:
        found.norms = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in parts]).square_()
    if wanted.squares:
        found.squares = torch.split(_squares(each), [g.shape[1] for g in parts])
    if directions:
        found.projections = directions.products(each, list(given))
    for key, (need, binning) in wanted.histograms.items():
        numbers = [wanted.parameter_bins[key][at] for at in given] if _joint(need) else ()
        if need.layerwise:
            each_numbers: Sequence[Tensor | None] = numbers or [None] * len(parts)
            pairs = zip(parts, each_numbers, strict=True)
            found.counts[key] = [_counted(g, need, binning, own) for g, own in pairs]
        else:
            own = None if not numbers else numbers[0] if len(numbers) == 1 else torch.cat(numbers)
            found.counts[key] = [_counted(each, need, binning, own)]
    if wanted.largest and each.numel():
        found.largest = abs(wanted.unit) * float(torch.maximum(each.max(), -each.min()))
    return found


def _squares(each: Tensor) -> Tensor:
    """``Σ_n g[n, j]²``; rows one after the other where the sum stays in the cache."""
    if each.shape[1] < LONG or each.dtype.itemsize < 4:
        return each.square().sum(0)
    found = each[0].square()
    for row in each[1:]:
        found.addcmul_(row, row)
    return found


def _written_out(term: Term) -> Tensor:
    """The gradients ``(n, *θ)``: of many entries by the program that is the fastest here."""
    operands = term.operands
    like = next(iter(operands.values()))
    known = term.v is None or term.vectors is not None or term.operation.recipe is explicit
    if known or not like.is_cpu:
        return term.gradients
    program = _fastest(diagrams.per_sample_gradients, term.operation, term.operand, like.dtype)
    if program is None:
        return term.gradients
    return program.run(*[operands[name] for name in program.operands])


def _projection(term: Term, direction: Tensor) -> Tensor:
    """``Σ_θ J[n, θ] u[θ]`` for one direction: a forward pass of the layer, and a dot product."""
    like = next(iter(term.operands.values()))
    shape = term.operation.networks[term.operand].operands[term.operand]
    given = term.operands | {"vector": direction.reshape(shape).to(like.dtype)}
    if like.is_cpu and term.operation.recipe is not explicit:
        program = _fastest(products, term.operation, term.operand, like.dtype)
        if program is not None:
            return program.run(*[given[name] for name in program.operands])
    return term.values([PRODUCTS], given=given)[0]


def products(layer: Expression, operand: str, vectors: None = None) -> TensorNetwork:
    """``p[n] = Σ_θ J[n, θ] u[θ]``, with u operand ``vector``."""
    j = diagrams.per_sample_gradients(layer, operand, vectors)
    vector = Operand("vector", View(j.shape[1:], j.result.axes[1:]))
    return j.with_((*j.nodes, vector), View(j.shape[:1], j.result.axes[:1]))


PRODUCTS = Statistic(products, samples=0)


@lru_cache(maxsize=1024)
def _fastest(
    diagram: Callable[[Expression, str], TensorNetwork],
    operation: Operation,
    operand: str,
    dtype: torch.dtype,
) -> Program | None:
    """Measured once: it runs at every step that is watched. None where that is not worth it.

    What is measured draws no random numbers of the run's.
    """
    layer = operation.networks[operand]
    if prod(diagrams.per_sample_gradients(layer, operand).shape) < MEASURED:
        return None
    with torch.random.fork_rng(devices=[]):
        return compile(diagram(layer, operand), tune=True, dtype=dtype)


def _joint(need: GradientHistogram | JointHistogram) -> bool:
    return isinstance(need, JointHistogram)


def _counted(
    each: Tensor,
    need: GradientHistogram | JointHistogram,
    binning: Binning,
    numbers: Tensor | None,
) -> Tensor:
    """A histogram of gradients ``(n, j)``, or of pairs with parameters in known bins ``(j)``."""
    if isinstance(need, GradientHistogram):
        return counted(each, binning)
    assert numbers is not None
    return counted_pairs(each, numbers, binning, need.parameter.count)


def _by_program(term: Term, wanted: Wanted) -> Found:
    """What needs no gradients written out, in one program."""
    statistics = [NORMS] * wanted.norms + [SQUARES] * wanted.squares
    values = iter(term.values(statistics))
    norms = next(values)[None] if wanted.norms else None
    return Found(norms, squares=[next(values).flatten()] if wanted.squares else [])


def _of_products(
    v: Tensor, x: Tensor, wanted: Wanted, directions: Sequence[Tensor], at: int
) -> Found:
    """Everything of ``v[n, d] x[n, c]``, which is not written out but for some histograms."""
    found = Found()
    if wanted.norms:
        found.norms = (v.square().sum(1) * x.square().sum(1))[None]
    if wanted.squares:
        found.squares = [(v.square().T @ x.square()).flatten()]
    if directions:
        each = [(v * (x @ u.reshape(v.shape[1], -1).to(x.dtype).T)).sum(1) for u in directions]
        found.projections = torch.stack(each)
    if wanted.largest:
        found.largest = abs(wanted.unit) * float((v.abs().amax(1) * x.abs().amax(1)).max())
    joint = {k: h for k, h in wanted.histograms.items() if isinstance(h[0], JointHistogram)}
    for key, (_, binning) in wanted.histograms.items():
        if key not in joint:
            found.count(key, counted_products(v, x, binning))
    for key, (need, binning) in joint.items():
        assert isinstance(need, JointHistogram)
        numbers = wanted.parameter_bins[key][at].reshape(v.shape[1], x.shape[1])
        found.count(key, counted_product_pairs(v, x, numbers, binning, need.parameter.count))
    return found


def outer_factors(term: Term) -> tuple[Tensor, Tensor] | None:
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
