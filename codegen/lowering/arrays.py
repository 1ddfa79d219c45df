"""Strided arrays that stand for the tensors of a program, and the writer that records its steps.

An `Array` is a torch expression with the shape and strides that it will have, so that the planner
knows which reshapes are free before any tensor exists.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from math import prod

from tnconv.codegen.prices import cost
from tnconv.codegen.prices.cost import Kernel


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(prod(shape[at + 1 :]) for at in range(len(shape)))


@dataclass(frozen=True)
class Array:
    """A torch expression and the shape and strides of its value (for contiguous operands).

    ``unshaped`` is the array of which this one is a reshape, so that reshapes in a row are one;
    ``whole`` the one of which the last dimension is read in steps, from the position beside it on.
    """

    code: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    unshaped: "Array | None" = field(default=None, compare=False)
    whole: "tuple[Array, int] | None" = field(default=None, compare=False)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def run(self) -> int:
        """The length of the contiguous runs in which a copy of this array reads."""
        length = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != length:
                return length
            length *= size
        return length

    @property
    def innermost(self) -> tuple[int, int, int, int]:
        """The inner loops of a copy of this array: entries of a row, their step, and rows.

        And how many entries are read in turn that conflict in caches.
        """
        loops: list[tuple[int, int]] = []
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1:
                length, step = loops[-1] if loops else (1, stride)
                if stride == length * step:
                    loops[-1:] = [(length * size, step)]
                else:
                    loops.append((size, stride))
        (row, step), (rows, _) = (*loops, (1, 1), (1, 1))[:2]
        competing = takewhile(lambda loop: cost.conflicts(loop[1]), loops)
        return row, step, rows, prod(size for size, _ in competing)

    def laid_out_as(self, *operands: "Array") -> "Array":
        """Of what torch computes entry by entry, from operands that broadcast, the strides.

        Torch takes the dimensions from the last on, and exchanges each with those before it that
        lie further out: so it keeps the order of a single operand.
        """
        order = list(reversed(range(len(self.shape))))  # innermost first
        for last in range(1, len(order)):
            here = last
            for before in reversed(range(last)):
                further = self._further_out(order[before], order[here], operands)
                if further is None:
                    continue
                if not further:
                    break
                order[before], order[here] = order[here], order[before]
                here = before
        order.reverse()
        strides = dict(zip(order, contiguous([self.shape[dim] for dim in order]), strict=True))
        return replace(self, strides=tuple(strides[dim] for dim in range(len(order))))

    def _further_out(self, dim: int, other: int, operands: Sequence["Array"]) -> bool | None:
        """Whether the first operand that has both dimensions has ``dim`` outside, if one has."""
        for strides in (operand.strides for operand in operands):
            if strides[dim] and strides[other] and strides[dim] != strides[other]:
                return strides[dim] > strides[other]
            if strides[dim] and strides[other] and self.shape[dim] > self.shape[other]:
                return True
        return None

    def permute(self, dims: Sequence[int]) -> "Array":
        if list(dims) == list(range(len(self.shape))):
            return self
        if len(dims) > 1 and list(dims) == [*range(len(dims) - 2), len(dims) - 1, len(dims) - 2]:
            code = self.code.removesuffix(".mT") if self.code.endswith(".mT") else f"{self.code}.mT"
        else:
            code = f"{self.code}.permute({_items(dims)})"
        shape, strides = (tuple(which[d] for d in dims) for which in (self.shape, self.strides))
        return Array(code, shape, strides)

    def free_reshape(self, shape: Sequence[int]) -> "Array | None":
        """The reshape, if it is a view."""
        origin = self.unshaped or self
        if tuple(shape) == origin.shape:
            return origin
        strides = _view_strides(self.shape, self.strides, tuple(shape))
        if strides is None:
            return None
        return Array(f"{origin.code}.reshape({_items(shape)})", tuple(shape), strides, origin)

    def narrow(self, dim: int, start: int, count: int, step: int = 1) -> "Array":
        """``count`` positions of ``dim`` from ``start`` on in steps of ``step`` >= 1."""
        if (start, count, step) == (0, self.shape[dim], 1):
            return self
        stop = start + step * (count - 1) + 1 if count else start
        skip = f"{':' if step == 1 else f'::{step}'}" if stop == self.shape[dim] else ""
        window = f"{start}{skip}" if skip else f"{start}:{stop}" + (f":{step}" if step > 1 else "")
        code = f"{self.code}[{':, ' * dim}{window}]"
        part = self._with(code, dim, (count,), (self.strides[dim] * step,))
        steps = step > 1 and dim == len(self.shape) - 1 and self.strides[dim] == 1
        return replace(part, whole=(self, start)) if steps else part

    def select(self, dim: int, at: int) -> "Array":
        return self._with(f"{self.code}.select({dim}, {at})", dim, (), ())

    def unsqueeze(self, dim: int) -> "Array":
        shape = (*self.shape[:dim], 1, *self.shape[dim:])
        strides = (*self.strides[:dim], 0, *self.strides[dim:])
        return Array(f"{self.code}.unsqueeze({dim})", shape, strides)

    def unfold(self, dim: int, size: int, step: int) -> "Array":
        """Windows of ``size`` at every ``step``: their number at ``dim``, their entries last."""
        count = (self.shape[dim] - size) // step + 1
        array = self._with(
            f"{self.code}.unfold({dim}, {size}, {step})", dim, (count,), (self.strides[dim] * step,)
        )
        strides = (*array.strides, self.strides[dim])
        return replace(array, shape=(*array.shape, size), strides=strides)

    def diagonal(self, first: int, second: int) -> "Array":
        """Equal positions of two dimensions of one size, as a new last dimension."""
        assert self.shape[first] == self.shape[second] and first < second
        keep = [d for d in range(len(self.shape)) if d not in (first, second)]
        return Array(
            f"{self.code}.diagonal(dim1={first}, dim2={second})",
            (*(self.shape[d] for d in keep), self.shape[first]),
            (*(self.strides[d] for d in keep), self.strides[first] + self.strides[second]),
        )

    def expand(self, shape: Sequence[int]) -> "Array":
        if tuple(shape) == self.shape:
            return self
        pairs = zip(self.shape, shape, self.strides, strict=True)
        strides = tuple(stride if old == new else 0 for old, new, stride in pairs)
        return Array(f"{self.code}.expand({_items(shape)})", tuple(shape), strides)

    def _with(
        self, code: str, dim: int, sizes: tuple[int, ...], strides: tuple[int, ...]
    ) -> "Array":
        return Array(
            code,
            self.shape[:dim] + sizes + self.shape[dim + 1 :],
            self.strides[:dim] + strides + self.strides[dim + 1 :],
        )


@dataclass(frozen=True)
class Turns:
    """What a loop adds up: ``output``, after ``steps``, for each of ``count`` parts ``over``."""

    over: str
    count: int
    steps: tuple["Step", ...]
    output: str

    @property
    def body(self) -> list[str]:
        """The clauses of the loop's generator."""
        return [self.over, *(f"for {step.name} in [{step.code}]" for step in self.steps)]

    def renamed(self, rename: Callable[[str], str]) -> "Turns":
        """With other names in all of its code."""
        steps = tuple(replace(step, code=rename(step.code)) for step in self.steps)
        return Turns(rename(self.over), self.count, steps, rename(self.output))


