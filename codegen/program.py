"""Programs: the schedule of the chosen plans, its source, and running it."""

import linecache
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self

import torch
from torch import Tensor as Array
from typing_extensions import TypeVar

from tnconv.codegen import source
from tnconv.codegen.arrays import Step
from tnconv.codegen.joint import scheduled
from tnconv.codegen.planner import Plan
from tnconv.codegen.schedule import Schedule
from tnconv.diagrams.expression import Expression
from tnconv.simplify import Firing

if TYPE_CHECKING:
    from tnconv.codegen.chunks import Chunks

Result = TypeVar("Result", Array, tuple[Array, ...], default=Array)
_numbers = count(1)
SPARE = 2**20  # bytes
_AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(device)
)


@dataclass(frozen=True)
class Program(Generic[Result]):
    """A compiled network: call it with operands by name, read its ``source``, let it ``explain``.

    Of several networks, given as a tuple, the results are a tuple. ``terms`` holds the plans that
    were considered for each term of each network, the chosen one first. ``chunks``, one for each
    network, replace them where memory is limited. Intermediate results are deleted where they would
    raise the peak by more than ``spare_memory`` bytes.
    """

    network: Expression | tuple[Expression, ...]
    terms: tuple[tuple[Plan, ...], ...]
    firings: tuple[Firing, ...]
    chunks: tuple["Chunks", ...] = ()
    spare_memory: int = SPARE

    @property
    def networks(self) -> tuple[Expression, ...]:
        """What was compiled, also where it is one network."""
        return self.network if isinstance(self.network, tuple) else (self.network,)

    @cached_property
    def operands(self) -> dict[str, tuple[int, ...]]:
        """The shape of each operand."""
        return {name: shape for net in self.networks for name, shape in net.operands.items()}

    @cached_property
    def indices(self) -> frozenset[str]:
        """The operands that list positions of legs: int64 tensors."""
        return frozenset[str]().union(*(net.indices for net in self.networks))

    @cached_property
    def schedule(self) -> Schedule:
        """The steps of the chosen plans, equal ones once, and the results."""
        chosen = iter(plans[0] for plans in self.terms)
        return scheduled([[next(chosen) for _ in net.terms] for net in self.networks])

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps of all networks and terms."""
        return self.schedule.steps

    def peak_memory(self, dtype: torch.dtype = torch.float32) -> int:
        """Bytes that a call holds at a time at most, beside its operands and without autograd.

        It is predicted for processors and the precision that the program was compiled for.
        """
        if self.chunks:
            return together([chunk.peak(dtype.itemsize) for chunk in self.chunks])
        arguments = source.argument_names(self.operands).values()
        kept = [x.name for x in source.constants(self.schedule, arguments, self.spare_memory)]
        return self.schedule.held(dtype.itemsize, self.spare_memory, kept)

    @cached_property
    def source(self) -> str:
        """Python that needs torch alone: a function ``contraction`` of the operands."""
        return source.formatted(self.text)

    @cached_property
    def text(self) -> str:
        """The source before it is laid out: what runs."""
        return source.module(self.functions("contraction"))

    def functions(self, name: str) -> list[str]:
        """The texts of the function ``name`` and of those that it calls."""
        arguments = source.argument_names(self.operands)
        several = isinstance(self.network, tuple)
        if not self.chunks:
            names, spare = list(arguments.values()), self.spare_memory
            indices = [arguments[index] for index in self.indices]
            return source.definition(name, names, indices, self.schedule, several, spare)
        from tnconv.codegen.chunks import functions

        return functions(name, self.chunks, arguments, several)

    @cached_property
    def function(self) -> Callable[..., Result]:
        """The compiled source, a function of the operands by position."""
        file = f"<tnconv program {next(_numbers)}>"
        linecache.cache[file] = (len(self.text), None, self.text.splitlines(True), file)
        namespace: dict[str, Callable[..., Result]] = {}
        exec(compile(self.text, file, "exec"), namespace)
        return namespace["contraction"]

    def prepared(self) -> Self:
        """This program, with what the first call would make: ``torch.compile`` can trace it."""
        _ = self.function, self._expected, self._first, self.operands
        return self

    def save(self, path: str | Path) -> Path:
        """Write the source as a module, for use without this library.

        Raises:
            ValueError: the path does not end in ``.py``.
        """
        if (path := Path(path)).suffix != ".py":
            raise ValueError(f"path is {str(path)!r}; expected the name of a Python file, *.py")
        equations: list[str] = [line for net in self.networks for line in str(net).splitlines()]
        shapes: list[str] = [f"{name}: {shape}" for name, shape in self.operands.items()]
        about = ["A contraction.", "", *equations, "", *(shapes or ["No operands."])]
        path.write_text(source.documented(about, self.source), encoding="utf-8")
        return path

    def __call__(self, **operands: Array) -> Result:
        """Run on tensors of the operands' shapes, one dtype (but `indices`) and one device.

        Under autocast operands are cast to its dtype as by torch's own convolutions, which leave
        float64 and complex tensors alone.

        Raises:
            ValueError: an operand is missing, unknown, or of another shape, dtype or device.
            TypeError: an operand is not a tensor.
        """
        try:
            given = [operands[name] for name in self.operands]
        except KeyError:
            given = []
        if len(given) != len(operands):
            check(self.operands, operands, self.indices)
        return self.run(*given)

    def run(self, *given: Array) -> Result:
        """As calling, with the operands by position, in the order of `operands`."""
        expected = self._expected
        if len(given) != len(expected):
            names = ", ".join(self.operands) or "none"
            raise ValueError(f"got {len(given)} operands; expected {len(expected)}: {names}")
        if not given:
            return self.function()
        first = given[self._first]
        if not isinstance(first, Array):
            self._check(given)
        try:  # quick, without saying what does not fit
            dtype, device = first.dtype, first.device
            for array, (shape, own) in zip(given, expected):  # noqa: B905  (strict takes longer)
                if (
                    array.shape != shape
                    or array.dtype != (own or dtype)
                    or (array is not first and array.device != device)
                ):
                    self._check(given)
        except AttributeError:
            self._check(given)
            raise
        if _autocasts(device):
            given = tuple(array.to(_after_autocast(array)) for array in given)
            dtype = given[self._first].dtype
        if dtype.is_complex and self.has_native_kernels:
            return self.for_complex.function(*given)
        return self.function(*given)

    def _check(self, given: Iterable[Array]) -> None:
        check(self.operands, dict(zip(self.operands, given, strict=True)), self.indices)

    @cached_property
    def _expected(self) -> tuple[tuple[torch.Size, torch.dtype | None], ...]:
        """Shapes, and the dtypes of indices."""
        return tuple(
            (torch.Size(shape), torch.int64 if name in self.indices else None)
            for name, shape in self.operands.items()
        )

    @cached_property
    def _first(self) -> int:
        """The position of the operand that gives the dtype."""
        return next((at for at, (_, own) in enumerate(self._expected) if own is None), 0)

    @cached_property
    def has_native_kernels(self) -> bool:
        """Whether a step is one of torch's convolution kernels."""
        return "conv" in self.text.replace("contraction", "")

    @cached_property
    def for_complex(self) -> "Program[Result]":
        """The program without native convolutions, which torch has for real dtypes only."""
        from tnconv.codegen.compiler import compile

        return compile(self.network, dtype=torch.complex64)  # type: ignore[return-value]

    def __reduce__(self) -> tuple[object, ...]:
        fields = self.network, self.terms, self.firings, self.chunks, self.spare_memory
        return _restored, fields

    def explain(self) -> str:
        """What was compiled and how: networks, rules, plans, steps with costs, alternatives."""
        from tnconv.codegen.explanation import explain

        return explain(self)


