"""At which steps something is measured: functions from a step's number to whether it is due."""

from collections.abc import Callable
from dataclasses import dataclass
from math import log

Schedule = Callable[[int], bool]


@dataclass(frozen=True)
class Linear:
    """Steps ``offset, offset + interval, offset + 2 interval, ...``."""

    interval: int
    offset: int = 0

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval is {self.interval}; expected at least 1")

    def __call__(self, step: int) -> bool:
        return step >= self.offset and (step - self.offset) % self.interval == 0


@dataclass(frozen=True)
class Logarithmic:
    """Steps ``⌊base^e⌋`` for exponents e that divide an interval evenly, and step 0 if ``init``."""

    start: float
    end: float
    steps: int = 300
    base: float = 10.0
    init: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.base > 1 or self.end < self.start:
            raise ValueError(
                f"start, end, steps, base are {self.start}, {self.end}, {self.steps}, {self.base}; "
                "expected start <= end, at least one step, and a base above 1"
            )

    def __call__(self, step: int) -> bool:
        if step <= 0:
            return self.init and step == 0
        width = (self.end - self.start) / (self.steps - 1) if self.steps > 1 else 0.0
        near = (log(step) / log(self.base) - self.start) / width if width else 0.0
        at = (min(max(round(near) + k, 0), self.steps - 1) for k in range(-1, self._reach(width)))
        return any(int(self.base ** (self.start + k * width) + 1e-9) == step for k in at)

    def _reach(self, width: float) -> int:
        """How many exponents above the nearest below can still round down to one step."""
        return 2 + (int(log(2) / log(self.base) / width) + 1 if width else 0)


def every(interval: int) -> Schedule:
    """Every so many steps, from step 0 on.

    >>> [step for step in range(10) if every(4)(step)]
    [0, 4, 8]
    """
    return Linear(interval)


def linear(interval: int, offset: int = 0) -> Schedule:
    """Every so many steps, from step ``offset`` on.

    >>> [step for step in range(10) if linear(4, offset=1)(step)]
    [1, 5, 9]
    """
    return Linear(interval, offset)


def logarithmic(
    start: float, end: float, steps: int = 300, base: float = 10.0, init: bool = True
) -> Schedule:
    """Steps whose logarithms divide an interval evenly, rounded down, and step 0 if ``init``.

    Args:
        start: the first exponent.
        end: the last exponent.
        steps: how many exponents.
        base: of the powers.
        init: whether step 0 counts as well.

    >>> [step for step in range(200) if logarithmic(0, 2, steps=5)(step)]
    [0, 1, 3, 10, 31, 100]
    """
    return Logarithmic(start, end, steps, base, init)
