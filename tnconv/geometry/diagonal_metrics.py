"""Metrics with a diagonal, such as the identity."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tnconv.geometry.metric import Metric
from tnconv.geometry.points import Covector, Point, Vector, split


class Diagonal(Metric):
    """``G[i, i] = d_i``, by name.

    >>> metric = Diagonal({"w": torch.tensor([1.0, 4.0])})
    >>> metric.inverse_product(Covector({"w": torch.ones(2)})).parts["w"]
    tensor([1.0000, 0.2500])

    Raises:
        ValueError: entries that are not positive.
    """

    batched = True

    def __init__(self, entries: Mapping[str, Tensor], intrinsic: bool = False) -> None:
        for name, d in entries.items():
            if not bool((d > 0).all()):
                raise ValueError(
                    f"the metric of {name!r} has entries that are not positive; expected a damping"
                )
        self.space, self.entries, self.intrinsic = entries, entries, intrinsic

    def product(self, v: Vector) -> Covector:
        return Covector({name: self.entries[name] * part for name, part in v.parts.items()})

    def inverse_product(self, u: Covector) -> Vector:
        return Vector({name: part / self.entries[name] for name, part in u.parts.items()})

    def root(self, coordinates: Tensor) -> Vector:
        parts = split(coordinates, self.space)
        return Vector({name: part / self.entries[name].sqrt() for name, part in parts.items()})

    def root_transposed(self, u: Covector) -> Tensor:
        parts = [u.parts[name] / d.sqrt() for name, d in self.entries.items()]
        return torch.cat([part.reshape(-1) for part in parts])

    def logdet(self) -> Tensor:
        return torch.stack([d.log().sum() for d in self.entries.values()]).sum()

    def __mul__(self, factor: float) -> "Diagonal":
        if not factor > 0:
            raise ValueError(f"the factor of a metric is {factor!r}; expected a positive number")
        return Diagonal({name: factor * d for name, d in self.entries.items()}, self.intrinsic)

    __rmul__ = __mul__

    def __add__(self, other: Metric) -> Metric:
        """The sum of entries with another diagonal, else see `Summed`: then this is the last."""
        if isinstance(other, Diagonal):
            entries = {name: d + other.entries[name] for name, d in self.entries.items()}
            return Diagonal(entries, self.intrinsic and other.intrinsic)
        return other + self


class Euclidean(Diagonal):
    """The identity: the metric that is there where none is named.

    >>> float(Euclidean({"w": torch.zeros(3)}).logdet())
    0.0
    """

    def __init__(self, space: Point) -> None:
        super().__init__({name: torch.ones_like(part) for name, part in space.items()})


def constant_entries(metric: Metric) -> dict[str, Tensor] | None:
    """The entry of each parameter, of a diagonal metric that has one for all of its entries."""
    if not isinstance(metric, Diagonal):
        return None
    found = {name: d.reshape(-1)[0] for name, d in metric.entries.items()}
    same = (bool((d == found[name]).all()) for name, d in metric.entries.items())
    return found if all(same) else None
