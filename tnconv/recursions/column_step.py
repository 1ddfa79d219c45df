"""What several vectors do at one node of an autograd graph, and the rules that say how.

``v[m, r, *y]`` are m vectors at rows r of dimension 0 of a value y. There are as many rows of every
sample, one sample after the other, and a rule takes rows of dimension 0 after an operation to the
rows of the same samples before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from tnconv.displays import Shown
from tnconv.recursions.step import operation, shape_of


@dataclass(frozen=True, repr=False)
class Rows(Shown):
    """The ``chosen`` ones of so many ``samples``, all where it is None.

    A range is a block of them: its rows are views, whatever the device.
    """

    samples: int = 1
    chosen: Tensor | range | None = None

    @cached_property
    def count(self) -> int:
        """How many samples are chosen."""
        return self.samples if self.chosen is None else len(self.chosen)

    def of(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Their rows of a dimension that holds as many of every sample."""
        if self.chosen is None:
            return tensor
        each = tensor.shape[dim] // max(1, self.samples)
        if self._first is not None:
            return tensor.narrow(dim, self._first * each, self.count * each)
        assert isinstance(self.chosen, Tensor)
        if each == 1:
            return tensor.index_select(dim, self.chosen)
        apart = torch.unflatten(tensor, dim, (self.samples, each))
        return apart.index_select(dim, self.chosen).flatten(dim, dim + 1)

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """A shape with their rows alone."""
        if self.chosen is None:
            return tuple(whole)
        return whole[0] // max(1, self.samples) * self.count, *whole[1:]

    @property
    def begin(self) -> int:
        """The first sample of a block, or of all."""
        return self.chosen.start if isinstance(self.chosen, range) else 0

    def blocks(self, count: int) -> list["Rows"]:
        """So many blocks of about one size, or one for every sample; chosen ones stay together."""
        if isinstance(self.chosen, Tensor) or not self.count:
            return [self]
        size = -(-self.count // max(1, min(count, self.count)))
        starts = range(self.begin, self.begin + self.count, size)
        end = self.begin + self.count
        return [Rows(self.samples, range(at, min(at + size, end))) for at in starts]

    @cached_property
    def _first(self) -> int | None:
        """Where they begin, if they lie one after the other: then rows are views."""
        if isinstance(self.chosen, range):
            return self.chosen.start
        assert self.chosen is not None
        positions = self.chosen.tolist()
        first = positions[0] if positions else 0
        return first if positions == [*range(first, first + len(positions))] else None


@dataclass(slots=True)
class At:
    """One node on the way; ``wants`` says which inputs lead on, ``mine`` whether v may change."""

    node: Any
    wants: tuple[bool, ...]
    rows: Rows
    mine: bool = False

    def saved(self, name: str) -> Tensor:
        """A tensor that the node saved, at the rows."""
        return self.rows.of(getattr(self.node, f"_saved_{name}"))

    def shape(self, at: int = 0) -> tuple[int, ...]:
        """The shape of an input, at the rows."""
        return self.rows.shape(shape_of(*self.node.next_functions[at]))

    def broadcast(self, name: str) -> Any:
        """A saved operand of a function of single entries: a number, or a tensor at the rows."""
        found = getattr(self.node, name)
        if not isinstance(found, Tensor) or found.dim() < len(self.node._input_metadata[0].shape):
            return found
        return found if found.shape[0] == 1 else self.rows.of(found)

    def pulled(self, vector: Tensor) -> Tensor:  # (*y)
        """One vector of the whole batch before the first input, by the node's own formula."""
        nothing = [None] * (len(self.node._input_metadata) - 1)
        found = self.node(vector, *nothing)
        first: Tensor = found[0] if isinstance(found, tuple) else found
        return first

    def each(self, v: Tensor) -> list[Tensor | None]:
        """Before the first input by the node's own formula, vector by vector."""
        found = [self.rows.of(self.pulled(self._whole(vector))) for vector in v]
        first = torch.stack(found) if found else v.new_empty(0, *self.shape())
        return [first, *[None] * (len(self.wants) - 1)]

    def _whole(self, vector: Tensor) -> Tensor:
        """A vector with zeros at all other samples."""
        if self.rows.chosen is None:
            return vector
        whole = vector.new_zeros(self.node._input_metadata[0].shape)
        each = len(whole) // self.rows.samples
        apart = torch.unflatten(vector, 0, (self.rows.count, each))
        every = torch.unflatten(whole, 0, (self.rows.samples, each))
        if isinstance(self.rows.chosen, range):
            every[self.rows.begin : self.rows.begin + self.rows.count] = apart
        else:
            every.index_copy_(0, self.rows.chosen, apart)
        return whole


ColumnRule = Callable[[At, Tensor], Sequence[Tensor | None]]
"""From the vectors after a node's first result to those before each of its inputs."""
Fits = Callable[[Any, Sequence[bool]], bool]
"""Whether a rule is one of a node, some of whose inputs lead on."""
_RULES: dict[str, tuple[ColumnRule, Fits]] = {}
_OF_TWO: dict[tuple[ColumnRule, ColumnRule], ColumnRule] = {}


def anything(node: Any, wants: Sequence[bool]) -> bool:
    """Every node of a name."""
    return True


def register_columns(*operations: str, fits: Fits = anything) -> Callable[[ColumnRule], ColumnRule]:
    """Say how vectors go backwards through operations together: a decorator for a `ColumnRule`.

    Args:
        operations: autograd's names of their nodes, without "Backward" and the number.
        fits: whether the rule is one of a node.
    """

    def register(rule: ColumnRule) -> ColumnRule:
        _RULES.update((name, (rule, fits)) for name in operations)
        return rule

    return register


def column_rule(node: Node, wants: Sequence[bool]) -> ColumnRule | None:
    """The rule for a node, if there is one."""
    rule, fits = _RULES.get(operation(node), (None, anything))
    return rule if rule is not None and fits(node, wants) else None


def register_columns_of_two(
    rule: ColumnRule, below: ColumnRule
) -> Callable[[ColumnRule], ColumnRule]:
    """Say how vectors go backwards through two operations at once: a decorator for a `ColumnRule`.

    It is used at the first node in place of its own rule, and the second node passes on what it is
    given.

    Args:
        rule: the rule of the first operation backwards.
        below: that of the operation whose result the first one reads, and nothing else does.
    """

    def register(both: ColumnRule) -> ColumnRule:
        _OF_TWO[rule, below] = both
        return both

    return register


def rule_of_two(rule: ColumnRule, below: ColumnRule) -> ColumnRule | None:
    """The rule for two operations at once, if there is one."""
    return _OF_TWO.get((rule, below))


def passed(at: At, v: Tensor) -> Sequence[Tensor | None]:
    """The vectors as they are: another rule did what there is to do."""
    return (v,)
