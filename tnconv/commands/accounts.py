"""Accounts of programs: what was compiled, how, and what it takes, as text and as JSON."""

import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tnconv.codegen import compile
from tnconv.codegen.prices import timing
from tnconv.codegen.programs.program import Program
from tnconv.commands.contestants import Way
from tnconv.diagrams import Expression
from tnconv.simplify import Simplified, simplify

BUDGET = 0.3  # seconds that a comparison of times takes
NO_WAYS: Mapping[str, Way] = MappingProxyType({})


@dataclass(frozen=True)
class Account:
    """A network under a title, its program, and seconds by contestant, if they were measured."""

    title: str
    network: Expression
    program: Program
    seconds: dict[str, float]

    @property
    def simplified(self) -> Simplified:
        return simplify(self.network)

    @property
    def text(self) -> str:
        measured = [f"  {name}: {1e6 * s:,.0f} us" for name, s in self.seconds.items()]
        lines = ["measured, on operands of float32", *measured] if measured else []
        return "\n".join([self.program.explain(), *lines])

    @property
    def json(self) -> dict[str, Any]:
        """Everything as numbers, texts and lists."""
        steps = [
            {
                "kernel": step.kernel.kind,
                "shape": list(step.shape),
                "flops": step.kernel.flops,
                "bytes": step.kernel.bytes,
                "predicted_seconds": step.kernel.seconds,
                "comment": step.comment,
            }
            for step in (() if self.program.chunks else self.program.steps)
        ]
        return {
            "title": self.title,
            "equation": str(self.network),
            "operands": {name: list(shape) for name, shape in self.network.operands.items()},
            "shape": list(self.network.shape),
            "simplified": str(self.simplified.views),
            "rules": [str(firing) for firing in self.program.firings],
            "steps": steps,
            "predicted_seconds": sum(step["predicted_seconds"] for step in steps),
            "peak_bytes": self.program.peak_memory(),
            "source": self.program.source,
            "measured_seconds": self.seconds,
        }


def account(
    title: str,
    network: Expression,
    ways: Mapping[str, Way] = NO_WAYS,
    measure: bool = False,
    **options: Any,
) -> Account:
    """Compile a network; with ``measure``, time it beside other ways.

    Args:
        title: What it is called.
        network: What is compiled.
        ways: Other ways to the same value, given the operands.
        measure: Whether to run all.
        options: Those of `compile`.
    """
    program = compile(network, **options)
    seconds = measured(program, ways) if measure else {}
    return Account(title, network, program, seconds)


def measured(program: Program, ways: Mapping[str, Way] = NO_WAYS) -> dict[str, float]:
    """Seconds of the program and of other ways on the same random operands, by turns.

    A way that fails takes infinitely long.
    """
    operands = dict(random_operands(program))
    calls: dict[str, Callable[[], Tensor]] = {"tnconv": lambda: program(**operands)}
    for name, way in ways.items():
        calls[name] = _made(way, {n: operand.clone() for n, operand in operands.items()})
    taken = timing.aside(
        lambda: timing.seconds_of(list(calls.values()), torch.device("cpu"), BUDGET)
    )
    return dict(zip(calls, taken, strict=True))


def _made(way: Way, operands: dict[str, Tensor]) -> Callable[[], Tensor]:
    """The call, or one that fails where another library refuses the layer."""
    try:
        return way(**operands)
    except Exception as error:
        refusal = str(error)

    def refused() -> Tensor:
        raise RuntimeError(refusal)

    return refused


def random_operands(program: Program) -> list[tuple[str, Tensor]]:
    """Tensors of the operands' shapes; positions are zeros."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            name,
            torch.zeros(shape, dtype=torch.int64)
            if name in program.indices
            else torch.randn(shape, generator=generator),
        )
        for name, shape in program.operands.items()
    ]


def fitted_to_terminal(text: str) -> str:
    """The text with long lines wrapped, if it goes to a terminal that is narrower."""
    if not sys.stdout.isatty():
        return text
    width = max(40, shutil.get_terminal_size().columns)
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        fold = {"subsequent_indent": indent, "drop_whitespace": True, "break_on_hyphens": False}
        lines += textwrap.wrap(line, width, **fold) or [""] if len(line) > width else [line]  # type: ignore[arg-type]
    return "\n".join(lines)
