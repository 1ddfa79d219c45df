"""Several workers: factors are summed over all, inverses are shared out among them."""

from collections.abc import Callable, Sequence
from typing import Any, Literal
from weakref import finalize

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import JoinHook
from torch.nn.parallel import DistributedDataParallel

from tnconv.models.capture import Inert
from tnconv.models.modules import unwrapped, weak


class Workers:
    """The processes of ``torch.distributed`` that train a model together, or this one alone.

    They are those of a ``group`` that is given, or of the DistributedDataParallel that a ``model``
    is in, which can also be seen when it runs; all processes where neither is given. Every method
    is called by all of them, with tensors of the same shapes and dtypes. ``shadow`` is a step of
    theirs that a worker takes part in whose inputs are exhausted, in DistributedDataParallel's
    ``join``.
    """

    def __init__(
        self,
        group: "dist.ProcessGroup | Literal['local'] | None" = None,
        model: nn.Module | None = None,
        shadow: Callable[[], None] = lambda: None,
    ) -> None:
        self._given, self._shadow = group, shadow
        self._known = group is not None or model is None
        self._wrapper: DistributedDataParallel | None = None
        self._stops: list[Any] = []
        if model is None or group is not None:
            return
        self._model = unwrapped(model)
        each = [model, *model.modules()]
        found = [m for m in each if isinstance(m, DistributedDataParallel)]
        if found:
            self._join(found[0])
        else:
            look = Inert(weak(self._look))
            handle = self._model.register_forward_pre_hook(look)
            self._stops.append(finalize(self, handle.remove))

    @property
    def group(self) -> "dist.ProcessGroup | None":
        """The group that communicates; None for all processes."""
        if isinstance(self._given, str) or self._given is not None:
            return None if isinstance(self._given, str) else self._given
        found = None if self._wrapper is None else self._wrapper.process_group
        return found if isinstance(found, dist.ProcessGroup) else None

    @property
    def count(self) -> int:
        """How many there are."""
        return dist.get_world_size(self.group) if self._many else 1

    @property
    def rank(self) -> int:
        """Which one this is."""
        return dist.get_rank(self.group) if self._many else 0

    @property
    def unclear(self) -> bool:
        """Whether there are processes, and nothing says that they train this model together."""
        many = _initialised() and dist.get_world_size() > 1
        return many and not self._known

    @property
    def _many(self) -> bool:
        return _initialised() and self._known and self._given != "local"

    def leave(self) -> None:
        """Remove all hooks."""
        for each in self._stops:
            each()

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor's sum over the workers, in one message per dtype and device."""
        found = list(tensors)
        if self.count == 1:
            return found
        kinds = {(t.dtype, t.device): list[int]() for t in tensors}
        for at, tensor in enumerate(tensors):
            kinds[tensor.dtype, tensor.device].append(at)
        for places in kinds.values():
            flat = torch.cat([tensors[at].flatten() for at in places])
            dist.all_reduce(flat, group=self.group)
            parts = torch.split(flat, [tensors[at].numel() for at in places])
            for at, part in zip(places, parts, strict=True):
                found[at] = part.reshape(tensors[at].shape)
        return found

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Who does which task: the largest first, each to who has the least so far.

        >>> Workers().owners([1, 5, 2])
        [0, 0, 0]
        """
        loads, found = [0.0] * self.count, [0] * len(costs)
        for at in sorted(range(len(costs)), key=lambda at: -costs[at]):
            found[at] = loads.index(min(loads))
            loads[found[at]] += costs[at]
        return found

    def _look(self, model: nn.Module, args: Any) -> None:
        """The model runs, perhaps in a wrapper that was made after the optimizer."""
        active = DistributedDataParallel._active_ddp_module
        if active is not None and self._wrapper is None:
            if any(module is model for module in active.modules()):
                self._join(active)

    def _join(self, wrapper: DistributedDataParallel) -> None:
        """Communicate as a wrapper does, also where it joins uneven inputs."""
        self._wrapper, self._known = wrapper, True
        original: Callable[..., JoinHook] = wrapper.join_hook
        shadow = self._shadow

        def join_hook(**settings: Any) -> JoinHook:
            return _Shadow(wrapper, original(**settings), shadow)

        wrapper.join_hook = join_hook  # type: ignore[method-assign]
        self._stops.append(finalize(self, wrapper.__dict__.pop, "join_hook", None))


class _Shadow(JoinHook):
    """Takes part in the optimizer's messages, after those of a wrapper's passes.

    A synchronised backward pass is followed by a step.
    """

    def __init__(
        self, wrapper: DistributedDataParallel, inner: JoinHook, shadow: Callable[[], None]
    ) -> None:
        self.wrapper, self.inner, self.shadow = wrapper, inner, shadow

    def main_hook(self) -> None:
        self.inner.main_hook()
        if self.wrapper.require_forward_param_sync:
            self.shadow()

    def post_hook(self, is_last_joiner: bool) -> None:
        self.inner.post_hook(is_last_joiner)


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
