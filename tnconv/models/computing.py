"""Quantities of a whole model, in one call or in a loop of the user's own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from tnconv.given import instances
from tnconv.losses.reductions import divisor
from tnconv.models.calls import Pass
from tnconv.models.capture import Watch, alone
from tnconv.models.coded_passes import Contradiction
from tnconv.models.gradient_alone import asks_for_gradient, expect_scalar, gradient_alone
from tnconv.models.graph import sources
from tnconv.models.observation import Observation, expect_arguments
from tnconv.models.propagation import LossFunction
from tnconv.models.result import Result
from tnconv.quantities.base import LOSS_GRADIENT, Quantity

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]


def compute(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Inputs,
    targets: Any,
    quantities: Sequence[Quantity[Any]],
    memory_limit: int | None = None,
    batch_dim: int = 0,
) -> Result:
    """Quantities of ``loss_fn(model(inputs), targets)``, by parameter name.

    ``inputs`` is a tensor, or a sequence or mapping of the model's arguments; the batch is their
    dimension ``batch_dim``. Inside the model it may be anywhere, also folded with time or windows:
    coded backward passes find it, at the first batch of a kind and at every hundredth. Nothing is
    written onto the model. Weight gradients that no quantity asks for are not computed.
    ``memory_limit`` is how many bytes the quantities of one parameter may take at a time, results
    included, beside what autograd holds: where they need more, they are computed in chunks of
    samples or channels. The vectors that Gauss-Newton quantities send backwards are held as few at
    a time as that, too, but at least one.

    >>> from tnconv.quantities import SquaredNorms, Variance
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    >>> inputs, targets = torch.rand(8, 3, 8, 8), torch.randint(10, (8,))
    >>> loss_fn = nn.CrossEntropyLoss()
    >>> result = compute(model, loss_fn, inputs, targets, [Variance(), SquaredNorms()])
    >>> result[Variance]["0.weight"].shape, result.total(SquaredNorms).shape
    (torch.Size([4, 3, 3, 3]), torch.Size([8]))

    Args:
        model: the network; it stays as it is.
        loss_fn: the loss of the batch, a scalar.
        inputs: a tensor, or a sequence or mapping of the model's arguments.
        targets: what the loss is given beside the model's output.
        quantities: what is asked for, from `tnconv.quantities` or one's own.
        memory_limit: bytes that the quantities of one parameter may take at a time.
        batch_dim: the dimension of the inputs that samples are in.

    Raises:
        NotImplementedError: samples that see each other, where a quantity needs them apart, or one
            in a reentrant checkpoint.
        RuntimeError: a gradient that passed a layer unseen.
        TypeError: an output that is no tensor, where a quantity needs the loss's Hessian in it.
        ValueError: a loss that is no scalar, or a memory limit below what a layer needs.
    """
    if asks_for_gradient(quantities):
        expect_arguments(model, quantities, memory_limit, batch_dim)
        what = model, loss_fn, arguments(inputs), targets, quantities, batch_dim
        if (alone_there := gradient_alone(*what)) is not None:
            return alone_there
    observation = _observation(model, quantities, memory_limit, batch_dim)
    with ran(observation, loss_fn, inputs, targets) as loss:
        return observation.result(loss)


def _observation(model: nn.Module, quantities: Sequence[Quantity[Any]], *how: Any) -> Observation:
    """An observation of something.

    Raises:
        ValueError: no quantities, from which nothing would come.
    """
    observation = Observation(model, quantities, *how)
    if not observation.quantities:
        raise ValueError("quantities is empty; expected one or more")
    return observation


@contextmanager
def ran(
    observation: Observation, loss_fn: LossFunction, inputs: Inputs, targets: Any
) -> Iterator[Tensor]:
    """One batch, forwards and backwards, as seen by an observation, which then can be asked.

    The loss is what the context gives.
    """
    instances(loss_fn=loss_fn)
    with (
        observation.watched(ready=_nothing) as watch,
        alone(watch.model, watch),
        torch.enable_grad(),
    ):
        watch.refuses_reentrant = True
        how = observation, watch, loss_fn, inputs, targets
        try:
            loss = _passed(*how, confirms=LOSS_GRADIENT in observation.collector.sources)
        except Contradiction:
            observation.start_again()
            loss = _passed(*how, confirms=False)
        yield loss.detach()


def _passed(
    observation: Observation,
    watch: Watch,
    loss_fn: LossFunction,
    inputs: Inputs,
    targets: Any,
    confirms: bool,
) -> Tensor:
    """The loss of one batch, all whose gradients were seen.

    Whether its gradient ``confirms`` where samples are, or coded passes alone have to show it.
    """
    args, kwargs = arguments(inputs)
    output = watch.model(*args, **kwargs)
    observation.expect_tensor(output)
    loss = loss_fn(output, targets)
    if any(each.counts == "divisor" for each in observation.quantities):
        observation.divisor = divisor(loss_fn, (args, kwargs), targets)
    expect_scalar(loss)
    here = watch.passes[-1]
    observation.explain(here, (loss,), loss if confirms else None)
    observation.expect_apart(loss_fn, output, targets, here)
    observation.propagate(loss_fn, output, targets)
    if LOSS_GRADIENT in observation.collector.sources:
        with observation.confirming(here):
            _backward(loss, [*sources(here.calls), *observation.fallback.ends(here)])
        observation.expect((loss,), here, here.uses.keys())
    return loss


@contextmanager
def observe(
    model: nn.Module,
    quantities: Sequence[Quantity[Any]],
    memory_limit: int | None = None,
    batch_dim: int = 0,
) -> Iterator["Observation"]:
    """Collect quantities while the user's own code runs the model and ``loss.backward()``.

    Every call of the model is a micro-batch of its own; ``result()`` is for all since the last one.
    What needs more than the loss's gradient, such as Gauss-Newton diagonals, also needs
    ``propagate`` for every micro-batch. ``memory_limit`` and ``batch_dim`` are as in `compute`, but
    a loss is not seen, so that nobody checks whether it couples samples.

    >>> from tnconv.quantities import GGNDiagonal, SquaredNorms
    >>> model, loss_fn = nn.Linear(3, 2), nn.MSELoss()
    >>> with observe(model, [SquaredNorms(), GGNDiagonal()]) as observation:
    ...     for _ in range(2):
    ...         output, targets = model(torch.rand(8, 3)), torch.rand(8, 2)
    ...         observation.propagate(loss_fn, output, targets)
    ...         loss_fn(output, targets).backward()
    >>> result = observation.result()
    >>> result[SquaredNorms]["weight"].shape, result[GGNDiagonal]["weight"].shape
    (torch.Size([16]), torch.Size([2, 3]))

    Args:
        model: the network; hooks are on it inside of the block only.
        quantities: what is asked for, from `tnconv.quantities` or one's own.
        memory_limit: bytes that the quantities of one parameter may take at a time.
        batch_dim: the dimension of the inputs that samples are in.

    Raises:
        NotImplementedError: samples that see each other, where a quantity needs them apart; or a
            layer in a reentrant checkpoint, through which nothing goes but the loss's gradient.
        RuntimeError: a gradient that passed a layer unseen, or a backward pass or ``propagate``
            that a micro-batch went without.
        ValueError: a memory limit below what a layer needs.
    """
    observation = _observation(model, quantities, memory_limit, batch_dim)
    with observation.watched() as watch:
        watch.refuses_reentrant = observation.sends_vectors
        yield observation
        observation.finish()


def _backward(value: Tensor, ends: Sequence[GradientEdge | Tensor]) -> None:
    """Send gradients through all hooks on the way to some ends, and nowhere else."""
    if ends and value.requires_grad:
        torch.autograd.grad(value, ends, allow_unused=True)  # type: ignore[arg-type]


def _nothing(here: Pass) -> None:
    """The loss, not the model's output, shows what a pass used."""


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model is called with."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return ((inputs,) if isinstance(inputs, Tensor) else tuple(inputs)), {}
