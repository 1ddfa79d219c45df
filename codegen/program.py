"""Programs: the steps of a network's cheapest plan, their source, and running it."""

import keyword
import linecache
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import torch
from torch import Tensor as Array

from tnconv.codegen.arrays import Step
from tnconv.codegen.contraction import path_flops
from tnconv.codegen.planner import Plan
from tnconv.diagrams.expression import Expression
from tnconv.simplify import Firing

PATTERN_SOURCE = '''
def pattern(coefficients, sizes, start, stop, step, like):
    """1 where the sum of coefficient * position is in range(start, stop, step), else 0."""
    total = torch.zeros((), dtype=torch.int64, device=like.device)
    for coefficient, size in zip(coefficients, sizes):
        total = total.unsqueeze(-1) + coefficient * torch.arange(size, device=like.device)
    inside = (total >= start) & (total < stop) & ((total - start) % step == 0)
    return inside.to(like.dtype)

'''
_RESERVED = re.compile(r"torch|F|pattern|one|[tu]\d+|part_\d+|s\d+_t\d+|operand_\d+")
_numbers = count(1)
_AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(device)
)


@dataclass(frozen=True)
class Program:
    """A compiled network: call it with operands by name, read its ``source``, let it ``explain``.

    ``terms`` holds the plans that were considered for each term of a sum, the chosen one first.
    """

    network: Expression
    terms: tuple[tuple[Plan, ...], ...]
    firings: tuple[Firing, ...]

    @property
    def operands(self) -> dict[str, tuple[int, ...]]:
        """The shape of each operand."""
        return self.network.operands

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps of all terms."""
        return tuple(step for term in self.terms for step in term[0].steps)

    @cached_property
    def source(self) -> str:
        """Python that needs torch alone: a function ``contraction`` of the operands."""
        arguments = list(argument_names(self.network).values())
        body: list[str] = []
        if not arguments:
            body.append("one = torch.ones(())")
        elif self._needs_one:
            # Sums over nothing, so that gradients of a constant result are zeros, as in torch.
            empty = " + ".join(f"{name}.reshape(-1)[:0].sum()" for name in arguments)
            body.append(f"one = 1 + {empty}")
        results = []
        for number, (plan, *_) in enumerate(self.terms):
            rename = _renamed(plan.steps, f"s{number}_" if len(self.terms) > 1 else "")
            for step in plan.steps:
                line = f"{rename(step.name)} = {rename(step.code)}"
                body.append(f"{line}  # {step.comment}" if step.comment else line)
            results.append(rename(plan.output.code))
        body.append(f"return {' + '.join(results)}")
        signature = f"def contraction({', '.join(arguments)}):"
        header = "import torch\nimport torch.nn.functional as F\n"
        helper = PATTERN_SOURCE if any("pattern(" in step.code for step in self.steps) else ""
        lines = "\n".join(f"    {line}" for line in body)
        return f"{header}\n{helper}\n{signature}\n{lines}\n"

    @property
    def _needs_one(self) -> bool:
        """Whether a term has no nodes, so that its value comes from the constant 1."""
        codes = [code for plan, *_ in self.terms for code in (plan.output.code, *plan.codes)]
        return any(re.search(r"\bone\b", code) for code in codes)

    @cached_property
    def function(self) -> Callable[..., Array]:
        """The compiled source, a function of the operands by position."""
        file = f"<tnconv program {next(_numbers)}>"
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(True), file)
        namespace: dict[str, Callable[..., Array]] = {}
        exec(compile(self.source, file, "exec"), namespace)
        return namespace["contraction"]

    def __call__(self, **operands: Array) -> Array:
        """Run on tensors of the operands' shapes, one dtype and one device.

        Under autocast all operands are cast to its dtype, as torch's own convolutions do.

        Raises:
            ValueError: an operand is missing, unknown, or of another shape, dtype or device.
            TypeError: an operand is not a tensor.
        """
        if operands.keys() != self.operands.keys():
            check(self.operands, operands)
        return self.run(*[operands[name] for name in self.operands])

    def run(self, *given: Array) -> Array:
        """As calling, with the operands by position, in the order of `operands`."""
        first = given[0] if given else None
        if not self._fit(given):
            check(self.operands, dict(zip(self.operands, given, strict=True)))
        if first is not None and _autocasts(first):
            dtype = torch.get_autocast_dtype(first.device.type)
            return self.function(*[array.to(dtype) for array in given])
        if first is not None and first.dtype.is_complex and self.has_native_kernels:
            return self.for_complex.function(*given)
        return self.function(*given)

    def _fit(self, given: Sequence[Array]) -> bool:
        """Whether operands are as they should be: quick, without saying why not."""
        if not all(isinstance(array, Array) for array in given):
            return False
        if [array.shape for array in given] != self._shapes:
            return False
        return len({(array.dtype, array.device) for array in given}) <= 1

    @cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        return list(self.operands.values())

    @cached_property
    def has_native_kernels(self) -> bool:
        """Whether a step is one of torch's convolution kernels."""
        return any("conv" in step.code for step in self.steps)

    @cached_property
    def for_complex(self) -> "Program":
        """The program without native convolutions, which torch has for real dtypes only."""
        from tnconv.codegen.compiler import compile

        return compile(self.network, routes=("window", "taps", "dense"))

    def __reduce__(self) -> tuple[object, ...]:
        return Program, (self.network, self.terms, self.firings)

    def explain(self) -> str:
        """What was compiled and how: network, rules, plan, steps with costs, alternatives."""
        parts = [f"network\n  {self.network}".replace("\n", "\n  "), "rules that fired"]
        parts += [f"  {firing}; {_saved(firing)}" for firing in self.firings] or ["  none"]
        for plan, *others in self.terms:
            parts.append(f"plan, from the network {plan.label}")
            parts += [_row(step) for step in plan.steps]
            parts.append(f"  predicted time {plan.seconds * 1e6:,.0f} us")
            if others:
                parts.append("alternatives")
                parts += [f"  {other.seconds * 1e6:>9,.0f} us  {other.label}" for other in others]
        return "\n".join([*parts, "source", *(f"  {line}" for line in self.source.splitlines())])


