"""Emission: the source of a schedule, readable Python that needs torch alone."""

import keyword
import re
from collections.abc import Collection, Iterable, Sequence

from tnconv.codegen.schedule import Schedule

PATTERN = '''def pattern(coefficients, sizes, start, stop, step, like):
    """1 where the sum of coefficient * position is in range(start, stop, step), else 0."""
    total = torch.zeros((), dtype=torch.int64, device=like.device)
    for coefficient, size in zip(coefficients, sizes):
        total = total.unsqueeze(-1) + coefficient * torch.arange(size, device=like.device)
    inside = (total >= start) & (total < stop) & ((total - start) % step == 0)
    return inside.to(like.dtype)
'''
_RESERVED = re.compile(
    r"torch|F|pattern|one|contraction|(result|part|piece)(_\d+)?|[tu]\d+|operand_\d+"
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
    header = "import torch\nimport torch.nn.functional as F\n"
    helpers = [PATTERN] if any("pattern(" in text for text in functions) else []
    return "\n\n".join([header, *helpers, *functions])


def definition(
    name: str,
    arguments: Sequence[str],
    indices: Collection[str],
    schedule: Schedule,
    several: bool,
    spare: int,
) -> str:
    """A function of the arguments, some of them integers, that runs the steps for the outputs.

    Results are deleted as soon as more than ``spare`` bytes would be held for nothing.
    """
    values = [name for name in arguments if name not in indices]
    body = one(values) if _needs_one(schedule) else []
    releases = schedule.releases(spare)
    for at, step in enumerate(schedule.steps):
        if at in releases:
            body.append(f"del {', '.join(releases[at])}")
        line = f"{step.name} = {step.code}"
        body.append(f"{line}  # {step.comment}" if step.comment else line)
    results = ", ".join(output.code for output in schedule.outputs)
    body.append(f"return ({results},)" if several else f"return {results}")
    return function(name, arguments, body)


def function(name: str, arguments: Sequence[str], body: Sequence[str]) -> str:
    """The text of a function."""
    lines = "".join(f"    {line}\n" for line in body)
    return f"def {name}({', '.join(arguments)}):\n{lines}"


def one(arguments: Sequence[str]) -> list[str]:
    """The constant 1, plus sums over nothing: gradients of constants are zeros, as in torch."""
    if not arguments:
        return ["one = torch.ones(())"]
    return [f"one = 1 + {' + '.join(f'{name}.reshape(-1)[:0].sum()' for name in arguments)}"]


def _needs_one(schedule: Schedule) -> bool:
    """Whether a plan has no nodes, so that its value comes from the constant 1."""
    codes = [*(step.code for step in schedule.steps), *(o.code for o in schedule.outputs)]
    return any(re.search(r"\bone\b", code) for code in codes)
