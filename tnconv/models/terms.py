"""What statistics are made of: calls of layers, and what arrived after them, as operations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor, nn

from tnconv.diagrams import per_sample_gradients
from tnconv.models.arrangement import arranged, operands_of
from tnconv.models.calls import Alone, Call
from tnconv.models.checkpoints import changed_in_place
from tnconv.models.contracted import values
from tnconv.models.layers import Operands, Operation, explicit, repeated
from tnconv.models.sample_maps import Silent
from tnconv.models.sample_parts import part_of
from tnconv.models.unfolding import joined
from tnconv.quantities.base import Statistic

EACH = Statistic(per_sample_gradients, samples=0)


def detached(gradient: Tensor) -> Tensor:
    """A gradient without its history, if it has one.

    The tensor itself is kept where it has none: autograd would make an alias of it, of which it
    does not know that somebody reads it, a parameter's gradient, which optimizers change in place.
    """
    return gradient.detach() if gradient.requires_grad else gradient


@dataclass(eq=False)
class Arrival:
    """The gradient, or several vectors, after one call of a layer."""

    call: Call
    grad_output: Tensor  # (n, *o) or (m, n, *o)
    vectors: int | None = None
    samples: int | None = None

    @cached_property
    def described(self) -> tuple[Operation, Operands, Tensor]:
        """The call's operation, its operands, and the vectors, with the samples in front."""
        call, v = self.call, self.grad_output
        if call.map is not None and self.samples is not None:
            return arranged(call, v, self.samples, len(self._lead))
        return *operands_of(call), v

    def term(
        self, operand: str, parameter: nn.Parameter, samples: int, dtype: torch.dtype
    ) -> "Term":
        """The call as an operation on operands in a dtype."""
        if isinstance(self.call, Alone):
            return Term.known(self.grad_output.to(dtype), self.vectors)
        if isinstance(self.call.map, Silent):
            return self._zero(parameter, samples, dtype)
        operation, operands, given = self.described
        shape = (*self._lead, *operation.networks[operand].shape)
        v = _as(given if given.shape == shape else given.reshape(shape), dtype)
        read = {name: _as(array, dtype) for name, array in operands.items()}
        return Term(operation, operand, read, v, self.vectors, Stamp.of(self.call.name, read))

    def _zero(self, parameter: nn.Parameter, samples: int, dtype: torch.dtype) -> "Term":
        """Where no gradient came, whose each row would be is not known.

        Raises:
            NotImplementedError: there is one.
        """
        if self.grad_output.any():
            raise NotImplementedError(
                f"a gradient came after layer {self.call.name!r}, and no output of the model that "
                "tells samples apart depends on it; expected losses of such outputs alone"
            )
        zeros = parameter.new_zeros(*self._lead, samples, *parameter.shape, dtype=dtype)
        return Term.known(zeros, self.vectors)

    @property
    def _lead(self) -> tuple[int, ...]:
        return () if self.vectors is None else (self.vectors,)