def _restored(*fields: Any) -> Program[Any]:
    return Program(*fields).prepared()


def together(peaks: list[tuple[int, int]]) -> int:
    """The peak of (peak, result) of parts that run in turn and keep their results."""
    held = most = 0
    for peak, result in peaks:
        most = max(most, held + peak)
        held += result
    return most


def check(
    expected: Mapping[str, tuple[int, ...]],
    given: Mapping[str, Array],
    indices: Collection[str] = (),
) -> None:
    """Raise unless ``given`` are tensors of the expected names and shapes, one dtype and device.

    Those that ``indices`` names are int64.

    Raises:
        ValueError: an operand is missing, unknown, or of another shape, dtype or device.
        TypeError: an operand is not a tensor.
    """
    from tnconv.diagrams.reference import check_operands

    check_operands(expected, given, indices)
    values = [(name, array) for name, array in given.items() if name not in indices]
    first = values[0] if values else next(iter(given.items()), None)
    for name, array in given.items():
        assert first is not None
        if array.device != first[1].device:
            raise ValueError(
                f"operand {name!r} is on {array.device} and {first[0]!r} on {first[1].device}; "
                "expected one device"
            )
        if name not in indices and _after_autocast(array) != _after_autocast(first[1]):
            raise ValueError(
                f"operand {name!r} has dtype {array.dtype} and {first[0]!r} {first[1].dtype}; "
                "expected one dtype"
            )


@lru_cache(maxsize=64)
def _autocast_device(device: torch.device) -> str | None:
    return device.type if device.type in _AUTOCAST_DEVICES else None


def _autocasts(device: torch.device) -> bool:
    name = _autocast_device(device)
    return name is not None and torch.is_autocast_enabled(name)


def _after_autocast(array: Array) -> torch.dtype:
    """The dtype in which torch's own convolutions would take a tensor, here and now."""
    cast = array.is_floating_point() and array.dtype != torch.float64
    if cast and _autocasts(array.device):
        return torch.get_autocast_dtype(array.device.type)
    return array.dtype
