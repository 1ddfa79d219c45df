"""The backward passes of a step: when they begin and end, and what they add to gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from tnconv.monitor.seen import norms, numbers
from tnconv.monitor.subject import Subject, whole


@dataclass(eq=False)
class BackwardPasses:
    """The gradients of a step, pass by pass; all are told apart by autograd's numbers of passes.

    Args:
        subject: the run.
        named: the parameters that learn.
        compared: whether gradients that are there before the step's own are told apart from them.
        over: told the number of a pass that is over, before anybody clips gradients.
        gradients: copies of what the step's passes brought.
        norms: of ``p.grad``.
        own_norms: of what the step's passes added to it.
        count: how many passes are over.
        scale: of automatic mixed precision, at the end of the last pass.
        left: the gradients that were there before the step's own.
    """

    subject: Subject
    named: Sequence[tuple[str, nn.Parameter]]
    compared: bool
    over: Callable[[int], None]
    gradients: list[Tensor | None] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    own_norms: list[Tensor] = field(default_factory=list)
    count: int = 0
    scale: float = 1.0
    left: list[Tensor | None] = field(default_factory=list)
    _queued: bool = False  # whether the end of the pass that is going on is asked for
    _task: int = -1  # its number

    def was_cut_short(self) -> bool:
        """Whether the pass before the one that is going on did not come to its end."""
        cut = self._queued and torch._C._current_graph_task_id() != self._task
        self._queued &= not cut
        return cut

    @torch.no_grad()
    def begins(self) -> bool:
        """Take note of the gradients before a pass; whether those of the step were zeroed."""
        if self._queued or self.subject.sharded:
            return False
        held = [None if p.grad is None else whole(p.grad) for _, p in self.named]
        some = [g for g in held if g is not None]
        empty = not some or not any(numbers(norms(some)))
        if not self.count and not empty and self.compared:
            self.left = [None if g is None else g.detach().clone() for g in held]
        return bool(self.count and empty and any(numbers(self.norms)))

    def forget(self) -> None:
        """Begin anew: the gradients so far were zeroed."""
        self.gradients.clear()
        self.left.clear()
        self.count = 0

    def accumulated(self, parameter: Tensor) -> None:
        """A gradient of the user's backward pass is complete; the first asks for its end."""
        self.ask_for_the_end()

    def ask_for_the_end(self) -> None:
        """Be told when the pass that is going on is over."""
        task = torch._C._current_graph_task_id()
        if not self._queued or task != self._task:
            self._queued, self._task = True, task
            almost = partial(self._almost_over, task)
            torch.autograd.Variable._execution_engine.queue_callback(almost)

    def _almost_over(self, task: int) -> None:
        """Others' callbacks, which average gradients over workers, come first."""
        torch.autograd.Variable._execution_engine.queue_callback(partial(self.over, task))

    def look(self) -> list[Tensor | None]:
        """Norms of the gradients after a pass; what the step's passes made of them so far."""
        self._queued = False
        self.count += 1
        given = [whole(p.grad) if p.grad is not None else None for _, p in self.named]
        self.norms = self.own_norms = _norms(given)
        self.scale = self.subject.scale  # now: the loop may change it before the step is over
        if self.left:
            pairs = zip(given, self.left, strict=True)
            given = [g if g is None or left is None else g - left for g, left in pairs]
            self.own_norms = _norms(given)
        return given

    def keep(self, given: Sequence[Tensor | None]) -> None:
        """Copy gradients: the loop may change them."""
        if len(self.gradients) != len(given):
            self.gradients = [None] * len(given)
        for at, grad in enumerate(given):
            before = self.gradients[at]
            if grad is None or before is None:
                self.gradients[at] = None if grad is None else grad.clone()
            else:
                before.copy_(grad)


def _norms(given: Sequence[Tensor | None]) -> list[Tensor]:
    """Zero where there is no gradient."""
    found, zero = iter(norms([g for g in given if g is not None])), torch.zeros(())
    return [zero if g is None else next(found) for g in given]
