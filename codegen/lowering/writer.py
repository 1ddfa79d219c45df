"""Steps: what a program computes one after the other, and the writer that records them."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from math import inf, prod
from typing import Any, TypeVar

from tnconv.codegen.lowering import layouts
from tnconv.codegen.lowering.layouts import Ints
from tnconv.codegen.lowering.operations import Operation, items
from tnconv.codegen.lowering.strided import NARROW, Strided, strided
from tnconv.codegen.prices import cost
from tnconv.codegen.prices.cost import Kernel

RESHAPED = Operation("reshaped", lambda x, shape: f"{x}.reshape({items(shape)})")
CONTIGUOUS = Operation("contiguous", lambda x: f"{x}.contiguous()")
PAD = Operation("pad", lambda x, sides: f"F.pad({x}, ({items(sides)}))", imports=("F",))
FLIP = Operation("flip", lambda x, dims: f"{x}.flip({items(dims)})")
SUM = Operation("sum", lambda x, dims: f"{x}.sum({dims[0] if len(dims) == 1 else dims})")
ADD = Operation("add", lambda x, y: f"{x} + {y}")
SUBTRACT = Operation("subtract", lambda x, y: f"{x} - {y}")
MULTIPLY = Operation("multiply", lambda x, y: f"{x} * {y}")
SCALE = Operation("scale", lambda x, factor: f"{x} * {factor!r}")
MATMUL = Operation("matmul", lambda x, y: f"{x} @ {y}")
STACK = Operation(
    "stack", lambda *xs: f"torch.stack([{', '.join(xs[:-1])}], {xs[-1]})", imports=("torch",)
)
CONCATENATE = Operation(
    "concatenate", lambda *xs: f"torch.cat([{', '.join(xs[:-1])}], {xs[-1]})", imports=("torch",)
)


@dataclass(unsafe_hash=True)  # in place of frozen, which takes three times as long to make
class Step:
    """A tensor that a program computes, what that costs, and a comment for readers."""

    value: Strided
    kernel: Kernel
    comment: str = ""

    @property
    def operation(self) -> Operation:
        return self.value.operation

    @property
    def shape(self) -> Ints:
        return self.value.shape


Choice = tuple[str, Any]
"""The kind of a choice, and what was chosen: enough to choose the same again."""
Choices = tuple[Choice, ...]


@dataclass(unsafe_hash=True)  # in place of frozen, which takes three times as long to make
class Writer:
    """The steps written so far. Equal expressions are one step, so mirrored halves run once.

    ``choices`` are the choices by which these steps were written, in order. A writer with a
    ``script`` repeats the choices of another plan, on tensors of other sizes: alternatives to them
    are neither written nor priced. See decision 0022.
    """

    steps: tuple[Step, ...] = ()
    seen: dict[Strided, int] = field(default_factory=dict, compare=False, repr=False)
    """The index of each value's step, in any writer that continues the same one: a hint."""
    readings: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)
    """What writers that continue the same one have read so far: see `values.read`."""
    choices: Choices = field(default=(), compare=False, repr=False)
    script: Choices = field(default=(), compare=False, repr=False)

    def choosing(self, kind: str, what: Hashable) -> "Writer":
        """With one more choice made."""
        choices = (*self.choices, (kind, what))
        after = Writer(self.steps, self.seen, self.readings, choices, self.script)
        after.seconds = self.seconds
        return after

    def scripted(self, kind: str) -> Any:
        """The script's next choice if it is of this kind, else None, as without a script."""
        here = self.script[len(self.choices) : len(self.choices) + 1]
        return next((what for known, what in here if known == kind), None)

    def deciding(self, kind: str, what: bool) -> tuple["Writer", bool]:
        """Record a decision that depends on sizes: the script's if it has one, else ``what``."""
        given = self.scripted(kind)
        what = what if given is None else given
        return self.choosing(kind, what), what

    @property
    def follows(self) -> bool:
        """Whether all choices are those of the script, if there is one."""
        return not self.script or self.script[: len(self.choices)] == self.choices

    @cached_property
    def seconds(self) -> float:
        return sum(step.kernel.seconds for step in self.steps)

    def run(
        self,
        operation: Operation,
        inputs: Sequence[Strided],
        shape: Sequence[int],
        kernel: Kernel,
        comment: str = "",
        attributes: tuple[Hashable, ...] = (),
        strides: Ints | None = None,
    ) -> tuple["Writer", Strided]:
        """Record a step, unless there is one of this value.

        Args:
            operation: What torch computes.
            inputs: From which tensors.
            shape: The shape of the result.
            kernel: What it costs.
            comment: What it is, for readers.
            attributes: With which numbers.
            strides: The strides of the result, if it is not contiguous.
        """
        strides = layouts.contiguous(shape) if strides is None else strides
        value = strided(operation, tuple(inputs), attributes, tuple(shape), strides)
        return self.with_step(Step(value, kernel, comment)), value

    def with_step(self, step: Step) -> "Writer":
        """With this step, unless there is one of its value."""
        if self.has(step.value):
            return self
        self.seen[step.value] = len(self.steps)
        steps = (*self.steps, step)
        after = Writer(steps, self.seen, self.readings, self.choices, self.script)
        after.seconds = self.seconds + step.kernel.seconds  # bounds ask for it after each step
        return after

    def has(self, value: Strided) -> bool:
        """Whether a step computes the value. All are searched only where the hint is wrong."""
        if (at := self.seen.get(value)) is None:
            return False
        if at < len(self.steps) and self.steps[at].value is value:
            return True
        return any(step.value is value for step in self.steps)

    def reshape(self, array: Strided, shape: Sequence[int]) -> tuple["Writer", Strided]:
        """Reshape as a view where strides allow, else by a copy."""
        if (view := array.free_reshape(shape)) is not None:
            return self, view
        step = copying(array, shape)
        return self.with_step(step), step.value

    def pad(self, array: Strided, pads: Sequence[tuple[int, int]]) -> tuple["Writer", Strided]:
        """Zeros around each dimension (before, after); negative numbers crop."""
        around: list[tuple[int, int]] = []
        for dim, (before, after) in enumerate(pads):
            size = array.shape[dim]
            start = min(max(0, -before), size)
            count = max(0, size + min(0, after) - start)
            length = size + before + after
            array = array.narrow(dim, start, count)
            around.append(
                (before + start, length - before - start - count) if count else (length, 0)
            )
        shape = tuple(
            n + before + after for n, (before, after) in zip(array.shape, around, strict=True)
        )
        if shape == array.shape:
            return self, array
        flat = [side for pair in reversed(around) for side in pair]
        while flat[-2:] == [0, 0]:
            flat = flat[:-2]
        row, step, rows, competing = array.innermost
        within = _loops(array.shape, [pad != (0, 0) for pad in around])
        if array.run == array.size:
            row, rows = within
        both = array.size + prod(shape)  # zeros everywhere, then the array
        kernel = cost.copy(prod(shape), min(row, within[0]), step, rows, competing, both)
        strides = layouts.channels_last(shape) if array.is_channels_last else None
        return self.run(PAD, [array], shape, kernel, "zero padding", (tuple(flat),), strides)

    def flip(self, array: Strided, dims: Sequence[int]) -> tuple["Writer", Strided]:
        """Positions of these dimensions in reverse."""
        dims = tuple(dim for dim in dims if array.shape[dim] > 1)
        if not dims:
            return self, array
        kernel = replace(cost.copy(array.size, *array.innermost), kind="flip")
        strides = layouts.of_entries(array.shape, [array.strides])
        return self.run(FLIP, [array], array.shape, kernel, "flip", (dims,), strides)

    def sum(self, array: Strided, dims: Sequence[int]) -> tuple["Writer", Strided]:
        """Sum over dimensions: in one call, or one after the other where none is contiguous.

        The dimension of the largest stride is then summed first, so that each call reads
        contiguous runs.
        """
        if not dims:
            return self, array
        proper = [dim for dim, size in enumerate(array.shape) if size > 1]
        runs = [array.shape[dim] for dim in dims if dim in proper and array.strides[dim] == 1]
        overlap = runs and any(array.strides[dim] == 1 for dim in proper if dim not in dims)
        if len(dims) > 1 and (overlap or min(array.strides[dim] for dim in dims) > 1):
            return self._sum_outermost(array, dims)
        shape = [size for dim, size in enumerate(array.shape) if dim not in dims]
        row, step, *_ = array.innermost
        row = min(row, *runs) if overlap else min(row, self._together(array.shape, dims))
        outer = len(array.shape) - 1 not in dims
        kernel = cost.reduction(array.size, prod(shape), row, step, outer)
        return self.run(SUM, [array], shape, kernel, "sum", (tuple(dims),))

    @staticmethod
    def _together(shape: Sequence[int], dims: Sequence[int]) -> int:
        """Entries of the last dimensions that are all summed, or all kept."""
        last = len(shape) - 1
        alike = takewhile(lambda dim: (dim in dims) == (last in dims), range(last, -1, -1))
        return prod(shape[dim] for dim in alike)

    def _sum_outermost(self, array: Strided, dims: Sequence[int]) -> tuple["Writer", Strided]:
        """The outermost dimension first; of a strided slice, or of all that it is a slice of.

        The whole is read contiguously, so that summing it can be cheaper than summing the slice.
        """
        first, last = max(dims, key=lambda dim: array.strides[dim]), len(array.shape) - 1
        if (read := _read_in_steps(array)) is None or first == last:
            return self._one_by_one(array, dims)
        whole, start = read

        def between(writer: "Writer") -> tuple["Writer", Strided]:
            writer, partial = writer.sum(whole, [first])
            partial = partial.narrow(last - 1, start, array.shape[last], array.strides[last])
            return writer.sum(partial, [dim - (dim > first) for dim in dims if dim != first])

        def straight(writer: "Writer") -> tuple["Writer", Strided]:
            return writer._one_by_one(array, dims)

        return cheapest("sum", self, [straight, between])

    def _one_by_one(self, array: Strided, dims: Sequence[int]) -> tuple["Writer", Strided]:
        order = sorted(range(len(array.shape)), key=lambda dim: -array.strides[dim])
        first = max(dims, key=lambda dim: array.strides[dim])
        writer, partial = self.sum(array.permute(order), [order.index(first)])
        left = [dim for dim in order if dim != first]
        straight = sorted(range(len(left)), key=left.__getitem__)
        rest = [dim - (dim > first) for dim in dims if dim != first]
        return writer.sum(partial.permute(straight), rest)


