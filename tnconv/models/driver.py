"""Quantities of a whole model, in one call or in a loop of the user's own."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from tnconv.models.capture import Call, Pass, Watch, watching
from tnconv.models.collector import Collector
from tnconv.models.evidence import Evidence, expect
from tnconv.models.fallback import Fallback
from tnconv.models.graph import sources
from tnconv.models.result import Result
from tnconv.quantities.base import LOSS_GRADIENT, Quantity, Statistic, Vectors

LossFunction = Callable[[Any, Any], Tensor]
Inputs = Tensor | Sequence[Any] | Mapping[str, Any]


def compute(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Inputs,
    targets: Any,
    quantities: Sequence[Quantity[Any]],
    memory_limit: int | None = None,
) -> Result:
    """Quantities of ``loss_fn(model(inputs), targets)``, by parameter name.

    ``inputs`` is a tensor, or a sequence or mapping of the model's arguments; dimension 0 of every
    layer's input is the batch. Nothing is written onto the model. Weight gradients that no quantity
    asks for are not computed. ``memory_limit`` is how many bytes the quantities of one parameter
    may take at a time, results included, beside what autograd holds: where they need more, they are
    computed in chunks of samples or channels.

    >>> from tnconv.quantities import SquaredNorms, Variance
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    >>> inputs, targets = torch.rand(8, 3, 8, 8), torch.randint(10, (8,))
    >>> loss_fn = nn.CrossEntropyLoss()
    >>> result = compute(model, loss_fn, inputs, targets, [Variance(), SquaredNorms()])
    >>> result[Variance]["0.weight"].shape, result.total(SquaredNorms).shape
    (torch.Size([4, 3, 3, 3]), torch.Size([8]))

    Raises:
        NotImplementedError: a layer that mixes samples, where a quantity needs them apart.
        RuntimeError: a gradient that passed a layer unseen.
        ValueError: a loss that is no scalar, or a memory limit below what a layer needs.
    """
    observation = Observation(model, quantities, memory_limit)
    with observation.watched(ready=_nothing) as watch, torch.enable_grad():
        args, kwargs = arguments(inputs)
        output = watch.model(*args, **kwargs)
        loss = loss_fn(output, targets)
        if loss.dim():
            raise ValueError(f"the loss has shape {tuple(loss.shape)}; expected a scalar")
        here = watch.passes[-1]
        observation.explain(here, (loss,))
        observation.propagate(here, loss_fn, output, targets)
        if LOSS_GRADIENT in observation.collector.sources:
            _backward(loss, [*sources(here.calls), *observation.fallback.expected])
            observation.expect((loss,), here, here.uses.keys())
        return observation.result(loss.detach())


@contextmanager
def observe(
    model: nn.Module, quantities: Sequence[Quantity[Any]], memory_limit: int | None = None
) -> Iterator["Observation"]:
    """Collect quantities while the user's own code runs the model and ``loss.backward()``.

    Every call of the model is a micro-batch of its own; ``result()`` is for all since the last one.
    ``memory_limit`` is as in `compute`.

    >>> from tnconv.quantities import SquaredNorms
    >>> model = nn.Linear(3, 2)
    >>> with observe(model, [SquaredNorms()]) as observation:
    ...     for _ in range(2):
    ...         model(torch.rand(8, 3)).square().mean().backward()
    >>> observation.result()[SquaredNorms]["weight"].shape
    torch.Size([16])

    Raises:
        NotImplementedError: a layer that mixes samples, where a quantity needs them apart.
        RuntimeError: a gradient that passed a layer unseen.
        ValueError: a quantity of other vectors than the loss's gradient, or a memory limit below
            what a layer needs.
    """
    _expect_loss_gradient_alone(quantities)
    observation = Observation(model, quantities, memory_limit)
    with observation.watched():
        yield observation
        observation.finish()


class Observation:
    """What was seen of a model since the last result."""

    def __init__(
        self,
        model: nn.Module,
        quantities: Sequence[Quantity[Any]],
        memory_limit: int | None = None,
    ) -> None:
        if memory_limit is not None and memory_limit <= 0:
            raise ValueError(f"memory_limit is {memory_limit}; expected a positive number of bytes")
        self.model, self.quantities, self.memory_limit = model, tuple(quantities), memory_limit
        self.per_sample = any(quantity.per_sample for quantity in quantities)
        each = [statistic for q in self.quantities for statistic in q.statistics().values()]
        self.statistics = tuple(dict.fromkeys(each))
        self._columns: dict[Call, list[Tensor]] | None = None
        self._source: Vectors = LOSS_GRADIENT  # of the backward pass that is going on
        self._reset()

    def _reset(self) -> None:
        self.collector = Collector(self.statistics, memory_limit=self.memory_limit)
        self.fallback = Fallback(self.collector)
        self._evidence = Evidence(lambda: self._source == LOSS_GRADIENT)

    @contextmanager
    def watched(self, ready: Callable[[Pass], None] | None = None) -> Iterator[Watch]:
        """Hooks on the model for as long as the context is open."""
        ready = ready or self._returned
        with watching(self.model, ready, self._receive, self.per_sample) as self._watch:
            yield self._watch

    def _returned(self, here: Pass) -> None:
        """The user's own code goes on with what the model gave."""
        self.explain(here, here.outputs)
        self._evidence.follow(self._watch, here)

    def _receive(self, here: Pass, call: Call, grad_output: Tensor) -> None:
        if self._columns is not None:
            self._columns[call].append(grad_output)
        elif self._source == LOSS_GRADIENT:
            self.collector.receive(here, call, grad_output)
        else:
            self.collector.receive(here, call, grad_output.unsqueeze(0), self._source, 1)

    def propagate(self, here: Pass, loss_fn: LossFunction, output: Any, targets: Any) -> None:
        """Send all vectors but the loss's gradient backwards, column by column.

        Raises:
            RuntimeError: a vector that passed a layer unseen.
            TypeError: an output that is no tensor.
        """
        for source in self.collector.sources:
            if source == LOSS_GRADIENT:
                continue
            if not isinstance(output, Tensor):
                raise TypeError(f"the model gives a {type(output).__name__}; expected a tensor")
            columns = source.columns(loss_fn, output.detach(), targets)
            self._source = source
            if len(columns) == 1:  # work layer by layer, on what is in the cache
                self._backward(here, output, columns[0])
            else:
                self._propagate_several(here, output, columns)
            self._source = LOSS_GRADIENT

    def _propagate_several(self, here: Pass, output: Tensor, columns: Tensor) -> None:
        nothing = {} if len(columns) else {call: list[Tensor]() for call in here.calls}
        self._columns = defaultdict(list, nothing)
        for column in columns:
            self._backward(here, output, column)
        for call, found in self._columns.items():
            empty = output.new_empty(0, *call.output_shape)
            vectors = torch.stack(found) if found else empty
            found.clear()
            self.collector.receive(here, call, vectors, self._source, len(columns))
        self._columns = None

    def _backward(self, here: Pass, output: Tensor, column: Tensor) -> None:
        for call in here.calls:
            call.reached = False
        _backward(output, sources(here.calls), column)
        self.expect((output,), here, here.uses.keys())

    def explain(self, here: Pass, roots: Sequence[Tensor]) -> None:
        """Find the parameters that need the fallback in a pass, with a warning for each."""
        self.fallback.prepare(self._watch, here, roots)

    def expect(self, roots: Sequence[Tensor], here: Pass, parameters: Set[nn.Parameter]) -> None:
        """Check that gradients on the way from roots to some parameters were seen.

        Raises:
            RuntimeError: one was not.
        """
        expect(roots, here, parameters - self.collector.skipped)

    def finish(self) -> None:
        """Work on all that arrived.

        Raises:
            RuntimeError: a gradient that passed a layer unseen.
        """
        for here in self._watch.passes:
            self.expect(self._evidence.roots(here), here, self._evidence.parameters)
        self.collector.finish()
        self.fallback.finish(self._watch)

    def result(self, loss: Tensor | None = None) -> Result:
        """The quantities of all micro-batches since the last result."""
        self.finish()
        samples = sum(here.samples for here in self.collector.passes)
        named = dict(self._watch.model.named_parameters())
        found = {
            name: self.collector.totals(p) for name, p in named.items() if p in self.collector.found
        }
        values = {
            quantity: {
                name: quantity.result(_chosen(quantity, total), samples)
                for name, total in found.items()
            }
            for quantity in self.quantities
        }
        self._watch.forget()
        self._reset()
        return Result(values, samples, loss)


def _expect_loss_gradient_alone(quantities: Sequence[Quantity[Any]]) -> None:
    """Raise where a user's own backward pass would not bring what a quantity needs."""
    for quantity in quantities:
        if any(each.vectors != LOSS_GRADIENT for each in quantity.statistics().values()):
            raise ValueError(
                f"{type(quantity).__name__} needs more than the gradient of the loss; expected "
                "first-order quantities in a loop, and this one in `tnconv.compute`"
            )


def _chosen(quantity: Quantity[Any], totals: Mapping[Statistic, Tensor]) -> Mapping[str, Tensor]:
    return {name: totals[each] for name, each in quantity.statistics().items()}


def _backward(
    value: Tensor, ends: Sequence[GradientEdge | Tensor], vector: Tensor | None = None
) -> None:
    """Send gradients through all hooks on the way to some ends, and nowhere else."""
    if ends and value.requires_grad:
        torch.autograd.grad(
            value,
            ends,  # type: ignore[arg-type]
            vector,
            retain_graph=vector is not None,
            allow_unused=True,
        )


def _nothing(here: Pass) -> None:
    """The loss, not the model's output, shows what a pass used."""


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model is called with."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return ((inputs,) if isinstance(inputs, Tensor) else tuple(inputs)), {}
