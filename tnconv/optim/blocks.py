"""Which parameters of a model have Kronecker factors, and how they are laid out as matrices.

A weight is read as ``G[g, d, a]``, for every group a matrix of output channels times patches; a
bias is one more column of it, or a matrix with a single column by itself.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tnconv.models import layers
from tnconv.models.layers import Layout
from tnconv.models.modules import refuse_complex
from tnconv.optim.blocked import pieces


@dataclass(frozen=True, eq=False)
class Block:
    """Parameters with one pair of factors: a weight, a bias, or a weight with its bias."""

    name: str
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    layout: Layout = (1, False)

    @property
    def key(self) -> nn.Parameter:
        """The parameter that the factors are found and kept by."""
        found = self.bias if self.weight is None else self.weight
        assert found is not None
        return found

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """All of them, the weight first."""
        return tuple(p for p in (self.weight, self.bias) if p is not None)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(g, d, a)``, with the bias's column."""
        if self.weight is None:
            return 1, len(self.key), 1
        groups, transposed = self.layout
        first, second = self.weight.shape[:2]
        inputs, outputs = (first // groups, second) if transposed else (second, first // groups)
        patch = inputs * prod(self.weight.shape[2:])
        return groups, outputs, patch + (self.bias is not None)

    def pieces(self, most: int) -> int:
        """How many blocks its larger factor has on the diagonal, if none has more rows."""
        return pieces(max(self.shape[1:]), most)

    def rows(self, values: Mapping[Tensor, Tensor]) -> Tensor:
        """``G[g, d, a]`` of tensors by parameter; zeros for those without."""
        parts = []
        for parameter in self.parameters:
            value = values.get(parameter)
            value = torch.zeros_like(parameter) if value is None else value
            parts.append(self._split(value) if parameter is self.weight else self._column(value))
        return parts[0] if len(parts) == 1 else torch.cat([part for part in parts], 2)

    def tensors(self, rows: Tensor) -> dict[Tensor, Tensor]:
        """The tensors by parameter of ``G[g, d, a]``: the inverse of `rows`."""
        if self.weight is None:
            return {self.key: rows.reshape(self.key.shape)}
        if self.bias is None:
            return {self.weight: self._joined(rows, self.weight)}
        bias = rows[:, :, -1].reshape(self.bias.shape)
        return {self.weight: self._joined(rows[:, :, :-1], self.weight), self.bias: bias}

    def _split(self, weight: Tensor) -> Tensor:
        groups, transposed = self.layout
        if not transposed:
            return weight.reshape(groups, len(weight) // groups, -1)
        first, second = weight.shape[:2]
        split = weight.reshape(groups, first // groups, second, -1).transpose(1, 2)
        return split.reshape(groups, second, -1)

    def _joined(self, rows: Tensor, weight: Tensor) -> Tensor:
        groups, transposed = self.layout
        if not transposed:
            return rows.reshape(weight.shape)
        first, second = weight.shape[:2]
        return (
            rows.reshape(groups, second, first // groups, -1).transpose(1, 2).reshape(weight.shape)
        )

    def _column(self, bias: Tensor) -> Tensor:
        groups = self.layout[0] if self.weight is not None else 1
        return bias.reshape(groups, -1, 1)


def blocks(model: nn.Module, groups: Mapping[Tensor, int], joint: bool) -> list[Block]:
    """The blocks of a model's linear and convolutional layers, for parameters in groups.

    A parameter that is also held by a module of another kind, or by layers of several layouts, has
    none. A bias is ``joint`` with the weight where neither has another holder.

    Raises:
        NotImplementedError: a complex parameter in a group.
        ValueError: a weight and its bias in different groups.
    """
    refuse_complex((name, p) for name, p in model.named_parameters() if p in groups)
    holders: dict[Tensor, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            holders[parameter].append((module, key))

    def known(parameter: nn.Parameter | None) -> bool:
        if parameter is None or parameter not in groups or not parameter.requires_grad:
            return False
        layouts = {_layout(module, key) for module, key in holders[parameter]}
        return len(layouts) == 1 and None not in layouts

    found = list(_found(model, known, lambda p: joint and len(holders[p]) == 1))
    for block in found:
        if len({groups[p] for p in block.parameters}) > 1:
            raise ValueError(
                f"weight and bias of layer {block.name!r} are in different groups; expected one "
                "group, or joint=False"
            )
    return found


def _found(
    model: nn.Module,
    known: Callable[[nn.Parameter | None], bool],
    alone: Callable[[nn.Parameter], bool],
) -> Iterator[Block]:
    seen = set[Tensor]()
    for name, module in model.named_modules():
        own = module._parameters
        weight = own.get("weight") if known(own.get("weight")) else None
        bias = own.get("bias") if known(own.get("bias")) else None
        laid_out = _layout(module, "weight")
        if laid_out is None:
            continue
        together = weight is not None and bias is not None and alone(weight) and alone(bias)
        if weight is not None and weight not in seen:
            yield Block(name, weight, bias if together else None, laid_out)
        if bias is not None and not together and bias not in seen:
            yield Block(name, None, bias)
        seen |= {p for p in (weight, bias) if p is not None}


def _layout(module: nn.Module, key: str) -> Layout | None:
    """How a module's parameter is laid out; attention computes with its output layer by itself."""
    inside = isinstance(module, NonDynamicallyQuantizableLinear)
    return None if inside else layers.layout(module, key)
