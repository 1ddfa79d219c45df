"""Tables of coefficients: one for each device, number of threads and dtype."""

import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from math import inf
from typing import Any, TypeVar

from tnconv.codegen.prices.kinds import KINDS, Kind

ITEM = 4  # bytes of an entry in float32
KEPT = 2**14  # answers that a table remembers: a search asks for the same ones over and over
K = TypeVar("K", bound=Kind)
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Machine:
    """Sizes that prices count in. They are facts of a device and its libraries, and not fitted.

    The defaults are those of x86 processors with oneDNN, in float32; see decisions 0006 to 0008.
    """

    entry: int = ITEM  # bytes of an entry of the dtype that the coefficients were measured in
    line: int = 64  # bytes of a cache line
    cached: float = 10 * 2**20  # bytes that stay near a core between two uses
    fresh_from: float = int(os.environ.get("MALLOC_MMAP_THRESHOLD_", 2**25))
    """Bytes from which on a result gets newly mapped pages, as in glibc."""
    aligned: int = 16  # bytes to which GEMM's stores are aligned if rows are
    conflict: int = 2048  # bytes; addresses multiples of it apart share a cache set; 0 if none do
    ways: int = 16  # lines that a cache set holds
    tile: int = 16  # columns of the result that GEMM computes at a time
    lanes: int = 16  # SIMD lanes: output channels of convolutions are rounded up to them ...
    narrow: int = 8  # ... and all other channels to these
    taps: int = 9  # of the largest window with a fast depthwise weight gradient
    largest: int = 256  # taps of the largest window that depthwise kernels are made for
    onednn: bool = True  # whether oneDNN computes convolutions, and its rules apply
    passes: int = 2  # over operands and results of convolutions, to arrange them ...
    grouped_passes: int = 2  # ... and of grouped ones
    units: int = 0  # multiprocessors of an accelerator; 0 for processors
    block: int = 64  # rows and columns of the block of a product that a multiprocessor computes
    overlaps: bool = False  # whether kernels run while the host prepares the next call
    own_kernels: bool = False  # whether kernels of our own run there: see `codegen.kernels`
    workspace: int | None = None  # bytes that any convolution may hold; None: as oneDNN does


X86 = Machine()
ACCELERATOR = Machine(
    cached=32 * 2**20,
    fresh_from=inf,
    aligned=1,
    conflict=0,
    tile=1,
    lanes=8,
    narrow=8,
    onednn=False,
    passes=1,
    grouped_passes=5,
    units=132,
    overlaps=True,
    workspace=32 * 2**20,
)
"""Accelerators in general: allocators keep their pages, and tensor cores take eight channels."""


@dataclass(frozen=True)
class Table:
    """The coefficients by name; one that is missing has the value with which it was declared."""

    values: Mapping[str, float] = field(default_factory=dict)
    machine: Machine = X86
    threads: int = 1
    _kinds: dict[type[Kind], Kind] = field(default_factory=dict, compare=False, repr=False)
    answers: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)
    """What functions that are `remembered` answered by this table."""

    def __getitem__(self, kind: type[K]) -> K:
        """The kind with the coefficients of this table."""
        found: Any = self._kinds.get(kind)
        if found is None:
            found = self._kinds[kind] = self._made(kind)
        known: K = found
        return known

    def _made(self, kind: type[Kind]) -> Kind:
        given: dict[str, Any] = {}
        for one in fields(kind):  # type: ignore[arg-type]  # every kind is a dataclass
            if one.type is Machine:
                given[one.name] = self.machine
            elif one.name == "threads":
                given[one.name] = self.threads
            elif isinstance(one.type, type) and issubclass(one.type, Kind):
                given[one.name] = self[one.type]
            elif (value := self.values.get(f"{kind.__name__}.{one.name}")) is not None:
                given[one.name] = value
        return kind(**given)

    def value(self, name: str) -> float:
        """Of the coefficient ``"Kind.name"``."""
        kind, coefficient = name.split(".")
        return float(getattr(self[KINDS[kind]], coefficient))

    def changed(self, values: Mapping[str, float]) -> "Table":
        """With other values of these coefficients."""
        return replace(self, values={**self.values, **values}, _kinds={}, answers={})


SHIPPED = Table()
"""One thread of an x86 server with torch 2.13, in float32: coefficients as they are declared."""
_in_use: ContextVar[Table] = ContextVar("table", default=SHIPPED)
_entry: ContextVar[int] = ContextVar("entry", default=ITEM)


def in_use() -> Table:
    """The table by which kernels are priced here."""
    return _in_use.get()


def bytes_per_entry() -> int:
    """Of the tensors that a program is compiled for: what kernels hold is counted in them."""
    return _entry.get()


@contextmanager
def using(table: Table, entry: int = ITEM) -> Iterator[None]:
    """Price kernels by this table, for entries of so many bytes, in this thread and context."""
    tokens = _in_use.set(table), _entry.set(entry)
    try:
        yield
    finally:
        _in_use.reset(tokens[0])
        _entry.reset(tokens[1])


def remembered(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """A decorator: the answers for hashable arguments are kept with the table in use."""

    @wraps(function)
    def answer(*arguments: Hashable) -> Answer:
        answers, key = _in_use.get().answers, (function, _entry.get(), arguments)
        found: Any = answers.get(key, answers)
        if found is answers:
            if len(answers) >= KEPT:
                answers.clear()
            found = answers[key] = function(*arguments)
        known: Answer = found
        return known

    return answer
