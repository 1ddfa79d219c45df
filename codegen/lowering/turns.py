"""Loops: steps that run once for each of the parts of some arrays, and what they add up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tnconv.codegen.lowering.operations import Operation
from tnconv.codegen.lowering.strided import Strided
from tnconv.codegen.lowering.writer import MULTIPLY, Step
from tnconv.codegen.prices import cost

TOTALS = '''def totals(rows):
    """The sum of each column of rows; of pairs their products."""
    sums = None
    for row in rows:
        if sums is None:
            sums = [new[0] * new[1] if type(new) is tuple else new for new in row]
        else:
            sums = [
                torch.addcmul(old, *new) if type(new) is tuple else old + new
                for old, new in zip(sums, row)
            ]
    return sums
'''


def _call(function: str) -> Callable[..., str]:
    return lambda *given: f"{function}({given[-1]})"


PART = Operation("part", lambda x, dim: f"{x}.split(1{f', {dim}' if dim else ''})")
"""The part of an array at the position of a loop along a dimension."""
ADDED = Operation("sum of turns", _call("sum"))
JOINED = Operation("turns", lambda *given: f"torch.cat([{given[-1]}])", imports=("torch",))
ADDED_TOGETHER = Operation("totals", _call("totals"), imports=("torch",), helper=TOTALS)
PICKED = Operation("sum", lambda sums, at: f"{sums}[{at}]")
FREE = cost.Kernel("part of a loop", 0, 0, 0.0)


@dataclass(frozen=True)
class Turns:
    """For each position, ``parts`` of some arrays, ``steps`` on them, and their ``outputs``."""

    parts: tuple[Strided, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Strided, ...]

    @property
    def count(self) -> int:
        """How many there are."""
        (whole,), (dim,) = self.parts[0].inputs, self.parts[0].attributes
        assert isinstance(dim, int)
        return whole.shape[dim]

    @property
    def products(self) -> tuple[Strided, ...]:
        """Outputs that are products of two values of their shape, and that no step reads."""
        read = {array for step in self.steps for array in step.value.reads}
        return tuple(
            step.value
            for step in self.steps
            if step.operation is MULTIPLY and step.value in self.outputs and step.value not in read
            if all(factor.shape == step.shape for factor in step.value.inputs)
        )

    @property
    def reads(self) -> tuple[Strided, ...]:
        """The arrays that are split, and what else the steps read from outside of the loop."""
        own = {*self.parts, *(step.value for step in self.steps)}
        read = [array for step in self.steps for array in step.value.reads]
        read += [output.origin for output in self.outputs]
        wholes = [part.inputs[0] for part in self.parts]
        return (*wholes, *dict.fromkeys(array for array in read if array not in own))


def turns_of(loop: Strided) -> Turns:
    """What a loop does."""
    (turns,) = loop.attributes
    assert isinstance(turns, Turns)
    return turns


def held(steps: Sequence[Step], added: int) -> int:
    """The most bytes that a loop holds, where the last step of a turn makes ``added`` entries.

    The values of the turn before are replaced one by one, so that both are held for a while.
    """
    sizes = [cost.bytes_per_entry() * step.value.size for step in steps]
    new = [size + step.kernel.scratch for size, step in zip(sizes, steps, strict=True)]
    return sum(sizes) + max([*new, cost.bytes_per_entry() * added])
