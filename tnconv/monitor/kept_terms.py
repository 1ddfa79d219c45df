"""What layers read, and the loss's gradient after them, kept until a step is over.

Norms, projections, second moments and histograms of the samples' gradients are made of that, once
the directions of the step are known: see `tnconv.monitor.sample_sums`.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from tnconv import diagrams
from tnconv.diagrams.notices import warn
from tnconv.models.calls import Call, Pass
from tnconv.models.collector import Collector
from tnconv.models.observation import Observation
from tnconv.models.sample_maps import Batch
from tnconv.models.terms import Term
from tnconv.monitor.subject import reason_of
from tnconv.quantities.base import LOSS_GRADIENT, Quantity, Statistic, Vectors

PART = 2**20  # entries of samples' gradients at a time: they stay in the cache
SMALL = 2**12  # entries of parameters that are worth no parts, and are worked on together
Chosen = Callable[[int], Tensor | None]
"""From a number of samples, those that are measured; None for all."""


@dataclass(frozen=True)
class Kept(Quantity[Tensor]):
    """What makes an observation ask for the samples' gradients; `TermCollector` keeps them."""

    def statistics(self) -> Mapping[str, Statistic]:
        return {"rows": Statistic(diagrams.per_sample_gradients, samples=0)}

    def result(self, found: Mapping[str, Tensor], samples: int) -> Tensor:
        return found["rows"]


@dataclass(eq=False)
class TermCollector(Collector):
    """A collector that keeps the terms of the loss's gradient, of the samples that are chosen."""

    terms: list[tuple[nn.Parameter, Term, Pass, int]] = field(default_factory=list)
    chosen: Chosen = lambda samples: None
    wanted: Set[nn.Parameter] | None = None  # None for all
    in_parts: bool = True  # where gradients of samples are written out
    indices: dict[Pass, Tensor | None] = field(default_factory=dict)
    _arrived: list[tuple[Pass, Call, Tensor, bool]] = field(default_factory=list)

    def receive(
        self,
        here: Pass,
        call: Call,
        grad_output: Tensor,
        source: Vectors = LOSS_GRADIENT,
        vectors: int | None = None,
        part: int = 0,
        begin: int = 0,
    ) -> None:
        if source != LOSS_GRADIENT:
            super().receive(here, call, grad_output, source, vectors, part, begin)
            return
        if not any(self._wants(p) for _, p in call.parameters) and self.sources == (source,):
            self.passes.add(here)
            call.release()
            return
        index, plain = self._index(here), _is_plain(call, here.samples)
        if index is not None and plain:
            call, grad_output = _narrowed(call, index), _rows(grad_output, index)
        self.passes.add(here)
        self._arrived.append((here, call, grad_output, plain and self.in_parts))

    def settle(self, source: Vectors) -> None:
        """Work on all that arrived, layer after layer: code that just ran is still in the cache."""
        arrived, self._arrived = self._arrived, []
        for each in arrived:
            self._take(*each)
        super().settle(source)

    def _take(self, here: Pass, call: Call, grad_output: Tensor, split: bool) -> None:
        """Make terms of one call, of some samples at a time where it is to be split."""
        sizes = [_part(call, p, here.uses[p] == 1) if split else 0 for _, p in call.parameters]
        named = list(zip(call.parameters, sizes, strict=True))
        whole = [each for each, size in named if not size]
        if whole == [*call.parameters]:
            super().receive(here, call, grad_output)
        elif whole:
            super().receive(here, _narrowed(call, slice(None), whole), grad_output)
        for each, size in named:
            for at in range(0, len(grad_output), size) if size else ():
                some = slice(at, at + size)
                super().receive(here, _narrowed(call, some, [each]), grad_output[some], part=at)

    def add(
        self,
        parameter: nn.Parameter,
        term: Term,
        here: Pass | None = None,
        source: Vectors = LOSS_GRADIENT,
        part: int = 0,
    ) -> None:
        if source != LOSS_GRADIENT:
            super().add(parameter, term, here, source, part)
        elif self._wants(parameter):
            assert here is not None
            index = self._index(here)
            if index is not None and samples_of(term) == here.samples != len(index):
                term = Term.known(term.gradients[index])
            self.terms.append((parameter, term, here, part))

    def _wants(self, parameter: nn.Parameter) -> bool:
        return self.wanted is None or parameter in self.wanted

    def _index(self, here: Pass) -> Tensor | None:
        if here not in self.indices:
            self.indices[here] = self.chosen(here.samples)
        return self.indices[here]


