"""Names: what operands, results and the variables of loops are called when they are printed."""

import keyword
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from unicodedata import normalize

from tnconv.codegen.lowering.operations import Operation, helpers
from tnconv.codegen.lowering.strided import OPERAND, Strided
from tnconv.codegen.lowering.turns import ADDED_TOGETHER, Turns
from tnconv.codegen.lowering.writer import Step

FIXED = frozenset(
    {
        *("torch", "F", "itertools", "like", "one", "KEPT", "patch_gram"),
        *("contraction", "contraction_constants", "result", "part", "piece"),
    }
)
"""Names in programs that operands cannot have, beside those of helper functions."""
NUMBERED = ("t", "u", "operand_", "result_", "part_", "piece_")
"""Prefixes of numbered names, likewise."""


def argument_names(operands: Iterable[str]) -> dict[str, str]:
    """A variable for each operand: its name, unless Python or the program needs that.

    >>> argument_names(["x", "lambda", "t1", "total"])
    {'x': 'x', 'lambda': 'operand_1', 't1': 'operand_2', 'total': 'total'}
    """
    return {name: name if _is_free(name) else f"operand_{at}" for at, name in enumerate(operands)}


def _is_free(name: str) -> bool:
    """Whether a variable can have this name, which Python normalizes to no other."""
    fine = name.isidentifier() and not keyword.iskeyword(name) and normalize("NFKC", name) == name
    plain = name.removesuffix("_constants").rstrip("0123456789")
    return fine and name not in FIXED | helpers() and (plain == name or plain not in NUMBERED)


@dataclass(frozen=True)
class Names:
    """The texts of expressions, by the names of operands and of the results that have one."""

    arguments: Sequence[str]
    given: Mapping[Strided, str] = field(default_factory=dict)

    @classmethod
    def of(cls, arguments: Sequence[str], steps: Iterable[Step]) -> "Names":
        """Results are numbered in their order."""
        return cls(arguments, {step.value: f"t{at}" for at, step in enumerate(steps, 1)})

    def text(self, array: Strided) -> str:
        """The name of a result, or what it is a view of, and how."""
        return self.given.get(array) or self.call(array)

    def call(self, array: Strided) -> str:
        """How it is computed."""
        if array.operation is OPERAND:
            (at,) = array.attributes
            assert isinstance(at, int)
            return self.arguments[at]
        match array.attributes:
            case (Turns() as turns,):
                return array.operation.call(self._clauses(turns, array.operation))
        return array.operation.call(*map(self.text, array.inputs), *array.attributes)

    def _clauses(self, turns: Turns, operation: Operation) -> str:
        """A loop as a generator: its outputs, the parts of arrays, and its steps.

        Where several are added together, products are not computed, but added as such.
        """
        pairs = turns.products if operation is ADDED_TOGETHER else ()
        parts = self._numbered("part_", turns.parts)
        steps = self._numbered("u", [s.value for s in turns.steps if s.value not in pairs])
        inside = Names(self.arguments, {**self.given, **parts, **steps})
        wholes = [self.call(part) for part in parts]
        over = wholes[0] if len(wholes) == 1 else f"zip({', '.join(wholes)})"
        texts = [
            f"({', '.join(map(inside.text, each.inputs))})" if each in pairs else inside.text(each)
            for each in turns.outputs
        ]
        outputs = ", ".join(texts)
        return " ".join(
            [
                f"[{outputs}]" if operation is ADDED_TOGETHER else outputs,
                f"for {', '.join(parts.values())} in {over}",
                *(f"for {name} in [{inside.call(value)}]" for value, name in steps.items()),
            ]
        )

    def _numbered(self, prefix: str, arrays: Sequence[Strided]) -> dict[Strided, str]:
        """Names that count on from those of the loops around."""
        used = [name for name in self.given.values() if name[len(prefix) :].isdigit()]
        first = 1 + sum(name.startswith(prefix) for name in used)
        return {array: f"{prefix}{at}" for at, array in enumerate(arrays, first)}


def operations(arrays: Iterable[Strided]) -> Iterator[Operation]:
    """The operations by which these are computed, with those of the views and loops they read."""
    for array in arrays:
        yield array.operation
        for each in array.inputs:
            while each.operation.view:
                yield each.operation
                each = each.inputs[0]
        for turns in array.attributes:
            if isinstance(turns, Turns):
                yield from operations(step.value for step in turns.steps)