def _as(array: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a dtype: most have it, and to ask torch for that takes a call."""
    return array if array.dtype == dtype else array.to(dtype)


@dataclass(frozen=True, slots=True)
class Stamp:
    """The versions that operands had when a layer's call was taken apart.

    Operands can be views of what the user holds, such as the model's input, and parts of them have
    the same versions.
    """

    layer: str
    versions: Mapping[str, int]

    @classmethod
    def of(cls, layer: str, read: Operands) -> "Stamp":
        """The versions of operands now."""
        return cls(layer, {name: x._version for name, x in read.items()})

    def expect(self, read: Operands) -> None:
        """Check that operands are what they were.

        Raises:
            RuntimeError: one was changed in place.
        """
        if any(x._version != self.versions[name] for name, x in read.items()):
            raise changed_in_place(self.layer)


@dataclass(frozen=True)
class Term:
    """One operation and its operands: what statistics are made of."""

    operation: Operation
    operand: str
    read: Mapping[str, Tensor]  # each (n, ...), or (t, n, ...) for several calls
    v: Tensor | None  # (n, *o) or (m, n, *o), with t before n
    vectors: int | None = None
    stamp: Stamp | None = None

    @classmethod
    def known(
        cls, gradients: Tensor, vectors: int | None = None, samples_first: bool = False
    ) -> "Term":
        """Gradients ``(n, *parameter)`` or ``(m, n, *parameter)`` as an operation of their own.

        With ``samples_first`` they are ``(n, m, *parameter)``.
        """
        lead = gradients.shape[: 1 if vectors is None else 2]
        samples, shape = lead[0 if samples_first else -1], tuple(gradients.shape[len(lead) :])
        how = (vectors, samples, shape) + ((True,) if samples_first else ())
        operation = Operation(explicit, how)
        return cls(operation, "parameter", {"x": gradients}, None, vectors)

    @classmethod
    def of(cls, terms: Sequence["Term"], factored: bool = False) -> "Term":
        """Several calls as one operation: repeated, or if they differ from explicit gradients.

        For statistics that are ``factored``, calls that differ are unfolded, if that is possible.
        """
        first, *others = terms
        if not others:
            return first
        for term in terms:
            term.expect_unchanged()
        if any(other.operation != first.operation or other.v is None for other in others):
            if factored and (found := cls._unfolded(terms)) is not None:
                return found
            each = torch.stack([term.gradients for term in terms])
            return cls.known(each.sum(0), first.vectors)
        calls, recipe, arguments = 1, first.operation.recipe, first.operation.arguments
        put = torch.stack
        if recipe is repeated:
            put, (calls, recipe, *rest) = torch.cat, arguments
            arguments = tuple(rest)
        settings = (calls * len(terms), recipe, *arguments)
        read = {name: put([term.read[name] for term in terms]) for name in first.read}
        given = [term.v for term in terms if term.v is not None]
        v = put(given, 0 if first.vectors is None else 1) if given else None
        return cls(Operation(repeated, settings), first.operand, read, v, first.vectors)

    @classmethod
    def _unfolded(cls, terms: Sequence["Term"]) -> "Term | None":
        operand, vectors = terms[0].operand, terms[0].vectors
        given = [(term.read, term.v) for term in terms if term.v is not None]
        if len(given) < len(terms) or any(term.operand != operand for term in terms):
            return None
        found = joined([term.operation for term in terms], operand, given, vectors)
        return None if found is None else cls(found[0], operand, {"x": found[1]}, found[2], vectors)

    @classmethod
    def joined(cls, terms: Sequence["Term"]) -> "Term":
        """Passes of one parameter as one, from explicit gradients if there are several."""
        if len(terms) == 1:
            return terms[0]
        vectors = terms[0].vectors
        samples = 0 if vectors is None else 1
        return cls.known(torch.cat([term.gradients for term in terms], samples), vectors)

    def of_samples(self, start: int, stop: int) -> "Term":
        """The samples from ``start`` to ``stop`` alone, as views of the operands."""
        lead = () if self.vectors is None else (self.vectors,)
        if self.v is None:
            samples_first = len(self.operation.arguments) > 3
            at = 0 if samples_first else len(lead)
            each = self.read["x"].narrow(at, start, stop - start)
            return Term.known(each, self.vectors, samples_first)
        part = part_of(self.operation, self.operand, start, stop)
        axes = self.operation.networks[self.operand].result.axes
        at = len(lead) + [axis.terms for axis in axes].index((("n", 1),))
        by_axis = self.v.reshape(*lead, *(axis.size for axis in axes))
        v = by_axis.narrow(at, start, stop - start).reshape(*lead, *part.network.shape)
        return replace(self, operation=part.operation, read=part.read(self.read), v=v)

    @property
    def gradients(self) -> Tensor:
        """``J[m, n, θ]``, all of it."""
        return self.values([EACH])[0]

    def expect_unchanged(self) -> None:
        """Check that operands are what the layer read.

        Raises:
            RuntimeError: one was changed in place since.
        """
        if self.stamp is not None:
            self.stamp.expect(self.read)

    def reading(self, read: Operands, v: Tensor | None) -> "Term":
        """The same operation on other operands."""
        stamp = None if self.stamp is None else Stamp.of(self.stamp.layer, read)
        return replace(self, read=read, v=v, stamp=stamp)

    @property
    def operands(self) -> dict[str, Tensor]:
        """What diagrams over the operation read.

        Raises:
            RuntimeError: it was changed in place since.
        """
        self.expect_unchanged()
        return dict(self.read) | ({} if self.v is None else {"grad_output": self.v})

    def values(
        self,
        statistics: Sequence[Statistic],
        memory_limit: int | None = None,
        given: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> list[Tensor]:
        """The value of each statistic; ``given`` are operands that their diagrams add."""
        how = self.operation, self.operand, self.operands | dict(given), self.vectors
        return values(statistics, *how, memory_limit)
