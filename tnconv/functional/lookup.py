"""From an operation's name, shapes and hyper-parameters to its compiled program, looked up."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tnconv.codegen import Program
from tnconv.codegen.tiers import Build, FirstLookup, device_of, looked_up, searched
from tnconv.functional.expressions import EXPRESSIONS, Scale, Setting


def program(compiled: Build, device: str, name: str, *settings: Setting) -> Program:
    """The expression ``name``, compiled by one of the compilers."""
    return compiled(EXPRESSIONS[name](*settings), device=device)


def run(name: str, settings: tuple[object, ...], *operands: Tensor) -> Tensor:
    """The expression ``name``, compiled, on its operands in the order in which it holds them."""
    device = device_of(operands[0])
    found: Program
    try:
        found = searched(program, device, name, *settings)
    except FirstLookup as first:
        found = first.program
    except TypeError:  # sizes can be symbols or in lists, which do not hash
        found = looked_up(program, device, name, *map(_hashable, settings))
    return found.run(*operands)


# For torch.compile `run` is one call: it runs our compiler, but never traces it.
torch.compiler.allow_in_graph(run)  # type: ignore[no-untyped-call]


def several(vectors: Tensor, dims: int) -> int | None:
    """How many cotangents or tangents: the first dimension, where there is one more than usual."""
    return vectors.shape[0] if vectors.dim() == dims + 1 else None


def _hashable(setting: object) -> Setting:
    """Sizes as ints (under ``torch.compile`` they can be symbols) and sequences as tuples."""
    if isinstance(setting, str):
        return setting
    if isinstance(setting, Sequence):
        return tuple(map(_hashable, setting))
    return int(setting) if isinstance(setting, torch.SymInt) else setting  # type: ignore[return-value]


def ratio(scale: Scale | None) -> float | tuple[int, int] | None:
    """A fraction as two ints, which a graph of ``torch.compile`` can hold."""
    if scale is None or isinstance(scale, (int, float)):  # asking for a Fraction takes longer
        return scale
    return scale.numerator, scale.denominator
