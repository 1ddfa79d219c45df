"""Programs: the schedule of the chosen plans, its source, and running it."""

import linecache
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import count
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, overload

import torch
from torch import Tensor
from typing_extensions import TypeVar

from tnconv.codegen.lowering.plans import Plan
from tnconv.codegen.lowering.schedule import ITEMS, Schedule
from tnconv.codegen.lowering.writer import Step
from tnconv.codegen.prices import cost
from tnconv.codegen.prices.halves import HALVES, are_slow
from tnconv.codegen.programs import source
from tnconv.codegen.programs.batches import Batches
from tnconv.codegen.programs.checks import after_autocast, by_name, by_position
from tnconv.codegen.programs.contraction_trees import path_and_info, tree
from tnconv.codegen.programs.joint import scheduled
from tnconv.codegen.programs.layout import laid_out
from tnconv.codegen.programs.names import argument_names, operations
from tnconv.codegen.programs.pieces import Chunks, functions_of_chunks
from tnconv.codegen.programs.source import Definition, Function
from tnconv.codegen.programs.styles import STYLES
from tnconv.diagrams.expression import Expression
from tnconv.diagrams.network import TensorNetwork
from tnconv.simplify import Firing

if TYPE_CHECKING:
    import cotengra
    import opt_einsum

    from tnconv.diagrams.drawing import Picture

Result = TypeVar("Result", Tensor, tuple[Tensor, ...], default=Tensor)
_numbers = count(1)
MADE = (
    *("operands", "indices", "schedule", "text", "source", "function"),
    *("_by_position", "_by_name", "_complex_sizes"),
)
"""What programs have in common that differ in the size alone for which they are priced."""
SPARE = 2**20  # bytes by which results that are no longer needed may raise the peak (0023)


