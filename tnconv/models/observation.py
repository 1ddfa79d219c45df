"""What is seen of a model while it runs, forwards and backwards, and what is made of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tnconv.given import instances
from tnconv.models.bare import noticing
from tnconv.models.calls import Call, Pass
from tnconv.models.capture import Watch, alone, watching
from tnconv.models.checkpoints import refuse_reentrant_nodes
from tnconv.models.collector import Collector
from tnconv.models.coupling import couples, kind_of
from tnconv.models.evidence import Evidence, expect
from tnconv.models.fallback import Fallback
from tnconv.models.modules import named_parameters, refuse_complex
from tnconv.models.propagation import LossFunction, Propagation
from tnconv.models.result import Result
from tnconv.models.sample_maps import Owned, SampleMap, Shared, along, is_fast, owners
from tnconv.models.samples import EVERY, Samples
from tnconv.models.walks import Walks
from tnconv.quantities.base import LOSS_GRADIENT, Quantity, Statistic, Vectors
from tnconv.recursions.step import node_name

PROPAGATE = "observation.propagate(loss_fn, output, targets)"


class Observation:
    """What was seen of a model since the last result; ``collector_type`` makes something of it.

    Args:
        model: the network.
        quantities: what is made of it.
        memory_limit: bytes that the quantities of one parameter may take at a time.
        batch_dim: the dimension of the inputs that samples are in.
    """

    collector_type: type[Collector] = Collector

    def __init__(
        self,
        model: nn.Module,
        quantities: Sequence[Quantity[Any]],
        memory_limit: int | None = None,
        batch_dim: int = 0,
    ) -> None:
        expect_arguments(model, quantities, memory_limit, batch_dim)
        refuse_complex((name, p) for p, name in named_parameters(model).items())
        self.model, self.quantities, self.memory_limit = model, tuple(quantities), memory_limit
        self.batch_dim = batch_dim
        self.per_sample = any(quantity.apart for quantity in quantities)
        each = [statistic for q in self.quantities for statistic in q.statistics().values()]
        self.statistics = tuple(dict.fromkeys(each))
        self._propagation: Propagation | None = None  # that is going on
        self.narrowed: Set[Vectors] = frozenset()  # sources sent last for chosen samples alone
        self.divisor: float | None = None  # what the loss's mean divides by, if that is known
        self._reset()

    def __repr__(self) -> str:
        asked = ", ".join(type(quantity).__name__ for quantity in self.quantities) or "nothing"
        return f"<{type(self).__name__} of a {type(self.model).__name__}: {asked}>"

    def _reset(self) -> None:
        self.collector = self.collector_type(
            self.statistics, torch.float32, memory_limit=self.memory_limit
        )
        self.fallback = Fallback(self.collector, self._hand_over)
        self.walks = Walks(self.quantities)
        self._evidence = Evidence(self._is_users)
        self._others = [each for each in self.collector.sources if each != LOSS_GRADIENT]
        self._seen: dict[Vectors, set[Pass]] = {s: set() for s in (LOSS_GRADIENT, *self._others)}

    @contextmanager
    def watched(self, ready: Callable[[Pass], None] | None = None) -> Iterator[Watch]:
        """Hooks on the model for as long as the context is open."""
        ready = ready or self._returned
        how = self.model, ready, self._receive, self.per_sample, self.batch_dim
        factored = any(each.factored for each in self.statistics)
        with watching(*how) as self._watch, noticing(self._watch) if factored else nullcontext():
            self.samples = Samples(self._watch)
            yield self._watch

    @property
    def sends_vectors(self) -> bool:
        """Whether other vectors than the loss's gradient go backwards, coded ones among them."""
        return self.per_sample or bool(self._others or self.walks.quantities)

    def _is_users(self) -> bool:
        """Whether the backward pass that is under way is the user's."""
        return self._propagation is None and not self.samples.passes.listening

    def _returned(self, here: Pass) -> None:
        """The user's own code goes on with what the model gave."""
        self.explain(here, here.outputs)
        self._evidence.follow(self._watch, here)

    def _receive(self, here: Pass, call: Call, grad_output: Tensor) -> None:
        """Take what arrives after a layer, unless all samples share it: see `Fallback`."""
        if self.walks.busy:
            return
        if self.samples.passes.take(call, grad_output) or isinstance(call.map, Shared):
            return
        if self.per_sample and call.map is None and call.parameters:
            raise RuntimeError(
                f"layer {call.name!r} ran after the model had returned, so that its samples are "
                "not known; expected losses that call no layers of the model"
            )
        self._hand_over(here, call, grad_output)

    def _hand_over(self, here: Pass, call: Call, grad_output: Tensor) -> None:
        if self._propagation is not None:
            self._propagation.receive(here, call, grad_output)
        else:
            self._seen[LOSS_GRADIENT].add(here)
            if LOSS_GRADIENT in self.collector.sources:
                self.collector.receive(here, call, grad_output)

    def propagate(
        self,
        loss_fn: LossFunction,
        output: Any,
        targets: Any,
        factor: float = 1.0,
        chosen: Mapping[Vectors, Sequence[int] | None] | None = None,
    ) -> None:
        """Send what quantities need beside the loss's gradient backwards, in a loop of one's own.

        The loss is ``factor * loss_fn(output, targets)``, with an output of the model since the
        last result, before ``loss.backward()`` or while the graph is retained; once for every call
        of the model. Gradients of parameters stay as they are. Without such quantities nothing is
        done.

        Args:
            loss_fn: A function of the output and the targets.
            output: What the model gave.
            targets: The loss's.
            factor: What the loss is multiplied by.
            chosen: The sources of vectors that are sent, by default all, and the samples that their
                vectors are wanted of, or None for all. Where it is not known whose rows operations
                work on, vectors of all samples arrive all the same.

        Raises:
            NotImplementedError: a loss whose second derivative is not known.
            RuntimeError: a vector that passed a layer unseen, or a second time.
            TypeError: an output that is no tensor.
            ValueError: an output of nothing that was observed, or a factor that is not positive.
        """
        self.expect_tensor(output)
        if not (self._others or self.walks.quantities):
            return
        if not factor > 0:
            raise ValueError(f"factor is {factor}; expected a positive number")
        with self.propagating(output) as propagation:
            propagation.run(loss_fn, targets, factor, self._owners(output), chosen)
            calls = propagation.calls
            self.walks.run(self._watch.model, calls, loss_fn, output, targets, factor)
            for here in {*calls.values()}:
                of = [m for y, m in zip(here.outputs, here.maps, strict=False) if y is output]
                if of:
                    self.expect_apart(loss_fn, output, targets, here, of)
            for source in self._others:
                self._seen[source].update(calls.values())
            self.narrowed = propagation.narrowed

    @contextmanager
    def propagating(
        self, output: Tensor, collector: Collector | None = None
    ) -> Iterator[Propagation]:
        """How vectors go backwards from an output, to a collector: by default the own one.

        Raises:
            NotImplementedError: a reentrant checkpoint on the way.
            ValueError: an output of nothing that was observed.
        """
        passes, meetings = self._watch.passes, self.fallback.meetings
        self._propagation = found = Propagation(
            collector or self.collector, passes, output, meetings
        )
        try:
            refuse_reentrant_nodes(map(node_name, found.nodes))
            if not found.calls and any(here.calls for here in passes):
                raise ValueError(
                    f"an output of shape {tuple(output.shape)} comes from no layer; expected what "
                    "the model gave since the last result, before loss.backward()"
                )
            with alone(self._watch.model, self._watch):
                yield found
        finally:
            self._propagation = None

    def _owners(self, output: Tensor) -> Tensor | None:
        """Whose each row of an output is, where that is not the number of its row."""
        passes = set(self._propagation.calls.values()) if self._propagation is not None else set()
        if not self.per_sample or len(passes) != 1:
            return None
        here = passes.pop()
        if here not in self.fallback.known:
            return None
        listened, self._propagation = self._propagation, None
        try:
            found = self.samples.of(output, here, self.fallback.known[here])
        finally:
            self._propagation = listened
        if not isinstance(found, Owned):
            raise NotImplementedError(
                f"samples of an output of shape {tuple(output.shape)} cannot be told apart, which "
                "the loss's curvature needs; expected what the model gave"
            )
        if is_fast(found):
            return None
        shape = tuple(output.shape)
        own = owners(found, shape, here.samples, output.device)
        return along(own, found, shape).expand(shape)

    def expect_apart(
        self,
        loss_fn: LossFunction,
        output: Any,
        targets: Any,
        here: Pass,
        maps: Sequence[SampleMap] | None = None,
    ) -> None:
        """Check that a loss couples no samples, where they are to be told apart.

        Args:
            loss_fn: the loss.
            output: what the model gave.
            targets: the targets of the batch.
            here: the pass that gave it.
            maps: which samples the entries of the output belong to, where that is known already.

        Raises:
            NotImplementedError: it does.
        """
        known = self.fallback.known.get(here)
        if known is None or here.samples == 1:
            return
        key = kind_of(loss_fn)
        if known.batches - known.losses.get(key, -EVERY) < EVERY:
            return
        if couples(loss_fn, output, targets, here.maps if maps is None else maps, here.samples):
            raise NotImplementedError(
                "the loss couples samples: its gradient at the output of one depends on others, so "
                "none has a gradient of its own; expected a sum or mean over samples"
            )
        known.losses[key] = known.batches

    def explain(self, here: Pass, roots: Sequence[Tensor], loss: Tensor | None = None) -> None:
        """Find the parameters that need the fallback in a pass, with a warning for each.

        A loss is one whose backward pass will follow in `confirming`.
        """
        self.fallback.prepare(self._watch, here, roots, self.samples, loss)

    def confirming(self, here: Pass) -> AbstractContextManager[None]:
        """The loss's backward pass, which shows whether samples are where they seemed to be."""
        return self.samples.confirming(here, self.fallback.known.get(here))

    def start_again(self) -> None:
        """Forget all since the last result."""
        self._watch.forget()
        self._reset()

    def expect_tensor(self, output: Any) -> None:
        """Check what vectors other than the loss's gradient start from, if there are any.

        Raises:
            TypeError: something else than a tensor.
        """
        if (self._others or self.walks.quantities) and not isinstance(output, Tensor):
            raise TypeError(f"the output is a {type(output).__name__}; expected a tensor")

    def expect(self, roots: Sequence[Tensor], here: Pass, parameters: Set[nn.Parameter]) -> None:
        """Check that gradients on the way from roots to some parameters were seen.

        Raises:
            RuntimeError: one was not.
        """
        expect(roots, here, parameters - self.collector.skipped)

    def finish(self) -> None:
        """Work on all that arrived.

        Raises:
            RuntimeError: a gradient that passed a layer unseen, or none where one is needed.
        """
        for here in self._watch.passes:
            self.expect(self._evidence.roots(here), here, self._evidence.parameters)
        self._expect_all_vectors()
        self.fallback.flush()
        self.collector.settle(LOSS_GRADIENT)
        self.fallback.finish(self._watch)
        self.collector.finish()

    def _expect_all_vectors(self) -> None:
        """Check that every pass that counts brought what each quantity needs.

        Raises:
            RuntimeError: one did not.
        """
        passes = set[Pass]().union(self.walks.passes, *self._seen.values())
        for each in self.walks.quantities:
            self._expect_passes(each, passes, self.walks.passes, PROPAGATE)
        words: dict[Vectors, str] = {LOSS_GRADIENT: "loss.backward()"}
        for quantity in self.quantities:
            for source in {each.vectors for each in quantity.statistics().values()}:
                what = words.get(source, PROPAGATE)
                self._expect_passes(quantity, passes, self._seen[source], what)

    def _expect_passes(
        self, quantity: Quantity[Any], passes: Set[Pass], seen: Set[Pass], what: str
    ) -> None:
        if missing := passes - seen:
            raise RuntimeError(
                f"{type(quantity).__name__} needs {what} after every call of the model; "
                f"it was missing for {len(missing)} of {len(passes)}"
            )

    def result(self, loss: Tensor | None = None) -> Result:
        """The quantities of all micro-batches since the last result."""
        self.finish()
        samples = sum(here.samples for here in self.collector.passes | self.walks.passes)
        counts: dict[str, Any] = {"samples": samples, "divisor": self.divisor or samples}
        anything = self.collector.found or self.walks.quantities
        named = named_parameters(self._watch.model) if anything else {}
        found = {
            name: self.collector.totals(p) for p, name in named.items() if p in self.collector.found
        }
        values = {
            quantity: _results(quantity, found, counts[quantity.counts])
            for quantity in self.quantities
            if quantity not in self.walks.quantities
        }
        values |= self.walks.values({name: p for p, name in named.items()})
        self.start_again()
        self.divisor = None
        return Result(values, samples, loss)


