"""Which functions of a model's outputs a tangent kernel is of: vectors that start at the output.

A function ``f[n, c] = Σ_o s[c, o] y[n, o]`` of the outputs y of one sample has the seed s[c]. All
outputs have unit seeds, their sum one seed of ones (a pseudo-kernel: Mohamadi, Bae & Sutherland
2023, "A fast, well-founded approximation to the empirical neural tangent kernel").
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tnconv.quantities.base import Vectors

Outputs = Literal["all", "sum"] | int | Sequence[int] | Tensor
"""All entries of a sample's output, their sum, one of them, some of them, or seeds."""


def summed(output: Tensor, targets: Any) -> Tensor:
    """A loss that tells samples apart: vectors start at the output, whatever the loss."""
    return output.sum()


@dataclass(frozen=True, eq=False)
class Seeds(Vectors):
    """Vectors ``v[c, n] = s[c]`` at every sample's output, or ``s[n, c]`` where samples differ.

    Where seeds differ, the first sample of the output has those of sample ``start``.
    """

    by_sample = True
    outputs: Outputs
    start: int = 0

    def columns(
        self,
        loss_fn: Callable[[Any, Any], Tensor],
        output: Tensor,
        targets: Any,
        owners: Tensor | None = None,
    ) -> Tensor:
        places = _places(output, owners)
        shape = tuple(output.shape[1:]) if owners is None else (places.shape[1],)
        seeds = self._seeds(places, shape, output)
        found = output.new_zeros(seeds.shape[-2], output.numel())
        found[:, places.flatten()] = _beside(seeds, len(places)).flatten(1)
        return found.reshape(-1, *output.shape)

    def parts(
        self,
        loss_fn: Callable[[Any, Any], Tensor],
        output: Tensor,
        targets: Any,
        size: int,
        owners: Tensor | None = None,
    ) -> Iterator[Tensor]:
        yield from torch.split(self.columns(loss_fn, output, targets, owners), size)

    def _seeds(self, places: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """``(c, o)`` or ``(n, c, o)``, o all entries of a sample's output."""
        samples, entries = places.shape
        if isinstance(self.outputs, Tensor):
            return self._given(self.outputs.to(like), samples, shape)
        if self.outputs == "sum":
            return like.new_ones(1, entries)
        every = torch.eye(entries, dtype=like.dtype, device=like.device)
        if self.outputs == "all":
            return every
        chosen = [self.outputs] if isinstance(self.outputs, int) else list(self.outputs)
        wrong = [at for at in chosen if not isinstance(at, int) or not -entries <= at < entries]
        if wrong or not chosen:
            raise ValueError(
                f"outputs is {self.outputs!r}; expected 'all', 'sum', seeds, or one or more of "
                f"the {entries} entries of a sample's output"
            )
        return every[chosen]

    def _given(self, seeds: Tensor, samples: int, shape: tuple[int, ...]) -> Tensor:
        own = seeds.dim() == len(shape) + 2
        if seeds.shape[-len(shape) :] != shape or seeds.dim() < len(shape) + 1 + own:
            raise ValueError(
                f"outputs has shape {tuple(seeds.shape)}; expected seeds of shape (c, *{shape}), "
                f"or (n, c, *{shape}) where samples differ"
            )
        if not own:
            return seeds.reshape(len(seeds), -1)
        if self.start + samples > len(seeds):
            raise ValueError(
                f"outputs has seeds for {len(seeds)} samples; expected them for all of a batch"
            )
        return seeds[self.start : self.start + samples].flatten(2)


def _beside(seeds: Tensor, samples: int) -> Tensor:
    """``(c, n, o)``."""
    if seeds.dim() == 3:
        return seeds.transpose(0, 1)
    return seeds.unsqueeze(1).expand(-1, samples, -1)


def _places(output: Tensor, owners: Tensor | None) -> Tensor:
    """``(n, o)``: where the entries of each sample are among all of the output, in their order.

    Raises:
        NotImplementedError: samples whose outputs have different sizes.
    """
    at = torch.arange(output.numel(), device=output.device)
    if owners is None:
        return at.reshape(len(output), -1)
    flat = owners.flatten()
    counts = flat.bincount()
    if bool((counts != counts[0]).any()):
        raise NotImplementedError(
            "the outputs of samples have different sizes; expected as many entries for each"
        )
    return flat.argsort(stable=True).reshape(len(counts), -1)
