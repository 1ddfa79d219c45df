"""Numbers of single samples that arrive parameter by parameter, for some samples at a time."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Part = tuple[int, Tensor]
"""The first sample, and ``(rows, n)``."""


@dataclass(eq=False)
class SampleRows:
    """Rows of one number for each of some samples, by the parameters that they are of.

    Parts are kept as they arrive and put together at the end: that takes fewer calls of torch than
    to add each to those before. Sums are of ``dtype`` and on ``device``.
    """

    samples: int
    device: torch.device
    dtype: torch.dtype
    parts: dict[tuple[int, ...], list[Part]] = field(default_factory=dict)

    def add(self, parameters: Iterable[int], first: int, rows: Tensor) -> None:
        """Take ``(rows, n)`` of some parameters and of the samples from the first on."""
        self.parts.setdefault(tuple(parameters), []).append((first, rows))

    def added(self) -> Tensor:
        """``(rows, n)``: the sum over parameters, whose rows are of the same kinds."""
        return torch.stack(self._whole()).sum(0, dtype=self.dtype)

    def by_sample(self) -> Tensor:
        """``(n,)``: the sum over all rows, of which each parameter has one."""
        return torch.cat(self._whole()).sum(0, dtype=self.dtype)

    def by_parameter(self) -> list[tuple[int, float]]:
        """The sum over samples of each parameter's row."""
        sums = torch.cat(self._whole()).sum(1, dtype=self.dtype).tolist()
        return list(zip((at for numbers in self.parts for at in numbers), sums, strict=True))

    def _whole(self) -> list[Tensor]:
        found = [self._joined(parts).to(self.device) for parts in self.parts.values()]
        if len({each.dtype for each in found}) > 1:
            return [each.to(self.dtype) for each in found]
        return found

    def _joined(self, parts: Sequence[Part]) -> Tensor:
        """Parts one after the other, or added up where they overlap or leave some samples out."""
        ends = [first + rows.shape[1] for first, rows in parts]
        if [first for first, _ in parts] == [0, *ends[:-1]] and ends[-1] == self.samples:
            return parts[0][1] if len(parts) == 1 else torch.cat([rows for _, rows in parts], 1)
        (_, like), *_ = parts
        found = like.new_zeros(len(like), self.samples, dtype=self.dtype)
        for first, rows in parts:
            found[:, first : first + rows.shape[1]] += rows
        return found
