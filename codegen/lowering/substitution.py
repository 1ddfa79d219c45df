"""Substitution: values in the place of others, in whatever is computed from these."""

from collections.abc import Mapping
from dataclasses import replace

from tnconv.codegen.lowering.strided import Strided, strided
from tnconv.codegen.lowering.turns import PART, Turns

Names = Mapping[Strided, Strided]


def substituted(value: Strided, names: Names) -> Strided:
    """A value with whatever it is, or is a view of, replaced by what ``names`` maps that to.

    >>> from tnconv.codegen.lowering.strided import operand
    >>> x, y = operand(0, (2, 3)), operand(1, (2, 3))
    >>> substituted(x.mT, {x: y}) is y.mT
    True
    """
    if (other := names.get(value)) is not None:
        return substituted(other, names)
    if value.operation.view or value.operation is PART:
        (before,) = value.inputs
        after = substituted(before, names)
        return value if after is before else _on(value, (after,), value.attributes)
    return value


def recomputed(value: Strided, names: Names) -> Strided:
    """The same operation on substituted inputs; the steps inside of a loop likewise."""
    inputs = tuple(substituted(each, names) for each in value.inputs)
    if inputs == value.inputs:
        return value
    attributes = (_turned(x, names) if isinstance(x, Turns) else x for x in value.attributes)
    return _on(value, inputs, tuple(attributes))


def _turned(turns: Turns, names: Names) -> Turns:
    inside, steps = dict(names), []
    for step in turns.steps:
        steps.append(replace(step, value=recomputed(step.value, inside)))
        if steps[-1].value is not step.value:
            inside[step.value] = steps[-1].value
    parts = tuple(substituted(part, inside) for part in turns.parts)
    return Turns(parts, tuple(steps), tuple(substituted(x, inside) for x in turns.outputs))


def _on(value: Strided, inputs: tuple[Strided, ...], attributes: tuple[object, ...]) -> Strided:
    return strided(value.operation, inputs, attributes, value.shape, value.strides)
