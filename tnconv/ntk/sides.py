"""The two sides of a tangent kernel: a model, its inputs, and functions of its outputs."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tnconv.given import instances
from tnconv.models.computing import Inputs
from tnconv.models.modules import unwrapped
from tnconv.ntk.seeds import Seeds, summed
from tnconv.operators.low_rank.orders import Orders
from tnconv.operators.low_rank.rows import JacobianRows

State = nn.Module | Mapping[str, Tensor]
"""A model of the same architecture, or values of some parameters and buffers by name."""


class Rows(Protocol):
    """What is one side of a kernel: rows of a Jacobian that are made in parts."""

    @property
    def samples(self) -> int: ...

    @property
    def memory_limit(self) -> int | None: ...

    def rows(self, start: int = 0, stop: int | None = None) -> JacobianRows: ...


@dataclass(frozen=True, eq=False)
class Side:
    """The Jacobian of functions of a model's outputs on a batch, made in parts when wanted.

    ``names`` are the parameters that count; ``batch_dim`` is the dimension of inputs that samples
    have. Of ``memory_limit``, one half is for rows and the other for products.
    """

    model: nn.Module
    inputs: Inputs
    seeds: Seeds
    names: tuple[str, ...]
    batch_dim: int = 0
    memory_limit: int | None = None
    order: Orders = "auto"

    @property
    def samples(self) -> int:
        """The size of the batch.

        Raises:
            ValueError: no input is a tensor with that dimension, or there is no sample.
        """
        for each in tree_leaves(self.inputs):
            if isinstance(each, Tensor) and each.dim() > self.batch_dim:
                if not each.shape[self.batch_dim]:
                    raise ValueError("a batch has no samples; expected one or more")
                return int(each.shape[self.batch_dim])
        raise ValueError("a batch holds no tensor; expected one with a batch dimension")

    def rows(self, start: int = 0, stop: int | None = None) -> JacobianRows:
        """The Jacobian's rows of samples from ``start`` to ``stop``."""
        part = _narrowed(self.inputs, self.batch_dim, self.samples, start, stop)
        seeds = replace(self.seeds, start=start)
        limit = None if self.memory_limit is None else self.memory_limit // 2
        how = summed, part, None, seeds, limit, self.batch_dim, self.order
        found = JacobianRows.of(self.model, *how)
        return found.only(self.names)


def learning(model: nn.Module, parameters: Sequence[str] | None) -> tuple[str, ...]:
    """The names of parameters that count: by default all that learn.

    Raises:
        ValueError: names that are unknown, repeated, frozen, or none at all.
    """
    instances(model=model)
    learn = tuple(name for name, p in unwrapped(model).named_parameters() if p.requires_grad)
    names = learn if parameters is None else tuple(parameters)
    wrong = sorted(set(names) - set(learn))
    if wrong or not names or len(set(names)) < len(names):
        found = f"no parameters that learn are called {', '.join(wrong)}" if wrong else repr(names)
        raise ValueError(f"parameters: {found}; expected one or more names, each once")
    return names


def at_state(model: nn.Module, state: State | None, name: str = "other") -> nn.Module:
    """A model at another checkpoint: a copy where values are given, else itself.

    Raises:
        ValueError: unknown names, or tensors or parameters of different names or shapes.
    """
    if state is None:
        return model
    instances(**{name: state})
    model = unwrapped(model)
    own = _shapes(model.state_dict(keep_vars=True))
    if isinstance(state, nn.Module):
        given = _shapes(dict(unwrapped(state).named_parameters()))
        expected = _shapes(dict(unwrapped(model).named_parameters()))
        if given != expected:
            raise ValueError(f"{name} has parameters {given}; expected {expected}")
        return state
    given = _shapes(state)
    wrong = [key for key, shape in given.items() if own.get(key) != shape]
    if wrong:
        raise ValueError(
            f"{name} has {wrong[0]!r} of shape {given[wrong[0]]}; expected values of the model's "
            f"parameters and buffers ({own.get(wrong[0], 'it has none of that name')})"
        )
    copy = deepcopy(model)
    with torch.no_grad():
        for key, held in copy.state_dict(keep_vars=True).items():
            if key in state:
                held.copy_(state[key])
    return copy


def _shapes(named: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(v.shape) for key, v in named.items() if isinstance(v, Tensor)}


def _narrowed(inputs: Inputs, dim: int, samples: int, start: int, stop: int | None) -> Inputs:
    """The inputs of some samples."""
    count = (samples if stop is None else stop) - start
    if count == samples:
        return inputs

    def part(each: Any) -> Any:
        if isinstance(each, Tensor) and each.dim() > dim and each.shape[dim] == samples:
            return each.narrow(dim, start, count)
        return each

    found: Inputs = tree_map(part, inputs)
    return found
