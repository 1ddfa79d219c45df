"""Schedules: steps in order, how much they hold at a time, and what to give back when."""

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tnconv.codegen.lowering.strided import ONE, Strided
from tnconv.codegen.lowering.writer import Step
from tnconv.codegen.prices import cost

ITEMS = (2, 4, 8, 16)  # bytes of an entry: a program runs in any precision
HELD_BY_ONE = 24  # bytes of the constant 1 and of what it is made from


@dataclass(frozen=True, repr=False)
class Schedule:
    """Steps in order, and the values that they give."""

    steps: tuple[Step, ...]
    outputs: tuple[Strided, ...]

    def __repr__(self) -> str:
        kinds = ", ".join(step.kernel.kind for step in self.steps)
        return f"<Schedule of {len(self.steps)} steps: {kinds}>"

    @property
    def seconds(self) -> float:
        return sum(step.kernel.seconds for step in self.steps)

    def peak(self, item: int = cost.ITEM) -> int:
        """The most bytes held at a time, results included and operands not, for items of a size.

        Every result is given back after its last use. Autograd keeps more for the backward pass.
        """
        return max([item * entries + scratch for entries, scratch in self._moments])

    def held(self, item: int, spare: int, kept: Collection[Step] = ()) -> int:
        """The most bytes held at a time if results are deleted by `releases` alone.

        Results that are ``kept`` for later calls are held from the beginning.
        """
        deleted = {
            at: [step for step in dead if step not in kept]
            for at, dead in self.releases(spare).items()
        }
        return self._most(item, deleted, kept)

    def _most(
        self, item: int, deleted: Mapping[int, Sequence[Step]], kept: Collection[Step]
    ) -> int:
        """The most bytes held at a time, with the results to delete before some steps."""
        held = sum(item * step.value.size for step in kept) + HELD_BY_ONE * self._reads_one
        most = held
        for at, step in enumerate(self.steps):
            new = 0 if step in kept else item * step.value.size
            held += new - sum(item * dead.value.size for dead in deleted.get(at, ()))
            most = max(most, held + step.kernel.scratch)
        return most

    def releases(self, spare: int = 0) -> dict[int, list[Step]]:
        """For each step, the earlier steps whose results have to be deleted before it.

        They are the fewest with which no more than ``spare`` bytes are held beyond the `peak` in
        float32, and in proportion in any other precision.
        """
        bounds = [(item, self.peak(item) + spare * item // cost.ITEM) for item in ITEMS]
        held = 0
        dead: list[Step] = []  # the smallest first
        sizes: list[int] = []  # and their entries
        deleted: dict[int, list[Step]] = {}
        for at, step in enumerate(self.steps):
            held, scratch = held + step.value.size, step.kernel.scratch
            while dead and any([item * held + scratch > bound for item, bound in bounds]):
                deleted.setdefault(at, []).append(dead.pop())
                held -= sizes.pop()
            for died in self._dying.get(at, ()):
                place = bisect_right(sizes, died.value.size)
                dead.insert(place, died)
                sizes.insert(place, died.value.size)
        return deleted

    @cached_property
    def _moments(self) -> list[tuple[int, int]]:
        """What each step holds if results are given back at once: entries, and other bytes."""
        held, constant = 0, HELD_BY_ONE * self._reads_one
        found = [(0, constant)]
        for at, step in enumerate(self.steps):
            held += step.value.size
            found.append((held, constant + step.kernel.scratch))
            held -= sum([dead.value.size for dead in self._dying.get(at, ())])
        return found

    @cached_property
    def _reads_one(self) -> bool:
        read = any(ONE in step.value.reads for step in self.steps)
        return read or any(output.origin is ONE for output in self.outputs)

    @cached_property
    def _dying(self) -> dict[int, list[Step]]:
        """For each step the steps, up to itself, whose results no later step uses."""
        last = {step.value: at for at, step in enumerate(self.steps)}
        for at, step in enumerate(self.steps):
            last.update(dict.fromkeys(step.value.reads, at))
        kept = {output.origin for output in self.outputs}
        dying: dict[int, list[Step]] = {}
        for step in self.steps:
            if step.value not in kept:
                dying.setdefault(last[step.value], []).append(step)
        return dying


def need(step: Step, item: int) -> int:
    """The bytes of a step's result and of what its kernel holds beside."""
    return item * step.value.size + step.kernel.scratch
