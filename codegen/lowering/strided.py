"""Strided tensors as expressions: an operation, its inputs and attributes, a shape and strides.

Equal expressions are one object, so that they are compared and looked up in no time, and what is
computed twice is seen to be the same. They have no names: those are given when a program is
printed. Shapes and strides tell the planner which reshapes are free before any tensor exists.
"""

from collections.abc import Hashable, Iterator, Sequence
from math import prod
from threading import RLock
from weakref import ref

from tnconv.codegen.lowering import layouts
from tnconv.codegen.lowering.layouts import Ints
from tnconv.codegen.lowering.operations import Operation, items


class Strided:
    """A tensor that torch will compute, its shape, and its strides for operands laid out as told.

    Make it by `strided` or by the methods below, which are views.
    """

    __slots__ = (
        "__weakref__",
        "_innermost",
        "_reads",
        "_run",
        "attributes",
        "inputs",
        "operation",
        "origin",
        "shape",
        "size",
        "strides",
    )
    operation: Operation
    inputs: "tuple[Strided, ...]"
    attributes: tuple[Hashable, ...]
    shape: Ints
    strides: Ints
    size: int
    origin: "Strided"
    """What this is a view of: itself, if it is computed."""

    def __repr__(self) -> str:
        return f"<{self.operation.name} {self.shape}>"

    def __reduce__(self) -> tuple[object, ...]:
        return strided, (self.operation, self.inputs, self.attributes, self.shape, self.strides)

    def __copy__(self) -> "Strided":
        return self

    def __deepcopy__(self, memo: object) -> "Strided":
        return self

    @property
    def run(self) -> int:
        """The length of the contiguous runs in which a copy of this tensor reads."""
        if self._run is None:
            self._run = layouts.run(self.shape, self.strides)
        return self._run

    @property
    def innermost(self) -> tuple[int, int, int, int]:
        """The inner loops of a copy of this tensor: `layouts.innermost`."""
        if self._innermost is None:
            self._innermost = layouts.innermost(self.shape, self.strides)
        return self._innermost

    _run: int | None
    _innermost: tuple[int, int, int, int] | None
    _reads: "tuple[Strided, ...] | None"

    @property
    def reads(self) -> "tuple[Strided, ...]":
        """What is computed, or given, before this: the inputs without their views, each once."""
        if self._reads is None:
            self._reads = tuple(dict.fromkeys([each.origin for each in self.inputs]))
        return self._reads

    @property
    def views(self) -> "Iterator[Strided]":
        """This tensor and those between it and its `origin`, if it is a view."""
        here = self
        while here.operation.view:
            yield here
            here = here.inputs[0]

    @property
    def is_channels_last(self) -> bool:
        """Whether torch takes it as channels last: `layouts.is_channels_last`."""
        return layouts.is_channels_last(self.shape, self.strides)

    def channels_moved(self, back: bool = False) -> "Strided":
        """With channels, dimension 1, as the last dimension; or ``back`` from there."""
        dims = len(self.shape)
        there = layouts.channels_moved(dims)
        return self.permute((0, dims - 1, *range(1, dims - 1)) if back else there)

    def permute(self, dims: Sequence[int]) -> "Strided":
        order, last = tuple(dims), len(self.shape) - 1
        if order == tuple(range(last + 1)):
            return self
        swaps = order[-2:] == (last, last - 1) and order[:-2] == tuple(range(last - 1))
        if swaps and self.operation is PERMUTE and self.attributes == (order, True):
            return self.inputs[0]
        shape, strides = self.shape, self.strides
        return self._view(
            PERMUTE,
            (order, swaps),
            tuple([shape[dim] for dim in order]),
            tuple([strides[dim] for dim in order]),
        )

    @property
    def mT(self) -> "Strided":
        """With the last two dimensions exchanged."""
        if self.operation is PERMUTE and self.attributes[1]:
            return self.inputs[0]
        (*shape, m, n), (*strides, row, column) = self.shape, self.strides
        order = (*range(len(shape)), len(shape) + 1, len(shape))
        return self._view(PERMUTE, (order, True), (*shape, n, m), (*strides, column, row))

    def free_reshape(self, shape: Sequence[int]) -> "Strided | None":
        """The reshape, if it is a view."""
        whole, shape = self.unshaped, tuple(shape)
        if shape == whole.shape:
            return whole
        strides = layouts.of_a_view(whole.shape, whole.strides, shape)
        return None if strides is None else whole._view(RESHAPE, (shape,), shape, strides)

    @property
    def unshaped(self) -> "Strided":
        """What this is a reshape of, so that reshapes in a row are one."""
        return self.inputs[0] if self.operation is RESHAPE else self

    def narrow(self, dim: int, start: int, count: int, step: int = 1) -> "Strided":
        """``count`` positions of ``dim`` from ``start`` on in steps of ``step`` >= 1."""
        size = self.shape[dim]
        if (start, count, step) == (0, size, 1):
            return self
        return self._at(NARROW, (dim, start, count, step, size), dim, (count,), step)

    def select(self, dim: int, at: int) -> "Strided":
        if self.operation is UNSQUEEZE and self.attributes == (dim,):
            return self.inputs[0]
        return self._at(SELECT, (dim, at), dim, (), 1)

    def unsqueeze(self, dim: int) -> "Strided":
        shape = (*self.shape[:dim], 1, *self.shape[dim:])
        strides = (*self.strides[:dim], 0, *self.strides[dim:])
        return self._view(UNSQUEEZE, (dim,), shape, strides)

    def unfold(self, dim: int, size: int, step: int) -> "Strided":
        """Windows of ``size`` at every ``step``: their number at ``dim``, their entries last."""
        count = (self.shape[dim] - size) // step + 1
        shape = (*self.shape[:dim], count, *self.shape[dim + 1 :], size)
        strides = self.strides
        strides = (*strides[:dim], strides[dim] * step, *strides[dim + 1 :], strides[dim])
        return self._view(UNFOLD, (dim, size, step), shape, strides)

    def diagonal(self, first: int, second: int) -> "Strided":
        """Equal positions of two dimensions of one size, as a new last dimension."""
        assert self.shape[first] == self.shape[second] and first < second
        keep = [d for d in range(len(self.shape)) if d not in (first, second)]
        return self._view(
            DIAGONAL,
            (first, second),
            (*(self.shape[d] for d in keep), self.shape[first]),
            (*(self.strides[d] for d in keep), self.strides[first] + self.strides[second]),
        )

    def expand(self, shape: Sequence[int]) -> "Strided":
        """Repeated along dimensions of size one, and along new ones in front."""
        new = len(shape) - len(self.shape)
        if tuple(shape) == self.shape:
            return self
        pairs = zip(self.shape, shape[new:], self.strides, strict=True)
        strides = (stride if before == after else 0 for before, after, stride in pairs)
        return self._view(EXPAND, (tuple(shape),), tuple(shape), (*(0,) * new, *strides))

    def _at(
        self, operation: Operation, attributes: Ints, dim: int, sizes: Ints, step: int
    ) -> "Strided":
        """A view of some positions, or of one, of a dimension."""
        strides = (self.strides[dim] * step,) if sizes else ()
        return self._view(
            operation,
            attributes,
            self.shape[:dim] + sizes + self.shape[dim + 1 :],
            self.strides[:dim] + strides + self.strides[dim + 1 :],
        )

    def _view(
        self, operation: Operation, attributes: tuple[Hashable, ...], shape: Ints, strides: Ints
    ) -> "Strided":
        return strided(operation, (self,), attributes, shape, strides)