@dataclass(frozen=True)
class Step:
    """One line of a program: ``name = code``, what it costs, and what it is.

    Sums of loops say what their ``turns`` do, so that loops over the same parts can be one.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    kernel: Kernel
    comment: str = ""
    turns: Turns | None = None


@dataclass(frozen=True)
class Writer:
    """The steps written so far. Equal expressions are one step, so mirrored halves run once."""

    steps: tuple[Step, ...] = ()
    letter: str = "t"  # of the names of results
    seen: dict[str, int] = field(default_factory=dict, compare=False, repr=False)
    """Where a writer of this family has a step with this code: shared, and checked when used."""

    @property
    def seconds(self) -> float:
        return sum(step.kernel.seconds for step in self.steps)

    def run(
        self,
        code: str,
        shape: Sequence[int],
        kernel: Kernel,
        comment: str = "",
        turns: Turns | None = None,
    ) -> tuple["Writer", Array]:
        """Record ``code``, whose value is a contiguous tensor of ``shape``."""
        if (same := self._written(code)) is not None:
            return self, Array(same.name, same.shape, contiguous(same.shape))
        self.seen[code] = len(self.steps)
        name = f"{self.letter}{len(self.steps) + 1}"
        step = Step(name, code, tuple(shape), kernel, comment, turns)
        writer = Writer((*self.steps, step), self.letter, self.seen)
        return writer, Array(name, step.shape, contiguous(shape))

    def _written(self, code: str) -> Step | None:
        """The step with this code; steps are searched only if another writer has it elsewhere."""
        if (at := self.seen.get(code)) is None:
            return None
        if at < len(self.steps) and self.steps[at].code == code:
            return self.steps[at]
        return next((step for step in self.steps if step.code == code), None)

    def reshape(self, array: Array, shape: Sequence[int]) -> tuple["Writer", Array]:
        """Reshape as a view where strides allow, else by a copy."""
        if (view := array.free_reshape(shape)) is not None:
            return self, view
        code = f"{(array.unshaped or array).code}.reshape({_items(shape)})"
        return self.run(code, shape, cost.copy(array.size, *array.innermost), "copy in a new order")

    def pad(self, array: Array, pads: Sequence[tuple[int, int]]) -> tuple["Writer", Array]:
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
        return self.run(f"F.pad({array.code}, ({_items(flat)}))", shape, kernel, "zero padding")

    def flip(self, array: Array, dims: Sequence[int]) -> tuple["Writer", Array]:
        """Positions of these dimensions in reverse."""
        dims = [dim for dim in dims if array.shape[dim] > 1]
        if not dims:
            return self, array
        kernel = replace(cost.copy(array.size, *array.innermost), kind="flip")
        code = f"{array.code}.flip({_items(dims)})"
        writer, flipped = self.run(code, array.shape, kernel, "flip")
        return writer, flipped.laid_out_as(array)

    def sum(self, array: Array, dims: Sequence[int]) -> tuple["Writer", Array]:
        """Sum over dimensions: together, or where none alone is contiguous, one by one.

        Then the dimension of the largest stride is first: what is between stays a contiguous run.
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
        where = dims[0] if len(dims) == 1 else tuple(dims)
        return self.run(f"{array.code}.sum({where})", shape, kernel, "sum")

    @staticmethod
    def _together(shape: Sequence[int], dims: Sequence[int]) -> int:
        """Entries of the last dimensions that are all summed, or all kept."""
        last = len(shape) - 1
        alike = takewhile(lambda dim: (dim in dims) == (last in dims), range(last, -1, -1))
        return prod(shape[dim] for dim in alike)

    def _sum_outermost(self, array: Array, dims: Sequence[int]) -> tuple["Writer", Array]:
        """One dimension first, of what is between steps as well if that is cheaper."""
        ways = [self._one_by_one(array, dims)]
        first, last = max(dims, key=lambda dim: array.strides[dim]), len(array.shape) - 1
        if array.whole is not None and first != last:
            whole, start = array.whole
            writer, partial = self.sum(whole, [first])
            partial = partial.narrow(last - 1, start, array.shape[last], array.strides[last])
            ways.append(writer.sum(partial, [dim - (dim > first) for dim in dims if dim != first]))
        return min(ways, key=lambda way: way[0].seconds)

    def _one_by_one(self, array: Array, dims: Sequence[int]) -> tuple["Writer", Array]:
        order = sorted(range(len(array.shape)), key=lambda dim: -array.strides[dim])
        first = max(dims, key=lambda dim: array.strides[dim])
        writer, partial = self.sum(array.permute(order), [order.index(first)])
        left = [dim for dim in order if dim != first]
        straight = sorted(range(len(left)), key=left.__getitem__)
        rest = [dim - (dim > first) for dim in dims if dim != first]
        return writer.sum(partial.permute(straight), rest)


