"""Source: a schedule as readable Python that needs torch alone."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from textwrap import wrap

from tnconv.codegen.lowering.constants import constant_steps
from tnconv.codegen.lowering.operations import Operation
from tnconv.codegen.lowering.schedule import Schedule
from tnconv.codegen.lowering.strided import LIKE, ONE, Strided
from tnconv.codegen.lowering.writer import Step
from tnconv.codegen.programs.layout import INDENT, WIDTH
from tnconv.codegen.programs.names import Names, operations
from tnconv.codegen.programs.sizes import varies

IMPORTS = {
    "itertools": "import itertools\n",
    "torch": "import torch",
    "F": "import torch.nn.functional as F",
    "patch_gram": "\nfrom tnconv.codegen.kernels.patch_gram import patch_gram",
}
"""What calls can need: torch, and kernels of our own."""
KEPT_SOURCE = '''KEPT = {}


def kept(constants, like):
    """What constants(like) makes, once for each dtype and device; anew where torch is traced."""
    if torch.compiler.is_compiling():
        return constants(like)
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        return constants(like)  # in the memory of the graph, and not filled before it is replayed
    key = constants, like.dtype, like.device
    probe = torch.empty(())
    if type(probe) is not torch.Tensor or probe.is_inference():
        return constants(like)
    if key not in KEPT:
        KEPT[key] = constants(like)
    return KEPT[key]
'''
KEPT = Operation(
    "kept", lambda made_by: f"kept({made_by}, like)", imports=("torch",), helper=KEPT_SOURCE
)
NEW_ONE = Operation("one", lambda: "torch.ones(())", imports=("torch",))


@dataclass(frozen=True)
class Function:
    """The text of a function, and the operations that it calls."""

    text: str
    operations: tuple[Operation, ...] = ()


def module(functions: Sequence[Function]) -> str:
    """The text of a module with these functions, and with what they need."""
    used = dict.fromkeys(operation for function in functions for operation in function.operations)
    helpers = dict.fromkeys(operation.helper for operation in used if operation.helper)
    needed = {name for operation in used for name in operation.imports}
    imports = [f"{line}\n" for name, line in IMPORTS.items() if name in needed]
    texts = [*helpers, *(function.text for function in functions)]
    return "\n\n".join([*filter(None, ["".join(imports)]), *texts])


def documented(about: Sequence[str], text: str) -> str:
    """The text of a module, with a docstring of these lines."""
    lines = [part for line in about for part in _wrapped(line)]
    docstring = "\n".join(lines).replace("\\", r"\\").replace('"', r"\"")
    gap = "\n\n" if text.startswith("def") else "\n"
    return f'"""{docstring}\n"""\n{gap}{text}'


def _wrapped(line: str) -> list[str]:
    """Lines that end between factors; where factors are long, anywhere between words."""
    broken = partial(wrap, width=WIDTH - 4, break_long_words=False, break_on_hyphens=False)
    factors = broken("· ".join(factor.replace(" ", "\0") for factor in line.split("· ")))
    lines = [part for factor in factors for part in broken(factor.replace("\0", " "))]
    return [" " * 4 * (at > 0) + part for at, part in enumerate(lines)] or [""]


@dataclass(frozen=True)
class Definition:
    """A function to be printed, in any of the `STYLES`.

    Args:
        name: The function's name.
        arguments: The names of its arguments.
        indices: Those of them that are integers.
        schedule: The steps that it runs.
        several: Whether it returns a tuple.
        spare: The bytes that dead results may hold before they are deleted. With none, constants
            are not kept for the next call either.
        size: The line that reads the batch size, if numbers in steps depend on it.
    """

    name: str
    arguments: Sequence[str]
    indices: Collection[str]
    schedule: Schedule
    several: bool
    spare: int
    size: str = ""

    @property
    def read(self) -> set[Strided]:
        """What steps read, and what is returned."""
        read = {array for step in self.schedule.steps for array in step.value.reads}
        return read | {output.origin for output in self.schedule.outputs}

    def function(
        self, body: Sequence[str], read: Collection[Strided], results: Sequence[str]
    ) -> tuple[str, list[Operation]]:
        """The text of the function, from its lines and results, and what its first lines call."""
        values = [argument for argument in self.arguments if argument not in self.indices]
        first, used = _beginning(values, read)
        lines = [*filter(None, [self.size]), *first, *body, returned(results, self.several)]
        return function(self.name, self.arguments, lines), used


def printed(definition: Definition) -> list[Function]:
    """The function as torch calls, and one that makes its constants."""
    schedule, spare = definition.schedule, definition.spare
    names = Names.of(definition.arguments, schedule.steps)
    once = {step.value for step in constants(schedule, spare, bool(definition.size))}
    made_once = [step for step in schedule.steps if step.value in once]
    steps = [step for step in schedule.steps if step.value not in once]
    read = {array for step in steps for array in step.value.reads}
    read |= {output.origin for output in schedule.outputs}
    used, body, functions = [*operations(step.value for step in steps)], [], []
    if kept := [names.text(step.value) for step in made_once if step.value in read]:
        made_by = f"{definition.name}_constants"
        lines = [*(_line(step, names) for step in made_once), f"return {_tuple(kept)}"]
        calls = tuple(operations(step.value for step in made_once))
        functions.append(Function(function(made_by, ["like"], lines), calls))
        body.append(f"{_tuple(kept)} = {KEPT.call(made_by)}")
        used, read = [KEPT, *used], read | {LIKE}
    releases = schedule.releases(spare)
    for at, step in enumerate(schedule.steps):
        if dead := [names.text(x.value) for x in releases.get(at, ()) if x.value not in once]:
            body.append(f"del {', '.join(dead)}")
        if step.value not in once:
            body.append(_line(step, names))
    results = [names.text(output) for output in schedule.outputs]
    text, first = definition.function(body, read, results)
    return [*functions, Function(text, (*first, *used))]


def constants(schedule: Schedule, spare: int, sized: bool = False) -> list[Step]:
    """The steps whose results are kept for later calls; none of them depends on a size."""
    steps = [step for step in schedule.steps if not (sized and varies(step.value))]
    return constant_steps(steps) if spare else []


def returned(results: Sequence[str], several: bool) -> str:
    """The last line of a function: one result, or a tuple of them."""
    return f"return {_tuple(results)}" if several else f"return {results[0]}"


def _line(step: Step, names: Names) -> str:
    return commented(f"{names.text(step.value)} = {names.call(step.value)}", step.comment)


def commented(line: str, comment: str) -> str:
    """A line of a function with a comment behind it or, if it is long, above."""
    if not comment:
        return line
    beside = f"{line}  # {comment}"
    return beside if len(INDENT + beside) <= WIDTH else f"# {comment}\n{INDENT}{line}"


def _tuple(names: Sequence[str]) -> str:
    return f"({names[0]},)" if len(names) == 1 else ", ".join(names)


def _beginning(
    values: Sequence[str], read: Collection[Strided]
) -> tuple[list[str], list[Operation]]:
    """The constant 1 and the tensor that constants are like, if they are read.

    The constant 1 adds sums over nothing: gradients of constants are zeros, as in torch.
    """
    body, used = [], []
    if ONE in read or (LIKE in read and not values):
        sums = " + ".join(f"{name}.reshape(-1)[:0].sum()" for name in values)
        body.append(f"one = 1 + {sums}" if values else f"one = {NEW_ONE.call()}")
        used += [] if values else [NEW_ONE]
    if LIKE in read:
        body.append(f"like = {values[0] if values else 'one'}")
    return body, used


def function(name: str, arguments: Iterable[str], body: Sequence[str]) -> str:
    """The text of a function."""
    lines = [f"def {name}({', '.join(arguments)}):", *(INDENT + line for line in body), ""]
    return "\n".join(lines)