class _Known(ref[Strided]):
    """A weak reference that knows its key: a `WeakValueDictionary` takes twice as long."""

    __slots__ = ("key",)
    key: object


_known: dict[object, _Known] = {}
_lock = RLock()  # a reference may die while its thread holds the lock


def _forget(dead: _Known) -> None:
    with _lock:
        found = _known.pop(dead.key, dead)
        if found is not dead:  # the same expression was made again
            _known[dead.key] = found


def strided(
    operation: Operation,
    inputs: tuple[Strided, ...],
    attributes: tuple[Hashable, ...],
    shape: Ints,
    strides: Ints,
) -> Strided:
    """The one expression of an operation on inputs.

    Args:
        operation: What torch computes.
        inputs: From which tensors.
        attributes: With which numbers.
        shape: The shape of the result.
        strides: The strides of the result.
    """
    key = operation, inputs, attributes, shape, strides
    found = _known.get(key)
    if found is not None and (known := found()) is not None:
        return known
    new = Strided.__new__(Strided)
    new.operation, new.inputs, new.attributes, new.shape, new.strides = key
    new.size, new._run, new._innermost, new._reads = prod(shape), None, None, None
    new.origin = inputs[0].origin if operation.view else new
    reference = _Known(new, _forget)
    reference.key = key
    with _lock:  # several threads may compile
        found = _known.setdefault(key, reference)
        if found is not reference:
            if (known := found()) is not None:
                return known
            _known[key] = reference
    return new


def operand(at: int, shape: Sequence[int], channels_last: bool = False) -> Strided:
    """The operand at a position, contiguous or with channels last."""
    strides = layouts.channels_last(shape) if channels_last else layouts.contiguous(shape)
    return strided(OPERAND, (), (at,), tuple(shape), strides)


def _narrow(x: str, dim: int, start: int, count: int, step: int, size: int) -> str:
    stop = start + step * (count - 1) + 1 if count else start
    skip = f"{':' if step == 1 else f'::{step}'}" if stop == size else ""
    window = f"{start}{skip}" if skip else f"{start}:{stop}" + (f":{step}" if step > 1 else "")
    return f"{x}[{':, ' * dim}{window}]"


OPERAND = Operation("operand", lambda at: f"operand_{at}")
LIKE = strided(Operation("like", lambda: "like"), (), (), (), ())
"""The tensor that gives constants their dtype and device."""
ONE = strided(Operation("one", lambda: "one"), (), (), (), ())
"""The constant 1, as a tensor that depends on all operands."""
PERMUTE = Operation(
    "permute", lambda x, dims, swaps: f"{x}.mT" if swaps else f"{x}.permute({items(dims)})", True
)
RESHAPE = Operation("reshape", lambda x, shape: f"{x}.reshape({items(shape)})", True)
NARROW = Operation("narrow", _narrow, True)
SELECT = Operation("select", lambda x, dim, at: f"{x}.select({dim}, {at})", True)
UNSQUEEZE = Operation("unsqueeze", lambda x, dim: f"{x}.unsqueeze({dim})", True)
UNFOLD = Operation("unfold", lambda x, *numbers: f"{x}.unfold({items(numbers)})", True)
DIAGONAL = Operation(
    "diagonal", lambda x, one, other: f"{x}.diagonal(dim1={one}, dim2={other})", True
)
EXPAND = Operation("expand", lambda x, shape: f"{x}.expand({items(shape)})", True)
