"""From an operation's name, shapes and hyper-parameters to its compiled program, looked up."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from tnconv import diagrams
from tnconv.codegen import Program, compile
from tnconv.diagrams import Expression

Setting = int | str | tuple["Setting", ...]

DIAGRAMS: dict[str, Callable[..., Expression]] = {
    "conv": diagrams.conv,
    "conv_bias": lambda *settings: diagrams.with_bias(diagrams.conv(*settings)),
    "conv_transpose": diagrams.conv_transpose,
    "conv_transpose_bias": lambda *s: diagrams.with_bias(diagrams.conv_transpose(*s)),
    "fold": diagrams.fold,
    "avg_pool": diagrams.avg_pool,
    "linear": diagrams.linear,
    "linear_bias": lambda *settings: diagrams.with_bias(diagrams.linear(*settings)),
    "unfold": diagrams.unfold,
    "weight_vjp": lambda *settings: diagrams.conv(*settings).vjp("weight"),
    "per_sample_weight_grad": lambda *s: diagrams.conv(*s).vjp("weight", per_sample=True),
    "input_vjp": lambda *settings: diagrams.conv(*settings).vjp("x"),
    "kfac_expand": diagrams.kfac_expand,
    "kfac_reduce": diagrams.kfac_reduce,
}


@lru_cache(maxsize=4096)
def program(name: str, *settings: Setting) -> Program:
    return compile(DIAGRAMS[name](*settings))


def run(name: str, settings: tuple[object, ...], *operands: Tensor) -> Tensor:
    """The diagram ``name``, compiled, on its operands in the order in which it holds them."""
    try:
        found = program(name, *settings)
    except TypeError:  # sizes can be symbols or in lists, which do not hash
        found = program(name, *map(_hashable, settings))
    return found.run(*operands)


# For torch.compile `run` is one call: it runs our compiler, but never traces it.
torch.compiler.allow_in_graph(run)  # type: ignore[no-untyped-call]


def _hashable(setting: object) -> Setting:
    """Sizes as ints (under ``torch.compile`` they can be symbols) and sequences as tuples."""
    if isinstance(setting, str):
        return setting
    if isinstance(setting, Sequence):
        return tuple(map(_hashable, setting))
    return int(setting) if isinstance(setting, torch.SymInt) else setting  # type: ignore[return-value]
