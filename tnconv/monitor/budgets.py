"""A budget of time: what is measured, when, and on how many samples, so that it costs no more.

Measurements are of groups that cost alike. At a step at most one group is measured, so that what
the step took longer is its price. A step earns ``limit`` times the median of steps without
measurements; a group is measured once that pays for its price of last time, the group with the
fewest turns first. What a first time costs more, by compiling programs, is earned back afterwards.
"""

import time
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from tnconv.monitor.measurement import Measurement
from tnconv.monitor.needs import Diagonal, GradientHistogram, JointHistogram, Spectrum
from tnconv.monitor.step_watch import OF_ALL

Group = Literal["cheap", "parameters", "samples", "curvature", "spectrum"]
GUESS: dict[Group, float] = {"cheap": 0.0, "parameters": 0.05, "samples": 0.8, "curvature": 2.0}
GUESS["spectrum"] = 8.0
"""Prices in steps before anything is known; the largest of the published tool's are above."""
COPIES = {"before", "start", "gradients", "updates", "last_gradients", "last_updates"}
"""Needs that take copies of all parameters."""
WARM = 4  # steps without measurements before the first with
SELDOM = 40  # steps between two turns, above which fewer samples are taken
LEAST = 4  # samples


def group_of(measurement: Measurement) -> Group:
    """What a measurement's price depends on."""
    needs: set[Hashable] = {*measurement.needed(), *measurement.next_needs}
    if any(isinstance(need, Spectrum) for need in needs):
        return "spectrum"
    if any(isinstance(need, Diagonal) for need in needs):
        return "curvature"
    histograms = any(isinstance(n, GradientHistogram | JointHistogram) for n in needs)
    if histograms or needs & {*OF_ALL, "losses"}:
        return "samples"
    return "parameters" if needs & COPIES else "cheap"


@dataclass
class Budget:
    """At most ``limit`` times the run's own time, as far as that was measured.

    >>> budget = Budget(0.05)
    >>> for _ in range(WARM):
    ...     _ = budget.chosen(["samples"]), budget.spent(1.0)
    >>> budget.chosen(["samples"])  # a price of 0.8 steps is not earned yet
    """

    limit: float
    samples: int | None = None  # that are measured; None for all
    batch: int = 0
    turns: dict[Group, int] = field(default_factory=dict)
    prices: dict[Group, float] = field(default_factory=dict)
    credit: float = 0.0
    extra: float = 0.0
    total: float = 0.0
    last: Group | None = None
    instead: dict[str, str] = field(default_factory=dict)
    _alone: deque[float] = field(default_factory=lambda: deque(maxlen=31))

    def __post_init__(self) -> None:
        if not 0 < self.limit:
            raise ValueError(f"budget is {self.limit}; expected a positive fraction of a step")

    @property
    def step(self) -> float:
        """What a step takes without measurements."""
        return median(self._alone) if self._alone else 0.0

    @property
    def reached(self) -> float:
        """The overhead so far, as a fraction of the run's own time."""
        return self.extra / self.total if self.total else 0.0

    def price(self, group: Group) -> float:
        """What a turn of a group is expected to take longer than a step."""
        return self.prices.get(group, GUESS[group] * self.step)

    def chosen(self, groups: Iterable[Group], owed: Group | None = None) -> Group | None:
        """The group that is measured at this step; one that is ``owed`` its second step goes on."""
        self.last = owed
        wanted = sorted({*groups} - {"cheap"}, key=lambda g: (self.turns.get(g, 0), GUESS[g]))
        if owed is None and wanted and len(self._alone) >= WARM:
            if self.credit >= self.price(wanted[0]):
                self.last = wanted[0]
        if self.last is not None and owed is None:
            self.turns[self.last] = self.turns.get(self.last, 0) + 1
        return self.last

    def spent(self, seconds: float, own: float = 0.0) -> None:
        """Take note of what a step took, ``own`` of it the monitor's where nothing was measured."""
        group = self.last
        if group is None:
            self._alone.append(seconds - own)
        over = max(0.0, seconds - self.step) if group is not None else own
        self.extra, self.total = self.extra + over, self.total + self.step
        self.credit += self.limit * self.step - over
        if group is not None:
            before = self.prices.get(group)
            self.prices[group] = over if before is None else 0.5 * (before + over)
            self._fewer(group)

    def _fewer(self, group: Group) -> None:
        """Halve the samples where their turns come too seldom."""
        turns, earned = self.turns.get(group, 0), self.limit * self.step
        if group == "samples" and turns > 1 and self.prices[group] > SELDOM * earned:
            now = self.samples or self.batch
            if now > LEAST:
                self.samples = max(LEAST, now // 2)
                self.prices[group] *= self.samples / now

    def report(self) -> dict[str, object]:
        """What was chosen and reached: turns and prices in steps by group, samples, overhead.

        ``instead`` has the curvature that measurements take in the place of an exact one.
        """
        step = self.step or 1.0
        return {
            "limit": self.limit,
            "reached": self.reached,
            "samples": self.samples,
            "instead": dict(self.instead),
            "turns": dict(self.turns),
            "prices": {group: price / step for group, price in self.prices.items()},
        }


def clock(on_processor: bool) -> float:
    """Seconds: the process' own where it computes, else the world's."""
    return time.process_time() if on_processor else time.perf_counter()


def groups_of(measurements: Sequence[Measurement]) -> set[Group]:
    """The groups of some measurements."""
    return {group_of(each) for each in measurements}
