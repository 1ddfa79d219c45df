"""Metrics with a diagonal: the identity, and what optimizers and curvature make of gradients."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

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


class Euclidean(Diagonal):
    """The identity: the metric that is there where none is named.

    >>> float(Euclidean({"w": torch.zeros(3)}).logdet())
    0.0
    """

    def __init__(self, space: Point) -> None:
        super().__init__({name: torch.ones_like(part) for name, part in space.items()})


def adam_metric(optimizer: torch.optim.Optimizer, model: nn.Module) -> Diagonal:
    """``√(v / (1 - β₂ᵗ)) + ε``: by whose inverse Adam (or AdamW, AMSGrad) multiplies its mean.

    Extrinsic: the averages are of gradients along these parameters, and their root is no metric
    that changes by itself.

    Raises:
        ValueError: an optimizer that has made no step with one of the parameters.
    """
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    found = {}
    for name, p in model.named_parameters():
        state: Any = optimizer.state.get(p, {})
        if "exp_avg_sq" not in state:
            raise ValueError(
                f"the optimizer has no averages of {name!r}; expected Adam's, after a step"
            )
        beta, step = groups[p]["betas"][1], float(state["step"])
        v = state.get("max_exp_avg_sq", state["exp_avg_sq"])
        found[name] = (v / (1 - beta**step)).sqrt() + groups[p]["eps"]
    return Diagonal(found)
