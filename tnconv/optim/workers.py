"""Several workers: factors are summed over all, inverses are shared out among them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Workers:
    """The processes of ``torch.distributed`` that train together, or this one alone.

    Every method is called by all of them, with tensors of the same shapes and dtypes.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self.group = group

    @property
    def count(self) -> int:
        """How many there are."""
        return dist.get_world_size(self.group) if self._many else 1

    @property
    def rank(self) -> int:
        """Which one this is."""
        return dist.get_rank(self.group) if self._many else 0

    @property
    def _many(self) -> bool:
        return dist.is_available() and dist.is_initialized()

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
