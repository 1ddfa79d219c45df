"""Einsum style: the same steps, with products and sums as calls of ``torch.einsum``.

The dimensions of every result have labels. Views that permute, split or merge dimensions only move
labels, so that products of rearranged matrices are printed as what they mean; copies that rearrange
are not printed at all.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from math import prod
from string import ascii_letters

from tnconv.codegen.lowering.matrices import SYMMETRIC
from tnconv.codegen.lowering.operations import Operation
from tnconv.codegen.lowering.strided import EXPAND, OPERAND, PERMUTE, RESHAPE, UNSQUEEZE, Strided
from tnconv.codegen.lowering.writer import (
    CONTIGUOUS,
    MATMUL,
    MULTIPLY,
    RESHAPED,
    SCALE,
    SUM,
    Step,
)
from tnconv.codegen.programs.names import Names, operations
from tnconv.codegen.programs.source import Definition, Function, commented

Label = int
Labels = tuple[Label, ...]
EINSUM = Operation(
    "einsum",
    lambda *given: f'torch.einsum("{given[-1]}", {", ".join(given[:-1])})',
    imports=("torch",),
)


@dataclass(frozen=True)
class Labelled:
    """An array as what a variable holds, with its dimensions merged and in another order.

    Args:
        text: The variable.
        labels: A label for each dimension of the variable.
        dims: For each dimension of the array the labels that are merged there, outermost first:
            none where it has one position, or repeats what the variable holds.
    """

    text: str
    labels: Labels
    dims: tuple[Labels, ...]


def printed(definition: Definition) -> list[Function]:
    """The function; nothing is kept for later calls, and nothing deleted."""
    page = _Page(definition.arguments)
    for step in definition.schedule.steps:
        page.print(step)
    results = [page.torch(output) for output in definition.schedule.outputs]
    text, used = definition.function(page.lines, definition.read, results)
    return [Function(text, (*used, *page.used))]


@dataclass
class _Page:
    """The lines so far, and what is known of the results that they have printed."""

    arguments: Sequence[str]
    lines: list[str] = field(default_factory=list)
    used: list[Operation] = field(default_factory=list)
    known: dict[Strided, Labelled] = field(default_factory=dict)
    sizes: dict[Label, int] = field(default_factory=dict)
    number: Iterator[int] = field(default_factory=lambda: count(1))

    def print(self, step: Step) -> None:
        """A line, but for copies that only move labels."""
        value, inputs = step.value, [self.read(array) for array in step.value.inputs]
        copied = value.operation in (RESHAPED, CONTIGUOUS) and not self._repeats(value.inputs[0])
        if copied and (moved := self._regrouped(inputs[0], value.shape)) is not None:
            self.known[value] = moved
            return
        found = self._einsum(value, inputs)
        variable = f"t{next(self.number)}"
        if found is None:
            code, self.known[value] = self._call(value), self._fresh(variable, value.shape)
        else:
            code, result = found
            self.known[value] = replace(result, text=variable)
        self.lines.append(commented(f"{variable} = {code}", step.comment))

    def read(self, array: Strided) -> Labelled:
        """What a variable holds, read as an array."""
        if (known := self.known.get(array)) is not None:
            return known
        if array.operation is RESHAPE and not self._repeats(array.inputs[0]):
            read = self.read(array.inputs[0])
            text = self._reshape(read, array.shape)
            made = self._regrouped(read, array.shape) or self._fresh(text, array.shape)
        elif array.operation.view:
            made = self._viewed(array) or self._fresh(self._call(array), array.shape)
        elif array.operation is OPERAND:
            (at,) = array.attributes
            assert isinstance(at, int)
            made = self._fresh(self.arguments[at], array.shape)
        else:
            made = self._fresh(self._call(array), array.shape)
        self.known[array] = made
        return made

    def torch(self, array: Strided) -> str:
        """The text of an array as a view of the variable, in torch's words."""
        read = self.read(array)
        merged = tuple(self._size(labels) for labels in read.dims)
        text = self._reshape(read, merged)
        return text if merged == array.shape else EXPAND.call(text, array.shape)

    def _reshape(self, read: Labelled, shape: Sequence[int]) -> str:
        """What a variable holds in another order, and then in another shape."""
        order = [label for labels in read.dims for label in labels]
        lost = [label for label in read.labels if label not in order]
        order, text = [*order, *lost], read.text
        if order != [*read.labels]:
            text = PERMUTE.call(text, [read.labels.index(label) for label in order], False)
        held = [self.sizes[label] for label in order]
        return text if held == [*shape] else RESHAPE.call(text, shape)

    def _call(self, value: Strided) -> str:
        """The text of a call in torch's words."""
        self.used += operations([value])
        given = {array: self.torch(array) for array in value.inputs}
        return Names(self.arguments, given).call(value)

    def _fresh(self, text: str, shape: Sequence[int]) -> Labelled:
        labels = tuple(range(len(self.sizes), len(self.sizes) + len(shape)))
        self.sizes.update(zip(labels, shape, strict=True))
        return Labelled(text, labels, tuple((label,) for label in labels))

    def _viewed(self, array: Strided) -> Labelled | None:
        """A view that only moves labels."""
        (whole,), read = array.inputs, self.read(array.inputs[0])
        if array.operation is PERMUTE:
            order = array.attributes[0]
            assert isinstance(order, tuple)
            return replace(read, dims=tuple(read.dims[dim] for dim in order))
        if array.operation is UNSQUEEZE:
            (dim,) = array.attributes
            assert isinstance(dim, int)
            return replace(read, dims=(*read.dims[:dim], (), *read.dims[dim:]))
        if array.operation is EXPAND:
            new = len(array.shape) - len(whole.shape)
            pairs = zip(read.dims, whole.shape, array.shape[new:], strict=True)
            kept = (labels if before == after else () for labels, before, after in pairs)
            return replace(read, dims=(*((),) * new, *kept))
        return None

    def _repeats(self, array: Strided) -> bool:
        """Whether an array has several positions where the variable has one."""
        dims = zip(self.read(array).dims, array.shape, strict=True)
        return any(not labels and size > 1 for labels, size in dims)

    def _regrouped(self, read: Labelled, shape: Sequence[int]) -> Labelled | None:
        """With other dimensions merged, if that splits none of the variable."""
        left = [label for labels in read.dims for label in labels if self.sizes[label] != 1]
        dims: list[Labels] = []
        for size in shape:
            labels: Labels = ()
            while left and self._size(labels) < size:
                labels = (*labels, left.pop(0))
            if self._size(labels) != size:
                return None
            dims.append(labels)
        return None if left else replace(read, dims=tuple(dims))

    def _size(self, labels: Iterable[Label]) -> int:
        return prod(self.sizes[label] for label in labels)

    def _einsum(self, value: Strided, inputs: Sequence[Labelled]) -> tuple[str, Labelled] | None:
        """The call, and what its result holds, if a step is a product or a sum."""
        if value.operation is SCALE:
            (read,) = inputs
            return SCALE.call(read.text, *value.attributes), read
        if value.operation is SUM:
            (read,), (dims,) = inputs, value.attributes
            assert isinstance(dims, tuple)
            kept = tuple(labels for dim, labels in enumerate(read.dims) if dim not in dims)
            return self._called([read], kept)
        if value.operation is SYMMETRIC:
            inputs = [inputs[0], replace(inputs[0], dims=_transposed(inputs[0].dims))]
        if value.operation is MULTIPLY:
            left, right = inputs
            every = [(dim, dim) for dim in range(len(value.shape))]
            joint = self._joined(left, right, every)
            if joint is None:
                return None
            first, second = joint
            pairs = zip(first.dims, second.dims, strict=True)
            return self._called(joint, tuple(one or other for one, other in pairs))
        if value.operation in (MATMUL, SYMMETRIC):
            return self._product(*inputs)
        return None

    def _product(self, left: Labelled, right: Labelled) -> tuple[str, Labelled] | None:
        if len(left.dims) == len(right.dims) == 1:
            joint = self._joined(left, right, [(0, 0)])
            return None if joint is None else self._called(joint, ())
        front = max(len(left.dims), len(right.dims)) - 2
        left, right = (
            replace(x, dims=(*((),) * (front + 2 - len(x.dims)), *x.dims)) for x in (left, right)
        )
        pairs = [*((dim, dim) for dim in range(front)), (front + 1, front)]
        if (joint := self._joined(left, right, pairs)) is None:
            return None
        left, right = joint
        batch = (one or other for one, other in zip(left.dims, right.dims, strict=True))
        dims = [labels for labels, _ in zip(batch, range(front), strict=False)]
        return self._called(joint, (*dims, left.dims[front], right.dims[front + 1]))

    def _joined(
        self, left: Labelled, right: Labelled, pairs: Sequence[tuple[int, int]]
    ) -> tuple[Labelled, Labelled] | None:
        """Both with the labels of the left one in dimensions that are the same, and no others."""
        names: dict[Label, Label] = {}
        for one, other in pairs:
            first, second = (
                [label for label in x.dims[dim] if self.sizes[label] != 1]
                for x, dim in ((left, one), (right, other))
            )
            if first and second:
                if [*map(self.sizes.get, first)] != [*map(self.sizes.get, second)]:
                    return None
                names |= dict(zip(second, first, strict=True))
        for label in right.labels:
            if label not in names:
                names[label] = len(self.sizes)
                self.sizes[names[label]] = self.sizes[label]
        dims = tuple(tuple(names[label] for label in labels) for labels in right.dims)
        return left, Labelled(right.text, tuple(names[label] for label in right.labels), dims)

    def _called(
        self, factors: Sequence[Labelled], dims: tuple[Labels, ...]
    ) -> tuple[str, Labelled] | None:
        result = tuple(label for labels in dims for label in labels)
        labels = dict.fromkeys(label for x in factors for label in x.labels)
        if len(labels) > len(ascii_letters):
            return None
        letters = dict(zip(labels, ascii_letters, strict=False))
        sides = ["".join(letters[label] for label in x.labels) for x in factors]
        equation = f"{','.join(sides)}->{''.join(letters[label] for label in result)}"
        self.used.append(EINSUM)
        return EINSUM.call(*(x.text for x in factors), equation), Labelled("", result, dims)


def _transposed(dims: tuple[Labels, ...]) -> tuple[Labels, ...]:
    return (*dims[:-2], dims[-1], dims[-2])
