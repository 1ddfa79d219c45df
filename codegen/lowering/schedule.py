"""Schedules: steps in order, how much they hold at a time, and what to give back when."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from tnconv.codegen.lowering.arrays import Array, Step
from tnconv.codegen.lowering.constants import words
from tnconv.codegen.prices import cost

ITEMS = (2, 4, 8, 16)  # bytes of an entry: a program runs in any precision
ONE = 24  # bytes of the constant 1 and of what it is made from
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
        gone = {at: [old.name for old in dying] for at, dying in self._dying.items()}
        return self._most(item, {at + 1: names for at, names in gone.items()})

    def held(self, item: int, spare: int, kept: Collection[str] = ()) -> int:
        """The most bytes held at a time if results are only given back by `releases`.

        Those that are ``kept`` for later calls are there from the beginning.
        """
        deleted = self.releases(spare)
        return self._most(
            item, {at: [x for x in names if x not in kept] for at, names in deleted.items()}, kept
        )

    def _most(
        self, item: int, deleted: Mapping[int, Sequence[str]], kept: Collection[str] = ()
    ) -> int:
        """The most bytes held at a time if before some steps results are deleted."""
        size = {step.name: item * prod(step.shape) for step in self.steps}
        held = most = sum(size[name] for name in kept) + (ONE if self._reads_one else 0)
        for at, step in enumerate(self.steps):
            new = 0 if step.name in kept else size[step.name]
            held += new - sum(size[name] for name in deleted.get(at, ()))
            most = max(most, held + step.kernel.scratch)
        return most

    def releases(self, spare: int = 0) -> dict[int, list[str]]:
        """The results to delete before a step, lest the peak be higher by more than ``spare``.

        So many bytes in float32, and in proportion for items of every other size.
        """
        bounds = {item: self.peak(item) + spare * item // cost.ITEM for item in ITEMS}
        held = dict.fromkeys(ITEMS, 0)
        dead: list[Step] = []
        deleted: dict[int, list[str]] = {}
        for at, step in enumerate(self.steps):
            dead.sort(key=lambda old: prod(old.shape))
            while dead and any(held[i] + need(step, i) > bounds[i] for i in ITEMS):
                old = dead.pop()
                deleted.setdefault(at, []).append(old.name)
                held = {item: bytes - item * prod(old.shape) for item, bytes in held.items()}
            held = {item: bytes + item * prod(step.shape) for item, bytes in held.items()}
            dead += self._dying.get(at, ())
        return deleted

    @cached_property
    def _reads_one(self) -> bool:
        codes = [*(step.code for step in self.steps), *(output.code for output in self.outputs)]
        return any("one" in words(code) for code in codes)

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


def need(step: Step, item: int) -> int:
    """The bytes of a step's result and of what its kernel holds beside."""
    return item * prod(step.shape) + step.kernel.scratch
