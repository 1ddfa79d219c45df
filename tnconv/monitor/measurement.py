"""What a measurement of training is: what it needs of a step, and what it makes of that.

The monitor collects what all measurements that are due at a step need, each need once. In all of
them, ``g[n]`` is the gradient of sample n's own loss and ``g`` the mean over the step's B samples,
whatever the loss's reduction, the scale of automatic mixed precision, or the number of
micro-batches.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tnconv.monitor.schedules import Schedule
from tnconv.monitor.seen import Seen


@dataclass(frozen=True)
class Measurement(ABC):
    """A value of a step. Subclasses are frozen dataclasses and say what they ``need``.

    ``every`` is a schedule of its own, instead of the monitor's. The strings that can be needed are
    attributes of `Seen`. A measurement that ``follows`` is made of a step and the one after it.

    >>> class LargestEntry(Measurement):
    ...     '''``max_j |g_j|``.'''
    ...     needs = ("gradients",)
    ...     def value(self, seen):
    ...         return max(float(g.abs().max()) for g in seen.gradients)
    >>> LargestEntry().name
    'LargestEntry'
    """

    every: Schedule | None = field(default=None, kw_only=True)

    needs: ClassVar[tuple[Hashable, ...]] = ()
    next_needs: ClassVar[tuple[Hashable, ...]] = ()
    """What is needed of the step after, by those that follow."""
    plain_sgd: ClassVar[bool] = False
    """Whether it has a meaning for stochastic gradient descent without momentum alone."""

    @property
    def name(self) -> str:
        """Its key in records."""
        return type(self).__name__

    @property
    def follows(self) -> bool:
        """Whether the step after it is needed, too."""
        return bool(self.next_needs)

    def needed(self) -> Iterable[Hashable]:
        """What is needed of the step, settings included."""
        return self.needs

    @abstractmethod
    def value(self, seen: Seen) -> Any:
        """What is recorded for a step."""


class Following(Measurement):
    """A measurement that is made of a step and the step after it."""

    def value(self, seen: Seen) -> Any:
        raise NotImplementedError(f"{self.name} is made of two steps; call after(first, second)")

    @abstractmethod
    def after(self, first: Seen, second: Seen) -> Any:
        """What is recorded for the first of two steps."""
