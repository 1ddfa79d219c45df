"""Parameters as tensors with one factor for each axis: merged, split, with or without bias."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from math import ceil, prod
from typing import Literal

import torch
from torch import Tensor, nn

from tnconv.models.layers import layout

Kernels = Literal["tensor", "matrix"]


@dataclass(frozen=True, eq=False)
class Axes:
    """A parameter, or a weight with its bias as a last column, read as a tensor of ``shape``."""

    name: str
    layer: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None
    shape: tuple[int, ...]
    most: int

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The weight first."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def tensor(self, values: Mapping[Tensor, Tensor]) -> Tensor:
        """Values by parameter as one tensor; zeros for those without."""
        value = values.get(self.weight)
        value = torch.zeros_like(self.weight) if value is None else value
        if self.bias is None:
            return value.reshape(self.shape)
        column = values.get(self.bias)
        column = torch.zeros_like(self.bias) if column is None else column
        return torch.cat([value.flatten(1), column.unsqueeze(1)], 1).reshape(self.shape)

    def parts(self, tensor: Tensor) -> dict[Tensor, Tensor]:
        """The inverse of `tensor`."""
        if self.bias is None:
            return {self.weight: tensor.reshape(self.weight.shape)}
        rows = tensor.reshape(len(self.bias), -1)
        return {self.weight: rows[:, :-1].reshape(self.weight.shape), self.bias: rows[:, -1]}

    @property
    def blocks(self) -> tuple[tuple[slice, ...], ...]:
        """The parts of at most ``most`` rows in each axis that have factors of their own."""
        return tuple(product(*(_slices(size, self.most) for size in self.shape)))


def axes(
    model: nn.Module,
    trained: Sequence[Tensor],
    kernels: Kernels = "tensor",
    joint: bool = True,
    most: int = 2048,
    merged: int = 1,
) -> Iterator[Axes]:
    """How all parameters that are trained are read, each once.

    Embeddings are vectors. Kernels are tensors with all their axes or, as a "matrix", have one for
    outputs and one for inputs and positions; a bias is ``joint`` with a weight that is a matrix.
    Axes of size one are dropped, and neighbours whose sizes multiply to at most ``merged`` become
    one.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(5, 1))
    >>> [each.shape for each in axes(model, list(model.parameters()))]
    [(8, 3, 3, 3), (8,), (6,)]
    """
    wanted, seen = {p for p in trained if p.requires_grad}, set[Tensor]()
    for name, module in model.named_modules():
        own = {k: p for k, p in module._parameters.items() if p is not None and p in wanted - seen}
        flat = _is_matrix(module, own.get("weight"), kernels)
        weight, bias = own.get("weight"), own.get("bias")
        if flat and joint and weight is not None and bias is not None:
            shape = len(bias), weight.numel() // len(bias) + 1
            place = f"{name}.weight" if name else "weight"
            yield Axes(place, module, weight, bias, _merged(shape, merged), most)
            seen |= {weight, bias}
        for key, parameter in own.items():
            if parameter not in seen:
                sizes = tuple(parameter.shape)
                if flat and key == "weight":
                    sizes = sizes[0], prod(sizes[1:])
                if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                    sizes = (parameter.numel(),)
                place = f"{name}.{key}" if name else key
                yield Axes(place, module, parameter, None, _merged(sizes, merged), most)
                seen.add(parameter)


def _is_matrix(module: nn.Module, weight: Tensor | None, kernels: Kernels) -> bool:
    """Whether a weight is read as a matrix with outputs in front."""
    if weight is None or layout(module, "weight") is None:
        return False
    _, transposed = layout(module, "weight") or (1, False)
    return not transposed and (weight.dim() == 2 or kernels == "matrix")


def _merged(shape: Sequence[int], most: int) -> tuple[int, ...]:
    """Without axes of size one, and neighbours as one while they are small."""
    found: list[int] = []
    for size in shape:
        if found and prod((found[-1], size)) <= max(most, found[-1] if size == 1 else 0):
            found[-1] *= size
        elif size > 1:
            found.append(size)
    return tuple(found) or (1,)


def _slices(size: int, most: int) -> list[slice]:
    """Nearly equal parts."""
    count = ceil(size / most)
    ends = [0, *accumulate(size // count + (at < size % count) for at in range(count))]
    return [slice(a, b) for a, b in pairwise(ends)]
