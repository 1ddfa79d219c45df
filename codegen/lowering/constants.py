"""Constant folding: the parts of a program without operands are made once, not at every call."""

import re
from collections.abc import Collection, Iterable, Sequence
from math import prod

from tnconv.codegen.lowering.arrays import Step

LIKE = "like"  # the variable that gives constants their dtype and device
LARGEST = 2**22  # entries: larger constants are not kept
_WORD = re.compile(r"[A-Za-z_]\w*")

PATTERN = '''def pattern(coefficients, sizes, start, stop, step, like):
    """1 where the sum of coefficient * position is in range(start, stop, step), else 0."""
    total = torch.zeros((), dtype=torch.int64, device=like.device)
    for coefficient, size in zip(coefficients, sizes):
        positions = torch.arange(size, device=like.device)
        total = total.unsqueeze(-1) + coefficient * positions
    inside = (total >= start) & (total < stop) & ((total - start) % step == 0)
    return inside.to(like.dtype)
'''
KEPT = '''KEPT = {}


def kept(constants, like):
    """What constants(like) makes, once for each dtype and device; anew where torch is traced."""
    if torch.compiler.is_compiling():
        return constants(like)
    key = constants, like.dtype, like.device
    probe = torch.empty(())
    if type(probe) is not torch.Tensor or probe.is_inference():
        return constants(like)
    if key not in KEPT:
        KEPT[key] = constants(like)
    return KEPT[key]
'''


def constant_steps(steps: Sequence[Step], variables: Collection[str]) -> list[Step]:
    """The steps that depend on none of the variables, nor on steps that do.

    >>> from tnconv.codegen.prices.cost import copy
    >>> codes = {"t1": "f(like)", "t2": "t1 * x"}
    >>> steps = [Step(name, code, (2,), copy(2, 2)) for name, code in codes.items()]
    >>> [step.name for step in constant_steps(steps, ["x"])]
    ['t1']
    """
    changing = {*variables, "one"}
    found = []
    for step in steps:
        if changing.isdisjoint(words(step.code)) and prod(step.shape) <= LARGEST:
            found.append(step)
        else:
            changing.add(step.name)
    return found


def wanted(constants: Iterable[Step], codes: Iterable[str]) -> list[str]:
    """The names of the constants that occur in any of the codes."""
    used = {word for code in codes for word in words(code)}
    return [step.name for step in constants if step.name in used]


def words(code: str) -> list[str]:
    """The names in an expression."""
    return _WORD.findall(code)
