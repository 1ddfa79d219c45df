"""A pass through a model again, with the batch's statistics as constants.

Where batch normalisation trains, every sample's loss depends on all samples, so that no sample has
a gradient of its own. With mean and variance of the batch taken for constants it has one: that of
another function, whose value is the same and whose gradient is not, and which is called what it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tnconv.models.capture import Inert
from tnconv.models.modules import mixes_samples

STATISTICS = ("running_mean", "running_var")


@dataclass(eq=False)
class Beginning:
    """What a pass began with: its inputs, and the state of the generators it drew from."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    device: torch.device
    states: Sequence[Tensor]

    @classmethod
    def of(
        cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device
    ) -> "Beginning":
        """The present one."""
        states = [torch.get_rng_state()]
        if device.type == "cuda":
            states.append(torch.cuda.get_rng_state(device))
        return cls(args, kwargs, device, states)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Generators as they were, and as they are now afterwards."""
        on_device = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if on_device else []):
            torch.set_rng_state(self.states[0])
            if on_device:
                torch.cuda.set_rng_state(self.states[1], self.device)
            yield


@contextmanager
def constant_statistics(model: nn.Module) -> Iterator[None]:
    """Batch normalisations that train take mean and variance of what they read for constants.

    Modules are as before at the end.

    Raises:
        NotImplementedError: statistics of several workers' batches.
    """
    kept: list[tuple[nn.Module, bool, dict[str, Tensor | None]]] = []
    handles = []
    for name, module in model.named_modules():
        if not mixes_samples(module):
            continue
        if isinstance(module, nn.SyncBatchNorm):
            raise NotImplementedError(
                f"layer {name!r} normalises by statistics of all workers' batches, which are not "
                "taken for constants"
            )
        held = {each: module._buffers.get(each) for each in STATISTICS}
        kept.append((module, module.training, held))
        handles.append(module.register_forward_pre_hook(Inert(_measure)))
    try:
        for module, *_ in kept:
            module.training = False
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training, held in kept:
            module.training = training
            module._buffers.update(held)


@torch.no_grad()
def _measure(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Put the statistics of what a layer is about to read in the place of running ones."""
    x = args[0].detach()
    x = x if x.dtype.itemsize > 2 else x.float()
    over = [dim for dim in range(x.dim()) if dim != 1]
    variance, mean = torch.var_mean(x, over, correction=0)
    module._buffers.update(zip(STATISTICS, (mean, variance), strict=True))
