"""Constant folding: the parts of a program without operands are made once, not at every call."""

from collections.abc import Sequence

from tnconv.codegen.lowering.strided import LIKE
from tnconv.codegen.lowering.writer import Step

LARGEST = 2**22  # entries: larger constants are made at each call, lest a program hold much memory


def constant_steps(steps: Sequence[Step]) -> list[Step]:
    """The steps that depend on no operand, nor on steps that do.

    >>> from tnconv.codegen.lowering.writer import ADD, SCALE, Writer
    >>> from tnconv.codegen.lowering.strided import operand
    >>> from tnconv.codegen.prices.cost import copy
    >>> writer, three = Writer().run(SCALE, [LIKE], (), copy(1, 1), "three", (3.0,))
    >>> writer, _ = writer.run(ADD, [operand(0, ()), three], (), copy(1, 1), "x + 3")
    >>> [step.comment for step in constant_steps(writer.steps)]
    ['three']
    """
    known, found = {LIKE}, []
    for step in steps:
        if known.issuperset(step.value.reads) and step.value.size <= LARGEST:
            known.add(step.value)
            found.append(step)
    return found
