"""Statistics of all parameters, added up call by call, pass by pass, while gradients arrive.

Calls of one parameter in one pass see the same samples, so their gradients add up before anything
is squared: nothing is computed before all of them have arrived. Passes see other samples.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tnconv.models.calls import Alone, Call, Pass
from tnconv.models.terms import Arrival, Term, detached
from tnconv.quantities.base import LOSS_GRADIENT, Statistic, Vectors

Key = tuple[Pass, Vectors, nn.Parameter, int, int]
"""A part of the vectors of one source, of samples from one on, on their way to a parameter."""


@dataclass(frozen=True)
class Wanted:
    """The statistics of one source: those that are made at once, for first and later parts."""

    first: tuple[Statistic, ...]
    later: tuple[Statistic, ...]
    joint: tuple[Statistic, ...]
    factored: bool

    @classmethod
    def of(cls, statistics: Iterable[Statistic], source: Vectors) -> "Wanted":
        """Those of all statistics that are the source's."""
        own = [each for each in statistics if each.vectors == source]
        first = tuple(each for each in own if not each.joint)
        later = tuple(each for each in first if each.parts == "sum")
        joint = tuple(each for each in own if each.joint)
        return cls(first, later, joint, any(each.factored for each in own))


@dataclass(eq=False)
class Collector:
    """Values of statistics per parameter; ``found`` grows while gradients arrive.

    Statistics have the parameter's dtype, or ``least_dtype`` if that is wider. Unless calls are
    ``kept``, what they read is freed as soon as nothing here needs it. ``memory_limit`` is how many
    bytes the statistics of one parameter may hold at a time, beside what its layer saw.

    ``passes`` are those that a gradient reached; ``skipped`` parameters come from elsewhere, and
    ``sums`` has the sum of the per-sample gradients that came from elsewhere.
    """

    statistics: Sequence[Statistic]
    least_dtype: torch.dtype | None = None
    kept: bool = False
    memory_limit: int | None = None
    passes: set[Pass] = field(default_factory=set)
    skipped: set[nn.Parameter] = field(default_factory=set)
    found: dict[nn.Parameter, dict[Statistic, dict[Pass | None, Tensor]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(dict))
    )
    sums: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    _terms: dict[tuple[nn.Parameter, Vectors], dict[Pass | None, Term]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    _waiting: dict[Key, list[tuple[str, Arrival]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    _left: dict[Call, int] = field(default_factory=dict)
    _done: set[Key] = field(default_factory=set)
    _wanted: dict[Vectors, Wanted] = field(init=False)

    def __post_init__(self) -> None:
        every = dict.fromkeys(statistic.vectors for statistic in self.statistics)
        self._wanted = {source: Wanted.of(self.statistics, source) for source in every}

    @property
    def sources(self) -> tuple[Vectors, ...]:
        """Where the vectors that statistics need come from, each once."""
        return tuple(self._wanted)

    def wanted_of(self, source: Vectors) -> Wanted:
        """The statistics of a source, perhaps none."""
        return self._wanted.get(source) or Wanted((), (), (), False)

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
        """Take the gradient after one call; work as soon as a parameter's calls are all there.

        Vectors of which this is a ``part`` stay open until `close`, and so does a pass whose
        samples come block by block.

        Args:
            here: the pass of the call.
            call: the call, for the samples that came.
            grad_output: the gradient, or several vectors, after it.
            source: where they come from.
            vectors: how many they are, or None for the gradient.
            part: which part of the source's vectors they are.
            begin: the first of their samples.

        Raises:
            RuntimeError: a second gradient, after the first was used.
        """
        told = None if call.map is None and not isinstance(call, Alone) else here.samples
        arrival = Arrival(call, detached(grad_output), vectors, told)
        self.passes.add(here)
        for name, parameter in call.parameters:
            key = here, source, parameter, part, begin
            if parameter in self.skipped:
                continue
            if key in self._done:
                raise RuntimeError(
                    f"layer {call.name!r} received a second gradient in one pass; expected one "
                    "backward pass through every forward pass"
                )
            uses = here.uses[parameter]
            if uses == 1:  # the usual case
                self._work(key, [(name, arrival)])
                continue
            waiting = self._waiting[key]
            waiting.append((name, arrival))
            if len(waiting) == uses:
                self._settle(key)

    @torch.no_grad()
    def finish(self) -> None:
        """Work on all that is left, and on what samples of several passes have to do together."""
        for source in self.sources:
            self.settle(source)
        self._done.clear()
        self._left.clear()
        for (parameter, source), terms in self._terms.items():
            joint = self.wanted_of(source).joint
            term = Term.joined(self._lined_up(parameter, terms))
            values = term.values(joint, self.memory_limit)
            for statistic, value in zip(joint, values, strict=True):
                self.found[parameter][statistic][None] = value
        self._terms.clear()

    def settle(self, source: Vectors) -> None:
        """Work on the parameters some of whose calls no vector of a source reached."""
        for key in [key for key in self._waiting if key[1] == source]:
            self._settle(key)

    def close(self, calls: Iterable[Call], source: Vectors) -> None:
        """No part of a source's vectors is to come any more."""
        for call in calls:
            self._release(call, len(call.parameters))

    def _settle(self, key: Key) -> None:
        self._work(key, self._waiting.pop(key))

    def _work(self, key: Key, arrivals: Sequence[tuple[str, Arrival]]) -> None:
        """Add what arrived at a parameter, without a graph, in its own dtype."""
        self._done.add(key)
        if torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
            with torch.no_grad(), torch.autocast(key[2].device.type, enabled=False):
                self._take_in(key, arrivals)
        else:
            self._take_in(key, arrivals)
        for _, each in arrivals if key[1] == LOSS_GRADIENT else ():
            self._release(each.call)

    def _take_in(self, key: Key, arrivals: Sequence[tuple[str, Arrival]]) -> None:
        here, source, parameter, part, _ = key
        dtype = self.dtype_of(parameter)
        terms = [each.term(name, parameter, here.samples, dtype) for name, each in arrivals]
        term = Term.of(terms, self.wanted_of(source).factored)
        self.add(parameter, term, here, source, part)

    def dtype_of(self, parameter: nn.Parameter) -> torch.dtype:
        """The dtype of a parameter's statistics."""
        own, least = parameter.dtype, self.least_dtype
        return own if least is None or own == least else torch.promote_types(own, least)

    def _release(self, call: Call, settled: int = 1) -> None:
        """Free a call once all its parameters are settled for all sources of vectors."""
        left = self._left.get(call, len(call.parameters) * len(self._wanted)) - settled
        self._left[call] = left
        if not left:
            self._left.pop(call)
            if not self.kept:
                call.release()

    def add(
        self,
        parameter: nn.Parameter,
        term: Term,
        here: Pass | None = None,
        source: Vectors = LOSS_GRADIENT,
        part: int = 0,
    ) -> None:
        """Add what the statistics of one source are for a parameter in one pass."""
        of_source = self.wanted_of(source)
        if of_source.joint:
            self._terms[parameter, source][here] = term
        wanted, found = of_source.later if part else of_source.first, self.found[parameter]
        for statistic, value in zip(wanted, term.values(wanted, self.memory_limit), strict=True):
            held = found[statistic]
            key = None if statistic.samples is None else here
            held[key] = held[key] + value if key in held else value

    def add_known(self, parameter: nn.Parameter, gradients: Tensor, here: Pass) -> None:
        """Add what per-sample gradients ``(n, *parameter)`` from elsewhere give; note their sum."""
        gradients = gradients.to(self.dtype_of(parameter))
        self.passes.add(here)
        total = gradients.sum(0)
        self.sums[parameter] = self.sums[parameter] + total if parameter in self.sums else total
        self.add(parameter, Term.known(gradients), here)

    def totals(self, parameter: nn.Parameter) -> Mapping[Statistic, Tensor]:
        """The value of each statistic over all passes."""
        return {
            statistic: self._total(statistic, held)
            for statistic, held in self.found[parameter].items()
        }

    def _total(self, statistic: Statistic, held: Mapping[Pass | None, Tensor]) -> Tensor:
        """Passes line up as the model was called; those that did not use the parameter give 0."""
        if None in held:
            return held[None]
        dim = statistic.samples or 0
        rest = list(next(iter(held.values())).shape)
        parts = []
        for here in self._in_order():
            rest[dim] = here.samples
            parts.append(held[here] if here in held else next(iter(held.values())).new_zeros(rest))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def _lined_up(
        self, parameter: nn.Parameter, terms: Mapping[Pass | None, Term]
    ) -> Sequence[Term]:
        """A term for every pass: explicit zeros where the parameter was not used."""
        if None in terms:
            return list(terms.values())
        like = next(iter(terms.values()))
        lead = () if like.vectors is None else (like.vectors,)
        values = next(iter(like.read.values()))
        return [
            terms[here]
            if here in terms
            else Term.known(values.new_zeros(*lead, here.samples, *parameter.shape), like.vectors)
            for here in self._in_order()
        ]

    def _in_order(self) -> Sequence[Pass]:
        return sorted(self.passes, key=lambda here: here.at)
