"""How many samples a step's gradient is the mean of: given, or counted while a model runs."""

from collections.abc import Callable
from math import inf
from typing import Any
from weakref import finalize

import torch
from torch import nn

from tnconv.losses.reductions import batch_size
from tnconv.models.capture import Inert
from tnconv.models.modules import unwrapped, weak
from tnconv.optim.workers import Workers

BatchSize = float | Callable[[], float] | nn.Module
"""A number, a function that is called in every step, or the model whose calls are counted."""


class Samples:
    """The number B of samples in a step; 1 where the loss is a sum.

    Of a model, samples are counted in dimension 0 of what it is called with in training mode since
    the last step, over all micro-batches, and over all workers of its DistributedDataParallel.

    >>> model = nn.Linear(3, 2)
    >>> samples = Samples(model)
    >>> y = model(torch.rand(8, 3))
    >>> samples.take(), Samples(5).take()
    (8.0, 5.0)

    Raises:
        ValueError: a number that is not positive.
        TypeError: something else.
    """

    def __init__(self, given: BatchSize) -> None:
        self.given, self._count, self._used = given, 0, True
        self._stop: Callable[[], object] = lambda: None
        if isinstance(given, nn.Module):
            hook = Inert(weak(self._called))
            handle = unwrapped(given).register_forward_pre_hook(hook, with_kwargs=True)
            self._stop = finalize(self, handle.remove)
            self._workers = Workers(model=given)
        elif not callable(given):
            _check(given)

    def take(self) -> float:
        """The number since the last call.

        Raises:
            RuntimeError: a model that was not called since.
        """
        if not isinstance(self.given, nn.Module):
            return _check(self.given() if callable(self.given) else self.given)
        total, self._count, self._used = float(self._count), 0, True
        if self._workers.count > 1:
            total = self._workers.sums([torch.tensor(total, device=self._device)])[0].item()
        if not total:
            raise RuntimeError(
                "batch_size is a model, which was not called in training mode since the last step"
            )
        return total

    def forget(self) -> None:
        """Passes so far do not count."""
        self._count, self._used = 0, True

    def drop_unused(self) -> None:
        """Gradients are dropped: with none used since the last time, their passes count no more."""
        if not self._used:
            self._count = 0
        self._used = False

    def stop(self) -> None:
        """Remove all hooks."""
        self._stop()

    @property
    def _device(self) -> torch.device | None:
        assert isinstance(self.given, nn.Module)
        first = next(self.given.parameters(), None)
        return None if first is None else first.device

    def _called(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():
            self._count += batch_size((*args, *kwargs.values()))


def _check(number: Any) -> float:
    if isinstance(number, bool) or not isinstance(number, int | float):
        kind = type(number).__name__
        raise TypeError(f"batch_size is a {kind}; expected a number, a callable or a model")
    if not 0 < number < inf:
        raise ValueError(f"batch_size is {number!r}; expected a positive number")
    return float(number)
