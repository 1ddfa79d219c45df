"""Emission: the source of a schedule, readable Python that needs torch alone."""

import keyword
import re
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from textwrap import wrap

from tnconv.codegen.lowering.arrays import Step
from tnconv.codegen.lowering.constants import KEPT, LIKE, PATTERN, constant_steps, wanted, words
from tnconv.codegen.lowering.overlaps import OVERLAP_ADD
from tnconv.codegen.lowering.pairs import GRAM
from tnconv.codegen.lowering.schedule import Schedule
from tnconv.codegen.programs.fusion import TOTALS

WIDTH, INDENT = 100, " " * 4
IMPORTS = {
    "itertools": "import itertools\n",
    "torch": "import torch",
    "F": "import torch.nn.functional as F",
}
HELPERS = {
    "pattern": PATTERN,
    "kept": KEPT,
    "totals": TOTALS,
    "gram": GRAM,
    "overlap_add": OVERLAP_ADD,
}
_WITHIN_FACTORS = re.compile(r"(?<!·) ")
_RESERVED = re.compile(
    r"torch|F|pattern|KEPT|kept|totals|gram|overlap_add|itertools|like|one|contraction|(contraction|piece_\d+)_constants|(result|part|piece)(_\d+)?|[tu]\d+|operand_\d+"
)


def argument_names(operands: Iterable[str]) -> dict[str, str]:
    """A variable for each operand: its name, unless Python or the program needs that."""
    return {
        name: f"operand_{at}"
        if keyword.iskeyword(name) or not name.isidentifier() or _RESERVED.fullmatch(name)
        else name
        for at, name in enumerate(operands)
    }


def module(functions: Sequence[str]) -> str:
    """The text of a module with these functions."""
    used = {word for function in functions for word in words(function)}
    helpers = [text for name, text in HELPERS.items() if name in used]
    used |= {word for helper in helpers for word in words(helper)}
    imports = [f"{line}\n" for name, line in IMPORTS.items() if name in used]
    return "\n\n".join([*filter(None, ["".join(imports)]), *helpers, *functions])


def documented(about: Sequence[str], text: str) -> str:
    """The text of a module, with a docstring of these lines."""
    lines = [part for line in about for part in _wrapped(line)]
    docstring = "\n".join(lines).replace("\\", r"\\").replace('"', r"\"")
    gap = "\n\n" if text.startswith("def") else "\n"
    return f'"""{docstring}\n"""\n{gap}{text}'


def _wrapped(line: str) -> list[str]:
    """Lines that end between factors; where factors are long, anywhere between words."""
    broken = partial(wrap, width=WIDTH - 4, break_long_words=False, break_on_hyphens=False)
    factors = broken(_WITHIN_FACTORS.sub("\0", line))
    lines = [part for factor in factors for part in broken(factor.replace("\0", " "))]
    return [" " * 4 * (at > 0) + part for at, part in enumerate(lines)] or [""]


def definition(
    name: str,
    arguments: Sequence[str],
    indices: Collection[str],
    schedule: Schedule,
    several: bool,
    spare: int,
) -> list[str]:
    """A function of the arguments, some of them integers, and one of its constants.

    Results are deleted as soon as more than ``spare`` bytes would be held for nothing. Without any
    bytes to spare nothing is kept for the next call.
    """
    made_once = constants(schedule, arguments, spare)
    steps = [step for step in schedule.steps if step not in made_once]
    codes = [*(step.code for step in steps), *(output.code for output in schedule.outputs)]
    names = wanted(made_once, codes)
    values = [argument for argument in arguments if argument not in indices]
    body = _beginning(values, [*codes, *(LIKE for _ in names[:1])])
    texts = []
    if names:
        lines = [*map(_line, made_once), f"return {_tuple(names)}"]
        texts.append(function(f"{name}_constants", [LIKE], lines))
        body.append(f"{_tuple(names)} = kept({name}_constants, {LIKE})")
    releases = schedule.releases(spare)
    for at, step in enumerate(schedule.steps):
        if dead := [old for old in releases.get(at, ()) if old in {s.name for s in steps}]:
            body.append(f"del {', '.join(dead)}")
        if step in steps:
            body.append(_line(step))
    body.append(returned([output.code for output in schedule.outputs], several))
    return [*texts, function(name, arguments, body)]


def constants(schedule: Schedule, arguments: Iterable[str], spare: int) -> list[Step]:
    """The steps whose results are kept for later calls."""
    return constant_steps(schedule.steps, list(arguments)) if spare else []


def returned(results: Sequence[str], several: bool) -> str:
    """The last line of a function: one result, or a tuple of them."""
    return f"return {_tuple(results)}" if several else f"return {results[0]}"


def _line(step: Step) -> str:
    """A step, with its comment behind it or, if it is long, above."""
    line = f"{step.name} = {step.code}"
    if not step.comment:
        return line
    beside = f"{line}  # {step.comment}"
    short = "\n" not in line and len(INDENT + beside) <= WIDTH
    return beside if short else f"# {step.comment}\n{INDENT}{line}"


def _tuple(names: Sequence[str]) -> str:
    return f"({names[0]},)" if len(names) == 1 else ", ".join(names)


def _beginning(values: Sequence[str], codes: Sequence[str]) -> list[str]:
    """The constant 1 and the tensor that constants are like, if they are asked for."""
    used = {word for code in codes for word in words(code)}
    like = [f"{LIKE} = {values[0] if values else 'one'}"] if LIKE in used else []
    return [*(one(values) if "one" in used or (like and not values) else ()), *like]


def function(name: str, arguments: Sequence[str], body: Sequence[str]) -> str:
    """The text of a function."""
    lines = [f"def {name}({', '.join(arguments)}):", *(INDENT + line for line in body), ""]
    return "\n".join(lines)


def formatted(text: str) -> str:
    """A module as formatters of Python lay it out."""
    import black  # takes a while, which programs that nobody reads need not wait for

    return black.format_str(text, mode=black.Mode(line_length=WIDTH))


def one(arguments: Sequence[str]) -> list[str]:
    """The constant 1, plus sums over nothing: gradients of constants are zeros, as in torch."""
    if not arguments:
        return ["one = torch.ones(())"]
    return [f"one = 1 + {' + '.join(f'{name}.reshape(-1)[:0].sum()' for name in arguments)}"]