class KeepingObservation(Observation):
    """An observation that never disturbs the run it watches: what fails is left out, and said.

    ``failure`` says why nothing more is seen, once that is so.
    """

    collector_type = TermCollector
    failure: str | None = None

    def __init__(
        self,
        model: nn.Module,
        more: Sequence[Quantity[Any]],
        chosen: Chosen,
        wanted: Set[nn.Parameter] | None = None,
        batch_dim: int = 0,
        in_parts: bool = True,
    ) -> None:
        self._chosen, self._wanted, self._in_parts = chosen, wanted, in_parts
        super().__init__(model, [Kept(), *more], batch_dim=batch_dim)

    def _reset(self) -> None:
        super()._reset()
        assert isinstance(self.collector, TermCollector)
        self.collector.chosen, self.collector.wanted = self._chosen, self._wanted
        self.collector.in_parts = self._in_parts

    @property
    def kept(self) -> TermCollector:
        """The collector."""
        assert isinstance(self.collector, TermCollector)
        return self.collector

    def _returned(self, here: Pass) -> None:
        self.attempt(lambda: super(KeepingObservation, self)._returned(here))

    def _receive(self, here: Pass, call: Call, grad_output: Tensor) -> None:
        self.attempt(lambda: super(KeepingObservation, self)._receive(here, call, grad_output))

    def attempt(self, work: Callable[[], None]) -> bool:
        """Do some work of the observation's, unless something failed before."""
        if self.failure is not None:
            return False
        try:
            work()
        except Exception as error:
            self.failure = reason_of(error)
            warn(f"the monitor leaves out what needs gradients of single samples: {self.failure}")
            return False
        return True


def samples_of(term: Term) -> int:
    """How many samples a term has."""
    if term.v is None:
        return next(iter(term.read.values())).shape[0 if term.vectors is None else 1]
    return term.operation.networks[term.operand].sizes["n"]


def _is_plain(call: Call, samples: int) -> bool:
    """Whether row n of everything that a call read and gave is sample n's."""
    rows = all(x.shape[:1] == (samples,) for x in call.inputs)
    fast = call.map is None or call.map == Batch(0)
    return call.described and rows and fast and call.output_shape[:1] == (samples,)


def _part(call: Call, parameter: nn.Parameter, once: bool) -> int:
    """How many samples' gradients of a parameter are worked on at a time; 0 for all of them.

    A call with one position has gradients that are not written out. What is used several times has
    the same parts in all calls, whatever they are.
    """
    samples = call.output_shape[0]
    if parameter.numel() <= SMALL or (once and len(call.output_shape) < 3):
        return 0
    parts = ceil(samples * parameter.numel() / PART)
    return ceil(samples / parts) if parts > 1 else 0


def _narrowed(
    call: Call,
    index: Tensor | slice,
    parameters: Sequence[tuple[str, nn.Parameter]] | None = None,
) -> Call:
    """The call on some of its samples, for some of its parameters."""
    given = tuple(_rows(x, index) for x in call.given)
    shape = (len(given[0]), *call.output_shape[1:])
    own = call.parameters if parameters is None else tuple(parameters)
    return Call(call.name, call.module, given, {}, shape, None, True, own)


def _rows(x: Tensor, index: Tensor | slice) -> Tensor:
    """Some rows: those drawn are copied one by one, as ``x[index]`` copies entry by entry."""
    return x[index] if isinstance(index, slice) else x.index_select(0, index.to(x.device))


@torch.no_grad()
def index_of(samples: int, measured: int | None, generator: torch.Generator) -> Tensor | None:
    """So many of the samples, drawn without replacement and sorted; None for all."""
    if measured is None or measured >= samples:
        return None
    return torch.randperm(samples, generator=generator)[:measured].sort().values
