"""Rows of a kernel shared out among processes, and put together again."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tnconv.optim.workers import Workers

if TYPE_CHECKING:
    import torch.distributed as dist


def share(samples: int, group: "dist.ProcessGroup | None") -> slice:
    """The rows of this process: all where there is no group.

    The first ranks have one more than others, where they cannot all have the same number.
    """
    if group is None:
        return slice(0, samples)
    return _shares(samples, Workers(group).count)[Workers(group).rank]


def whole_kernel(
    own: dict[str, Tensor], samples: int, group: "dist.ProcessGroup | None"
) -> dict[str, Tensor]:
    """The rows of all processes, in the order of ranks.

    Raises:
        RuntimeError: one of them that fails, or that does not answer in the group's time.
    """
    if group is None:
        return own
    import torch.distributed as dist

    parts = _shares(samples, Workers(group).count)
    most = max(part.stop - part.start for part in parts)
    found = {}
    for name, block in own.items():
        padded = block.new_zeros(most, *block.shape[1:])
        padded[: len(block)] = block
        every = [torch.empty_like(padded) for _ in parts]
        try:
            dist.all_gather(every, padded, group=group)
        except RuntimeError as reason:
            raise RuntimeError(
                f"a process of the group gave no rows of the kernel ({reason}); expected all "
                f"{len(parts)} to call empirical_ntk with the same arguments"
            ) from reason
        found[name] = torch.cat([b[: p.stop - p.start] for b, p in zip(every, parts, strict=True)])
    return found


def _shares(samples: int, count: int) -> list[slice]:
    size, more = divmod(samples, count)
    stops = [size * (rank + 1) + min(rank + 1, more) for rank in range(count)]
    return [slice(start, stop) for start, stop in zip([0, *stops[:-1]], stops, strict=True)]