def expect_arguments(
    model: nn.Module, quantities: Sequence[Quantity[Any]], memory_limit: int | None, batch_dim: int
) -> None:
    """Check what an observation is told.

    Args:
        model: the network.
        quantities: what is made of it.
        memory_limit: bytes that the quantities of one parameter may take at a time.
        batch_dim: the dimension of the inputs that samples are in.

    Raises:
        TypeError: one quantity by itself, or a class; or a model that is none.
        ValueError: a limit or a dimension that is none.
    """
    instances(model=model)
    _expect_quantities(quantities)
    if batch_dim < 0:
        raise ValueError(f"batch_dim is {batch_dim}; expected a dimension, counted from 0")
    if memory_limit is not None and memory_limit <= 0:
        raise ValueError(f"memory_limit is {memory_limit}; expected a positive number of bytes")


def _expect_quantities(given: Any) -> None:
    """Check that a sequence of quantities is one.

    Raises:
        TypeError: one quantity by itself, or its class.
    """
    if isinstance(given, type | Quantity):
        name = given.__name__ if isinstance(given, type) else type(given).__name__
        raise TypeError(f"quantities is {name} by itself; expected a sequence, [{name}(...)]")
    for each in given:
        instances(quantities=each)
        if not isinstance(each, Quantity):
            raise TypeError(f"quantities holds a {type(each).__name__}; expected `Quantity`s")


def _results(
    quantity: Quantity[Any], found: Mapping[str, Mapping[Statistic, Tensor]], count: Any
) -> dict[str, Any]:
    """A quantity of each parameter, by name, that has all its statistics."""
    named = quantity.statistics()
    needed = {*named.values()}
    return {
        parameter: quantity.result({name: total[each] for name, each in named.items()}, count)
        for parameter, total in found.items()
        if total.keys() >= needed
    }