def _items(values: Sequence[int]) -> str:
    if not values:
        return "()"
    return ", ".join(map(str, values)) + ("," if len(values) == 1 else "")


def _loops(shape: Sequence[int], broken: Sequence[bool]) -> tuple[int, int]:
    """The two inner loops, entries of a row and rows, into a tensor of more than ``shape``.

    It is larger in the ``broken`` dimensions, so that they do not merge with those before.
    """
    sizes = [1, 1]
    at = 0
    for size, last in zip(reversed(shape), reversed(broken), strict=True):
        sizes[at] *= size
        at += last
        if at == len(sizes):
            break
    return sizes[0], sizes[1]


def _view_strides(
    shape: tuple[int, ...], strides: tuple[int, ...], new: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The strides of ``reshape(new)`` where it needs no copy."""
    if 0 in shape:
        return contiguous(new)
    chunks: list[tuple[int, int]] = []  # (size, innermost stride) of runs that merge
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if chunks and chunks[-1][1] == size * stride:
            chunks[-1] = (chunks[-1][0] * size, stride)
        else:
            chunks.append((size, stride))
    result: list[int] = []
    left, inner = 1, 1
    for size in reversed(new):
        if size == 1:
            result.append(inner)
            continue
        if left == 1:
            left, inner = chunks.pop()
        if left % size:
            return None
        result.append(inner)
        left, inner = left // size, inner * size
    return tuple(reversed(result))
