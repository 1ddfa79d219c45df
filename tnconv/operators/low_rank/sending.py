"""Vectors that are sent backwards through one batch's graph as often as wanted.

Where products are made of rows layer by layer, nothing but the vectors on their way is held. Their
graph is not kept between products: the model runs again, from the same random state.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.random import fork_rng
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import get_device_states, set_device_states

from tnconv.models import computing
from tnconv.models.calls import Pass
from tnconv.models.collector import Collector
from tnconv.models.computing import Inputs
from tnconv.models.modules import unwrapped
from tnconv.models.propagation import Footprint, LossFunction
from tnconv.models.sample_maps import Shared, Silent
from tnconv.models.terms import Term
from tnconv.operators.curvature_operators import state_of
from tnconv.operators.low_rank.orders import Orders
from tnconv.operators.low_rank.rows import JacobianRows, RowsObservation
from tnconv.operators.low_rank.sources import Given
from tnconv.quantities.base import LOSS_GRADIENT, Vectors

Take = Callable[[str, Term], None]
"""Told each parameter's name and term, as soon as its vectors have arrived."""


@dataclass(eq=False)
class HandingOver(Collector):
    """A collector that keeps nothing: terms are taken as they arrive."""

    take: Callable[[nn.Parameter, Term], None] = lambda parameter, term: None

    def add(
        self,
        parameter: nn.Parameter,
        term: Term,
        here: Pass | None = None,
        source: Vectors = LOSS_GRADIENT,
        part: int = 0,
    ) -> None:
        self.take(parameter, term)


class Sender(RowsObservation):
    """An observation of one batch that sends no vectors until it is asked to."""

    def propagate(
        self,
        loss_fn: LossFunction,
        output: Any,
        targets: Any,
        factor: float = 1.0,
        chosen: Mapping[Vectors, Any] | None = None,
    ) -> None:
        """Note what is to be sent, and where it starts."""
        self.expect_tensor(output)
        self.loss_fn, self.output, self.targets = loss_fn, output, targets

    def vectors(self, source: Vectors) -> tuple[Tensor, Tensor | None]:
        """`RowsObservation.drawn` of what was asked for."""
        return self.drawn(source, self.loss_fn, self.output, self.targets)

    def footprint(self) -> Footprint:
        """What each vector holds on its way."""
        with self.propagating(self.output) as propagation:
            return propagation.footprint()

    def send(self, vectors: Tensor, take: Take) -> None:
        """Send vectors ``(m, *output)`` backwards, all at once."""
        collector = self._handing_over(take)
        with self.propagating(self.output, collector) as propagation:
            propagation.send(vectors, self._source)

    def expect_terms(self, count: int, take: Take) -> None:
        """What `send` will hand over of so many vectors, with shapes but without values."""
        collector = self._handing_over(take)
        with self.propagating(self.output, collector) as propagation:
            for call, here in propagation.calls.items():
                if isinstance(call.map, Silent):
                    continue
                lead = (count, here.samples) if isinstance(call.map, Shared) else (count,)
                v = self.output.new_empty(*lead, *call.output_shape, device="meta")
                collector.receive(here, call, v, self._source, count)
            collector.settle(self._source)

    def kept(self, vectors: Tensor, limit: int, order: Orders) -> JacobianRows:
        """The rows of vectors that are held after all layers, from now on."""
        self.order, given = order, {Given(vectors): None}
        self.send_given(given, self.loss_fn, self.output, self.targets)
        return self.taken(given, limit)[0]

    @property
    def _source(self) -> Vectors:
        return self.collector.sources[0]

    def _handing_over(self, take: Take) -> HandingOver:
        names = {p: name for name, p in unwrapped(self.model).named_parameters()}
        found = HandingOver(self.statistics, torch.float32, kept=True)
        found.skipped, found.take = self.collector.skipped, lambda p, term: take(names[p], term)
        return found


@dataclass(eq=False)
class SentBatch:
    """One batch of a model, which runs again whenever vectors are to be sent.

    ``random`` is the state of the random generators before its first run.
    """

    model: nn.Module
    loss_fn: LossFunction
    inputs: Inputs
    targets: Any
    source: Vectors
    batch_dim: int = 0
    random: tuple[Tensor, Any] | None = None
    _state: object = None

    @contextmanager
    def running(self) -> Iterator[Sender]:
        """Run the model, for as long as its graph is needed."""
        if self.random is None:
            self.random = torch.get_rng_state(), get_device_states(*self._tensors())
            self._state = self._now()
        sender = Sender(self.model, [self.source], batch_dim=self.batch_dim)
        with computing.ran(sender, self.loss_fn, self.inputs, self.targets):
            yield sender

    @contextmanager
    def again(self) -> Iterator[Sender]:
        """Run it as the first time.

        Raises:
            RuntimeError: the model or the batch changed meanwhile.
        """
        if self.random is None or self._now() != self._state:
            raise RuntimeError(
                "the model's parameters, its mode, or the batch changed since low_rank_ggn, whose "
                "memory_limit has them needed again; expected all products before the next step"
            )
        state, (devices, states) = self.random
        with fork_rng(devices):
            torch.set_rng_state(state)
            set_device_states(devices, states)
            with self.running() as sender:
                yield sender

    def _tensors(self) -> list[Tensor]:
        given = tree_leaves((self.inputs, self.targets))
        return [each for each in given if isinstance(each, Tensor)]

    def _now(self) -> object:
        versions = [(each.data_ptr(), each._version) for each in self._tensors()]
        return state_of(unwrapped(self.model)), versions