Way = TypeVar("Way", bound=tuple[Any, ...] | None)


def cheapest(kind: str, writer: Writer, ways: Sequence[Callable[[Writer], Way]]) -> Way:
    """The result of the way that takes least time, or of the one that a script chooses.

    Each way returns a tuple that begins with the writer after its steps, or None if it does not
    apply.
    """
    given = writer.scripted(kind)
    tried = range(len(ways)) if given is None else range(given, given + 1)
    return min((ways[at](writer.choosing(kind, at)) for at in tried), key=_seconds_of)


def _seconds_of(way: tuple[Any, ...] | None) -> float:
    return inf if way is None else float(way[0].seconds)


def copying(array: Strided, shape: Sequence[int]) -> Step:
    """The step of a reshape that is no view."""
    kernel, shape = cost.copy(array.size, *array.innermost), tuple(shape)
    strides = layouts.contiguous(shape)
    value = strided(RESHAPED, (array.unshaped,), (shape,), shape, strides)
    return Step(value, kernel, "copy in a new order")


def _read_in_steps(array: Strided) -> tuple[Strided, int] | None:
    """For an array whose last dimension is a strided slice: the array sliced, and the start."""
    if array.operation is NARROW:
        dim, start, *_ = array.attributes
        (whole,) = array.inputs
        assert isinstance(start, int)
        if dim == len(array.shape) - 1 and whole.strides[-1] == 1 < array.strides[-1]:
            return whole, start
    return None


def _loops(shape: Sequence[int], broken: Sequence[bool]) -> tuple[int, int]:
    """The lengths of the two innermost loops of a copy into a part of a larger tensor.

    The larger tensor exceeds ``shape`` in the ``broken`` dimensions, which therefore do not merge
    with the dimension before them.
    """
    sizes = [1, 1]
    at = 0
    for size, last in zip(reversed(shape), reversed(broken), strict=True):
        sizes[at] *= size
        at += last
        if at == len(sizes):
            break
    return sizes[0], sizes[1]
