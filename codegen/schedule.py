"""Schedules: steps in order, how much they hold at a time, and what to give back when."""

import re
from dataclasses import dataclass
from functools import cached_property
from math import prod

from tnconv.codegen import cost
from tnconv.codegen.arrays import Array, Step

NAME = re.compile(r"\bt\d+\b")  # results of steps; operands are never called so


@dataclass(frozen=True)
class Schedule:
    """Steps in order, and the values that they give."""

    steps: tuple[Step, ...]
    outputs: tuple[Array, ...]

    @property
    def seconds(self) -> float:
        return sum(step.kernel.seconds for step in self.steps)

    def peak(self, item: int = cost.ITEM) -> int:
        """The most bytes held at a time, results included and operands not, for items of a size.

        Every result is given back after its last use. Autograd keeps more for the backward pass.
        """
        held = most = 0
        for at, step in enumerate(self.steps):
            most = max(most, held + _need(step, item))
            held += item * prod(step.shape)
            held -= sum(item * prod(old.shape) for old in self._dying.get(at, ()))
        return most

    def releases(self, spare: int = 0) -> dict[int, list[str]]:
        """The results to delete before a step, lest the peak be higher by more than ``spare``."""
        item, bound, held = cost.ITEM, self.peak() + spare, 0
        dead: list[Step] = []
        deleted: dict[int, list[str]] = {}
        for at, step in enumerate(self.steps):
            dead.sort(key=lambda old: prod(old.shape))
            while held + _need(step, item) > bound and dead:
                deleted.setdefault(at, []).append(dead[-1].name)
                held -= item * prod(dead.pop().shape)
            held += item * prod(step.shape)
            dead += self._dying.get(at, ())
        return deleted

    @cached_property
    def _dying(self) -> dict[int, list[Step]]:
        """For each step the results, of earlier steps or its own, that nothing later uses."""
        last = {step.name: at for at, step in enumerate(self.steps)}
        for at, step in enumerate(self.steps):
            last.update(dict.fromkeys(NAME.findall(step.code), at))
        kept = {name for output in self.outputs for name in NAME.findall(output.code)}
        dying: dict[int, list[Step]] = {}
        for step in self.steps:
            if step.name not in kept:
                dying.setdefault(last[step.name], []).append(step)
        return dying


def _need(step: Step, item: int) -> int:
    return item * prod(step.shape) + step.kernel.scratch