@dataclass(frozen=True, repr=False)
class Program(Generic[Result]):
    """A compiled network: call it with operands by name, read its ``source``, let it ``explain``.

    Args:
        network: The network; of a tuple of several, results are a tuple.
        terms: For each term of each network the plans that were considered, the chosen one first.
        firings: The rules that simplified the networks.
        chunks: One for each network, in the place of plans, where memory is limited.
        spare_memory: The bytes by which results that are no longer needed may raise the peak.
        services: What the compiler does for a program.
        style: How steps are printed: one of `STYLES`.
        batches: How the program runs at other sizes of a leg, if it does. Everything else that a
            program tells about itself holds for the sizes of its network.
        channels_last: The operands in this memory format for which the program was planned.
    """

    network: Expression | tuple[Expression, ...]
    terms: tuple[tuple[Plan, ...], ...]
    firings: tuple[Firing, ...]
    chunks: "tuple[Chunks[Program[Any]], ...]" = ()
    spare_memory: int = SPARE
    services: "Services | None" = field(default=None, compare=False, repr=False)
    style: str = "torch"
    batches: Batches | None = None
    channels_last: tuple[str, ...] = ()

    @property
    def networks(self) -> tuple[Expression, ...]:
        """The networks that were compiled, as a tuple also where there is one."""
        return self.network if isinstance(self.network, tuple) else (self.network,)

    @cached_property
    def operands(self) -> dict[str, tuple[int, ...]]:
        """The shape of each operand."""
        return {name: shape for net in self.networks for name, shape in net.operands.items()}

    @property
    def positions(self) -> dict[str, int]:
        """The position of each operand in a call."""
        return {name: at for at, name in enumerate(self.operands)}

    @cached_property
    def indices(self) -> frozenset[str]:
        """The operands that list positions of legs: int64 tensors."""
        return frozenset[str]().union(*(net.indices for net in self.networks))

    @cached_property
    def schedule(self) -> Schedule:
        """The steps of the chosen plans, equal ones once, and the results."""
        chosen = iter(plans[0] for plans in self.terms)
        return scheduled([[next(chosen) for _ in net.terms] for net in self.networks])

    def taking(self, choice: Sequence[Plan]) -> Self:
        """This program by one chosen plan of each term, which then comes first in ``terms``."""

        def first(plan: Plan, plans: tuple[Plan, ...]) -> tuple[Plan, ...]:
            return (plan, *(other for other in plans if other is not plan))

        return replace(self, terms=tuple(map(first, choice, self.terms)))

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps of all networks and terms."""
        return self.schedule.steps

    @property
    def seconds(self) -> float:
        """The predicted time of a call."""
        if self.chunks:
            return sum(chunk.seconds for chunk in self.chunks)
        seconds = self.schedule.seconds
        if self.batches is None or self.batches.asked is None:
            return seconds
        own, asked = map(self.batches.price, (self.batches.own, self.batches.asked))
        if not own.seconds:  # views alone
            return asked.seconds
        return seconds * asked.seconds / own.seconds

    def peak_memory(self, dtype: torch.dtype = torch.float32) -> int:
        """Bytes that a call holds at a time at most, beside its operands and without autograd.

        It is predicted for processors and the precision that the program was compiled for.
        """
        if self.chunks:
            return together([chunk.peak(dtype.itemsize) for chunk in self.chunks])
        wide, batches, operands = dtype in self._slow_halves, self.batches, self.operands
        item = cost.ITEM if wide else dtype.itemsize
        if batches is None or batches.asked is None:
            held = self.held(item)
        else:
            held = batches.price(batches.asked).held[ITEMS.index(item)]
            operands = batches.shapes_at(batches.asked)
        return held + (cost.ITEM * sum(map(prod, operands.values())) if wide else 0)

    def held(self, item: int) -> int:
        """Bytes of results and scratch space that a call holds at most, for entries of ``item``."""
        spare = self.spare_memory
        kept = source.constants(self.schedule, spare) if self.style == "torch" else []
        return self.schedule.held(item, spare, kept)

    def priced_at(self, size: int) -> Self:
        """This program with the price of another size that it serves: it shares the functions."""
        assert self.batches is not None
        priced = replace(self, batches=replace(self.batches, asked=size))
        _ = self._complex_sizes  # which grow, and are the same for all
        known = {name: self.__dict__[name] for name in MADE if name in self.__dict__}
        priced.__dict__.update(known)
        return priced

    @cached_property
    def source(self) -> str:
        """Python that needs torch alone: a function ``contraction`` of the operands."""
        return laid_out(self.text)

    @cached_property
    def text(self) -> str:
        """The source that runs, before its long lines are broken."""
        return source.module(self.functions("contraction"))

    def functions(self, name: str) -> list[Function]:
        """The function ``name`` and those that it calls."""
        arguments = argument_names(self.operands)
        several = isinstance(self.network, tuple)
        if not self.chunks:
            names, spare = list(arguments.values()), self.spare_memory
            indices = [arguments[index] for index in self.indices]
            schedule, size = self.schedule, ""
            if self.batches is not None:
                schedule, size = self.batches.schedule, self.batches.line(arguments)
            definition = Definition(name, names, indices, schedule, several, spare, size)
            return STYLES[self.style](definition)
        return functions_of_chunks(name, self.chunks, arguments, several)

    @cached_property
    def function(self) -> Callable[..., Result]:
        """The compiled source, a function of the operands by position."""
        file = f"<tnconv program {next(_numbers)}>"
        linecache.cache[file] = (len(self.text), None, self.text.splitlines(True), file)
        namespace: dict[str, Callable[..., Result]] = {}
        exec(compile(self.text, file, "exec"), namespace)
        return namespace["contraction"]

    def prepared(self) -> Self:
        """This program, ready to run, so that ``torch.compile`` meets no code generation in it."""
        _ = self._by_name
        return self

    def save(self, path: str | Path) -> Path:
        """Write the source as a module, for use without this library, unless it calls our kernel.

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

    def __call__(self, /, *given: Tensor, **operands: Tensor) -> Result:
        """Run on tensors of the operands' shapes, one dtype (but `indices`) and one device.

        Operands go by name, or by position in the order of `operands`.

        Under autocast operands are cast to its dtype as by torch's own convolutions, which leave
        float64 and complex tensors alone.

        Raises:
            ValueError: an operand is missing, unknown, or of another shape, dtype or device.
            TypeError: an operand is not a tensor.
        """
        return self._by_name(self, self._named(given, operands) if given else operands)

    def _named(self, given: tuple[Tensor, ...], operands: dict[str, Tensor]) -> dict[str, Tensor]:
        names = list(self.operands)
        if len(given) > len(names):
            raise ValueError(
                f"got {len(given)} operands by position; expected at most {len(names)}: "
                f"{', '.join(names) or 'none'}"
            )
        found = dict(zip(names, given, strict=False))
        if twice := found.keys() & operands.keys():
            raise ValueError(f"operand {min(twice)!r} is given twice, by position and by name")
        return found | operands

    def run(self, *given: Tensor) -> Result:
        """As calling, with the operands by position, in the order of `operands`."""
        if len(given) != len(self.operands):
            names = ", ".join(self.operands) or "none"
            raise ValueError(f"got {len(given)} operands; expected {len(self.operands)}: {names}")
        return self._by_position(self, *given)

    @cached_property
    def on(self) -> Callable[..., Result]:
        """As `run`, for callers who know how many operands there are: 0.2 microseconds less."""
        return partial(self._by_position, self)

    def run_cast(self, *given: Tensor) -> Result:
        """The result on operands that were checked, where their dtype needs attention.

        Under autocast they are cast. Complex operands take a program without native convolutions.
        Numbers of sixteen bits are computed in float32 and rounded once where sums that are scaled
        afterwards might leave the range of float16 (decision 0012), where a step needs more
        precision, and on processors that compute them slowly (decision 0025).
        """
        cast = [array.to(after_autocast(array)) for array in given]
        if any(self._is_widened(array) for array in cast):
            return self._wide(cast)
        if self.has_native_kernels and any(array.is_complex() for array in cast):
            return self._for_complex(cast)
        return self.function(*cast)

    def _is_widened(self, array: Tensor) -> bool:
        if array.dtype not in HALVES:
            return False
        if self._needs_precision or (self.scales and array.dtype == torch.float16):
            return True
        return array.is_cpu and array.dtype in self._slow_halves

    @cached_property
    def _needs_precision(self) -> bool:
        """Whether a step is too coarse in sixteen bits."""
        if self.chunks:
            return any(part._needs_precision for chunk in self.chunks for part in chunk.parts)
        return any(each.precise for each in operations(step.value for step in self.steps))

    @cached_property
    def _slow_halves(self) -> tuple[torch.dtype, ...]:
        """What is computed in float32 on processors, unless memory is limited."""
        return tuple(filter(are_slow, HALVES)) if self.spare_memory else ()

    def _wide(self, given: Sequence[Tensor]) -> Result:
        half = next(array.dtype for array in given if array.dtype in HALVES)
        wide = [array.float() if array.dtype is half else array for array in given]
        if torch._C._is_any_autocast_enabled():
            with torch.autocast(given[0].device.type, enabled=False):
                found: Any = self.function(*wide)
        else:
            found = self.function(*wide)
        if isinstance(self.network, tuple):
            return tuple(each.to(half) for each in found)  # type: ignore[return-value]
        result: Result = found.to(half)
        return result

    @cached_property
    def scales(self) -> bool:
        """Whether a scale below one follows the sums, as in means."""
        return any(0 < abs(term.scale) < 1 for net in self.networks for term in net.terms)

    @cached_property
    def _by_position(self) -> Callable[..., Result]:
        casts = {"is_complex()": self.has_native_kernels, "dtype is float16": self.scales}
        casts |= {"dtype.itemsize == 2 and {}.is_cpu": bool(self._slow_halves)}
        casts |= {"dtype.itemsize == 2": self._needs_precision}
        where = [question for question, asked in casts.items() if asked]
        return by_position(self.function, self.operands, self.indices, where, self.batches)

    @cached_property
    def _by_name(self) -> Callable[..., Result]:
        return by_name(self._by_position, self.operands, self.indices, self.batches)

    @cached_property
    def has_native_kernels(self) -> bool:
        """Whether a step is one of torch's convolution kernels."""
        if self.chunks:
            return any(part.has_native_kernels for chunk in self.chunks for part in chunk.parts)
        return any(each.native for each in operations(step.value for step in self.steps))

    @cached_property
    def for_complex(self) -> "Program[Result]":
        """The program without native convolutions, which torch has for real dtypes only."""
        program: Program[Result] = self._compiler.compile(self.network, dtype=torch.complex64)
        return program

    def _for_complex(self, given: Sequence[Tensor]) -> Result:
        """The result of `for_complex`, or of its counterpart for the size of these operands."""
        if self.batches is None:
            return self.for_complex.function(*given)
        size = self.batches.size_of([array.shape for array in given])
        if (own := self._complex_sizes.get(size)) is None:
            networks = self.batches.networks(self.networks, size)
            network = networks if isinstance(self.network, tuple) else networks[0]
            own = self._compiler.compile(network, dtype=torch.complex64)
            self._complex_sizes[size] = own
        return own.function(*given)

    @cached_property
    def _complex_sizes(self) -> "dict[int, Program[Result]]":
        return {}

    @property
    def path(self) -> "tuple[list[tuple[int, ...]], opt_einsum.PathInfo]":
        """The contraction path of the network as an einsum, and what opt_einsum tells of it.

        The network is simplified and its patterns are dense tensors, as in einsum style; programs
        of torch's style replace some of these contractions by kernels that know patterns. The
        summary counts the flops of all indices at once (``naive_cost``) and along the path
        (``opt_cost``), and the entries of the ``largest_intermediate`` result.

        >>> from tnconv import compile
        >>> path, info = compile("ab,bc,cd->ad", (8, 3), (3, 9), (9, 2)).path
        >>> path, int(info.naive_cost), int(info.opt_cost), int(info.largest_intermediate)
        ([(1, 2), (0, 1)], 1296, 204, 16)

        Raises:
            ValueError: the program is one of several networks, or of a sum of them.
        """
        return path_and_info(self._only("path"))

    @property
    def tree(self) -> "cotengra.ContractionTree":
        """The `path` as a tree of cotengra, for its plots and costs.

        Raises:
            ValueError: the program is one of several networks, or of a sum of them.
        """
        return tree(self._only("tree"))

    def _only(self, asked: str) -> TensorNetwork:
        terms = [term for net in self.networks for term in net.terms]
        if len(terms) != 1:
            raise ValueError(
                f"the {asked} of a program is that of one network, and this one has {len(terms)}; "
                "compile each of its terms by itself"
            )
        return terms[0]

    def __repr__(self) -> str:
        operands = ", ".join(f"{name} {shape}" for name, shape in self.operands.items())
        steps = "in chunks" if self.chunks else f"{len(self.steps)} steps"
        return f"<Program of {operands or 'no operands'}: {steps}; print its source or explain()>"

    @overload
    def draw(self, path: None = None, **options: Any) -> "Picture": ...
    @overload
    def draw(self, path: str | Path, **options: Any) -> Path: ...
    def draw(self, path: str | Path | None = None, **options: Any) -> "Path | Picture":
        """The steps as a tree, with the kernel, flops and bytes of each: written, or returned.

        Formats and options are those of `tnconv.diagrams.drawing.draw`.

        Raises:
            ValueError: the program runs in chunks, another suffix, or options that do not fit.
        """
        from tnconv.codegen.programs.pictures import picture
        from tnconv.diagrams.look import Style

        drawn = picture(self, Style(**options))
        return drawn if path is None else drawn.save(path)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """What a notebook shows: one line, and the tree where something can draw it."""
        if self.chunks:
            return {"text/plain": repr(self)}
        return self.draw()._repr_mimebundle_()

    def explain(self) -> str:
        """What was compiled and how: networks, rules, plans, steps with costs, alternatives."""
        return self._compiler.explain(self)

    @property
    def _compiler(self) -> "Services":
        if self.services is None:
            raise ValueError("services is None; expected those of the compiler, as in its programs")
        return self.services

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, tuple(getattr(self, each.name) for each in fields(self))


@dataclass(frozen=True)
class Services:
    """What the compiler does for a program, which does not know the compiler."""

    compile: Callable[..., Program[Any]]
    explain: Callable[[Program[Any]], str]


def _restored(*values: Any) -> Program[Any]:
    return Program(*values).prepared()


def together(peaks: list[tuple[int, int]]) -> int:
    """The peak of (peak, result) of parts that run in turn and keep their results."""
    held = most = 0
    for peak, result in peaks:
        most = max(most, held + peak)
        held += result
    return most