def check(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Array]) -> None:
    """Raise unless ``given`` are tensors of the expected names and shapes, one dtype and device.

    Raises:
        ValueError: an operand is missing, unknown, or of another shape, dtype or device.
        TypeError: an operand is not a tensor.
    """
    from tnconv.diagrams.reference import check_operands

    check_operands(expected, given)
    first: tuple[str, Array] | None = None
    for name, array in given.items():
        first = first or (name, array)
        if array.device != first[1].device:
            raise ValueError(
                f"operand {name!r} is on {array.device} and {first[0]!r} on {first[1].device}; "
                "expected one device"
            )
        if array.dtype != first[1].dtype and not _autocasts(array):
            raise ValueError(
                f"operand {name!r} has dtype {array.dtype} and {first[0]!r} {first[1].dtype}; "
                "expected one dtype"
            )


def _autocasts(array: Array) -> bool:
    device = array.device.type
    return device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def argument_names(network: Expression) -> dict[str, str]:
    """A variable for each operand: its name, unless Python or the program needs that."""
    return {
        name: f"operand_{at}"
        if keyword.iskeyword(name) or not name.isidentifier() or _RESERVED.fullmatch(name)
        else name
        for at, name in enumerate(network.operands)
    }


def _renamed(steps: Sequence[Step], prefix: str) -> Callable[[str], str]:
    """Put a prefix before the names of steps, so that the terms of a sum do not clash."""
    names = {step.name for step in steps}

    def rename(code: str) -> str:
        if not prefix:
            return code
        return re.sub(r"\bt\d+\b", lambda m: prefix + m[0] if m[0] in names else m[0], code)

    return rename


def _saved(firing: Firing) -> str:
    """The flops of the best path before and after, which are searched for only to be printed."""
    before, after = path_flops(firing.before), path_flops(firing.after)
    return f"{before:,} to {after:,} flop" if before != after else f"{after:,} flop"


def _row(step: Step) -> str:
    kernel = step.kernel
    return (
        f"  {step.name:>4} {kernel.kind:<16} {step.shape!s:<24} {kernel.flops:>14,} flop "
        f"{kernel.bytes:>12,} B {kernel.seconds * 1e6:>9,.1f} us  {step.comment}"
    )
