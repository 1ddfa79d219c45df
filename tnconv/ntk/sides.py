"""The two sides of a tangent kernel: a model, its inputs, and functions of its outputs."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tnconv.displays import Shown
from tnconv.given import instances
from tnconv.models.computing import Inputs
from tnconv.models.modules import unwrapped
from tnconv.ntk.seeds import Seeds, summed
from tnconv.operators.low_rank.orders import Orders
from tnconv.operators.low_rank.rows import JacobianRows

State = nn.Module | Mapping[str, Tensor]
"""A model of the same architecture, or values of some parameters and buffers by name."""


Range = tuple[int, int]


class Rows(Protocol):
    """What is one side of a kernel: rows of a Jacobian that are made in parts."""

    @property
    def samples(self) -> int: ...

    @property
    def memory_limit(self) -> int | None: ...

    def rows(self, start: int = 0, stop: int | None = None) -> JacobianRows: ...


@dataclass(frozen=True, eq=False, repr=False)
class Side(Shown):
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

    def joined(self, other: "Side") -> "Side | None":
        """Both batches one after the other, if that is one batch of one model."""
        one, two = self.inputs, other.inputs
        if not isinstance(one, Tensor) or not isinstance(two, Tensor):
            return None
        if isinstance(self.seeds.outputs, Tensor):  # samples may have seeds of their own
            return None
        same = self.model is other.model and self.seeds.outputs == other.seeds.outputs
        if not same or (one.dtype, one.device) != (two.dtype, two.device):
            return None
        shapes = [[*x.shape[: self.batch_dim], *x.shape[self.batch_dim + 1 :]] for x in (one, two)]
        if shapes[0] != shapes[1] or one.dim() != two.dim():
            return None
        return replace(self, inputs=torch.cat([one, two], self.batch_dim))

    def rows(self, start: int = 0, stop: int | None = None) -> JacobianRows:
        """The Jacobian's rows of samples from ``start`` to ``stop``."""
        part = self.part(start, stop)
        limit = None if self.memory_limit is None else self.memory_limit // 2
        how = summed, part.inputs, None, part.seeds, limit, self.batch_dim, self.order
        found = JacobianRows.of(self.model, *how)
        return found.only(self.names)

    def part(self, start: int = 0, stop: int | None = None) -> "Side":
        """The samples from ``start`` to ``stop`` alone."""
        inputs = _narrowed(self.inputs, self.batch_dim, self.samples, start, stop)
        return replace(self, inputs=inputs, seeds=replace(self.seeds, start=start))


def rows_of_both(
    first: Rows, second: Rows, rows: Range, columns: Range
) -> tuple[JacobianRows, JacobianRows]:
    """The rows of some samples of either side, by one pass where both are of one model."""
    if isinstance(first, Side) and isinstance(second, Side):
        both = first.part(*rows).joined(second.part(*columns))
        if both is not None:
            every, count = both.rows(), rows[1] - rows[0]
            return every.of_samples(0, count), every.of_samples(count, every.samples)
    return first.rows(*rows), second.rows(*columns)


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
